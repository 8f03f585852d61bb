"""Trained projectors inside VLMs of transformers: real classes of seven architectures with small random weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_vlms import (
    AS_IMAGES,
    BLIND,
    GREEDY,
    GRIDS,
    IMAGE,
    MODELS,
    ONE,
    PAD,
    SEEN,
    TEXT,
    TWO,
    VIDEO,
    WIDTH,
    Own,
    compressor_of,
    pixels_of,
    texts,
    token_of,
    untouched,
    video_of,
    vlm_of,
    write_processor,
)
from torch import nn
from waiting import PATIENCE_S

import vtok
from vtok.config import loads, to_dict
from vtok.export import publish
from vtok.families import reducer
from vtok.llm.framewise import swap
from vtok.llm.joined import attach
from vtok.llm.places import Place, Span, expand, find_places, grid_positions
from vtok.types import Features, Tokens
from vtok.vision import TowerConfig

torch.set_num_threads(1)

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
@torch.no_grad()
def test_an_exact_compressor_gives_the_untouched_vlms_answers(name):
    """In a batch of two lengths, with the placeholders that the processor writes."""
    vlm, pixels = vlm_of(name), pixels_of(name, [2, 3])
    joined = attach(Own(vlm, name), vlm, positions="grid" if name in GRIDS else "sequence")
    want = [untouched(name, row, video_of(pixels, name, i)) for i, row in enumerate((ONE, TWO))]
    most = max(w["input_ids"].shape[1] for w in want)
    ids, mask = (torch.cat([nn.functional.pad(w[k], (0, most - w[k].shape[1])) for w in want]) for k in
                 ("input_ids", "attention_mask"))  # fmt: skip
    inputs = joined.prepare(ids, mask, **pixels)
    got = vlm(**inputs)
    made = joined.generate(ids, mask, **pixels, **GREEDY)
    for row, given in enumerate(want):
        logits, length = vlm(**given).logits[0], given["input_ids"].shape[1]
        assert inputs["attention_mask"][row].sum() == length
        assert (got.logits[row, -length:] - logits).abs().max() < 1e-5 * max(1.0, float(logits.abs().max()))
        assert torch.equal(vlm.generate(**given, **GREEDY)[0, length:], made[row])


# --- a compressor of vtok ---


@every_model
@torch.no_grad()
def test_any_number_of_tokens_is_read(name):
    vlm, pixels = vlm_of(name), pixels_of(name, [2, 3])
    ids, mask = texts(name, ONE, TWO)
    for family, budget in (("reducer", 5), ("reducer", 1), ("temporal", None)):
        method = {"method": "tome"} if family == "reducer" else {}
        joined = attach(compressor_of(family, **method), vlm)
        inputs = joined.prepare(ids, mask, **pixels, budget=budget)
        count = (inputs["input_ids"] == token_of(name)).sum(1)
        if budget:
            assert count.tolist() == [budget, budget]
        out = joined.generate(ids, mask, **pixels, budget=budget, **GREEDY)
        assert out.shape == (2, 5)


@every_model
@torch.no_grad()
def test_videos_and_the_order_of_tokens_matter(name):
    vlm = vlm_of(name)
    joined = attach(compressor_of(method="none"), vlm)
    ids, mask = texts(name, ONE)
    first, second = (joined.prepare(ids, mask, **pixels_of(name, [2], seed=seed)) for seed in (0, 1))
    a, b = vlm(**first).logits[:, -1], vlm(**second).logits[:, -1]
    assert (a - b).abs().max() > 1e-2
    tokens = joined.compressor.compress(Features(torch.randn(1, 2, 16, SEEN), (4, 4)))
    turned = Tokens(tokens.embeddings.flip(1), tokens.lengths, tokens.positions, tokens.group, tokens.rank)
    a, b = (joined(ids, mask, features=t).logits[:, -1] for t in (tokens, turned))
    assert (a - b).abs().max() > 1e-3


@every_model
@torch.no_grad()
def test_a_ragged_batch_is_its_rows_one_by_one(name):
    """Two lengths of video, a text without any, every search."""
    vlm, pixels = vlm_of(name), pixels_of(name, [1, 3])
    joined = attach(compressor_of(method="none"), vlm)
    rows = [ONE, BLIND, TWO]
    ids, mask = texts(name, *rows)
    logits = joined(ids, mask, **pixels).logits
    beams = dict(GREEDY, num_beams=3, return_dict_in_generate=True, output_scores=True)
    greedy = joined.generate(ids, mask, **pixels, **GREEDY)
    wide = joined.generate(ids, mask, **pixels, **beams)
    for index, (row, video) in enumerate(zip(rows, (0, None, 1))):
        own = {} if video is None else video_of(pixels, name, video)
        alone = texts(name, row)
        single = joined(*alone, **own).logits[0]
        assert torch.allclose(logits[index, -len(single) :], single, atol=2e-5)
        assert torch.equal(greedy[index], joined.generate(*alone, **own, **GREEDY)[0])
        best = joined.generate(*alone, **own, **beams)
        assert torch.equal(wide.sequences[index], best.sequences[0])
        assert abs(wide.sequences_scores[index] - best.sequences_scores[0]) < 1e-5


@every_model
def test_gradients_reach_the_compressor_and_nothing_else(name):
    vlm, pixels = vlm_of(name), pixels_of(name, [2, 3])
    compressor = compressor_of("temporal")
    compressor.train().zero_grad(set_to_none=True)
    joined = attach(compressor, vlm)
    assert {id(p) for p in joined.parameters()} == {id(p) for p in compressor.parameters()}
    ids, mask = texts(name, ONE, TWO)
    out = joined(ids, mask, labels=ids, **pixels)
    out.loss.backward()
    untrained = [n for n, p in compressor.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not untrained
    assert all(p.grad is None for p in vlm.parameters())
    compressor.eval()


# --- what goes in ---


@torch.no_grad()
def test_images_are_clips_of_one_frame():
    """Of an image cut into views the whole one is read; images and videos stand in one text where a model has both."""
    vlm, joined = vlm_of("llava_onevision"), attach(compressor_of(method="tome"), vlm_of("llava_onevision"))
    views = torch.randn(2, 3, 3, 32, 32)
    ids, mask = texts("llava_onevision", [5, IMAGE, 6, IMAGE, VIDEO, 7], ONE)
    videos = pixels_of("llava_onevision", [2, 3])
    inputs = joined.prepare(ids, mask, pixel_values=views, **videos, budget=torch.tensor([[1], [2], [3], [4]]))
    want = [5, IMAGE, 6, IMAGE, IMAGE, VIDEO, VIDEO, VIDEO, 7]
    assert inputs["input_ids"][0].tolist() == want
    assert inputs["input_ids"][1].tolist() == [PAD] * 2 + [5, *[VIDEO] * 4, 6, 7]
    assert inputs["attention_mask"].sum(1).tolist() == [9, 7] and vlm(**inputs).logits.isfinite().all()
    whole = joined.prepare(ids, mask, pixel_values=views[:, 0], **videos, budget=torch.tensor([[1], [2], [3], [4]]))
    for a, b in zip(inputs["mm_encoder_outputs"]["image"].pooler_output,
                    whole["mm_encoder_outputs"]["image"].pooler_output):  # fmt: skip
        assert torch.equal(a, b)
    only = attach(compressor_of(method="tome"), vlm_of("llava"))
    with pytest.raises(ValueError, match="one placeholder for images and videos"):
        only.prepare(*texts("llava", ONE, ONE), pixel_values=views[:1, 0], **pixels_of("llava", [2]))


@pytest.mark.parametrize("name", GRIDS)
@torch.no_grad()
def test_patches_of_a_qwen_tower_lie_row_by_row(name):
    """Its merger's blocks and its windows undone: merged again, they are the VLM's own tokens in their own order."""
    vlm, grid = vlm_of(name), torch.tensor([[2, 8, 12]])
    rows = torch.randn(int(grid.prod()), 3 * 2 * 8 * 8)
    (item,) = attach(compressor_of(method="tome"), vlm).features(pixel_values_videos=rows, video_grid_thw=grid)
    assert item.grid == (8, 12)
    blocks = item.patches.reshape(2, 4, 2, 6, 2, SEEN).transpose(2, 3)
    (want,) = vlm.model.get_video_features(rows, grid).pooler_output
    assert torch.allclose(vlm.model.visual.merger(blocks.reshape(-1, SEEN)), want, atol=1e-5)


@pytest.mark.parametrize("name", GRIDS)
@torch.no_grad()
def test_grids_of_several_sizes_in_one_batch(name):
    vlm, sizes = vlm_of(name), [[2, 4, 4], [1, 2, 6], [3, 4, 4]]
    rows = [torch.randn(t * h * w, 3 * 2 * 8 * 8) for t, h, w in sizes]
    for positions in ("sequence", "grid"):
        joined = attach(compressor_of(method="tome"), vlm, positions=positions)
        ids, mask = texts(name, [5, VIDEO, 6, VIDEO, 7], TWO)
        whole = dict(pixel_values_videos=torch.cat(rows), video_grid_thw=torch.tensor(sizes))
        logits = joined(ids, mask, **whole, budget=7).logits
        last = dict(pixel_values_videos=rows[2], video_grid_thw=torch.tensor(sizes[2:]))
        single = joined(*texts(name, TWO), **last, budget=7).logits[0]
        assert torch.allclose(logits[1, -len(single) :], single, atol=2e-5)
        image = dict(pixel_values=rows[1], image_grid_thw=torch.tensor(sizes[1:2]))
        both = joined(*texts(name, [5, IMAGE, 6], TWO), **image, **last, budget=7).logits
        assert torch.allclose(both[1, -len(single) :], single, atol=2e-5)


@torch.no_grad()
def test_one_run_of_placeholders_for_every_group():
    """The time of each window may be told between them."""
    joined = attach(compressor_of("temporal", groups="window"), vlm_of("qwen3_vl"))
    video = pixels_of("qwen3_vl", [4])
    groups = joined.compressor.compress(Features(joined.features(**video)[0].patches[None], (4, 4))).group[0].bincount()
    assert len(groups) == 2
    ids, mask = texts("qwen3_vl", [5, 31, VIDEO, 32, VIDEO, 7])
    made = joined.prepare(ids, mask, **video)["input_ids"][0].tolist()
    assert made == [5, 31, *[VIDEO] * int(groups[0]), 32, *[VIDEO] * int(groups[1]), 7]


@every_model
@torch.no_grad()
def test_features_and_tokens_made_elsewhere(name):
    joined = attach(compressor_of(method="tome"), vlm_of(name))
    ids, mask = texts(name, ONE, TWO)
    pixels = pixels_of(name, [2, 2])
    seen = torch.stack([item.patches for item in joined.features(**pixels)])
    assert seen.shape == (2, 2, 16, SEEN)
    want = joined(ids, mask, **pixels, budget=6).logits if name != "qwen3_vl" else None
    got = joined(ids, mask, features=seen, budget=6).logits
    tokens = joined.compressor.compress(Features(seen, (4, 4)), budget=6)
    assert torch.equal(got, joined(ids, mask, features=tokens).logits)
    if want is None:  # only its own tower gives DeepStack
        want = joined(ids, mask, features=Features(seen, (4, 4)), budget=6).logits
    assert torch.allclose(want, got, atol=1e-5)


@torch.no_grad()
def test_deepstack_is_the_mean_over_a_tokens_patches():
    """Off, zeros are added: the answers of a model whose tower has no earlier features."""
    vlm = vlm_of("qwen3_vl")
    joined, video = attach(compressor_of(method="tome"), vlm), pixels_of("qwen3_vl", [2])
    (item,) = joined.features(**video)
    given = joined.prepare(*texts("qwen3_vl", ONE), **video, budget=3)["mm_encoder_outputs"]["video"]
    tokens = joined.compressor.compress(Features(item.patches[None], item.grid), budget=3)
    (layer,) = item.deepstack
    for token in range(3):
        patches = (tokens.source[0] == token).nonzero().flatten().tolist()
        cells = [p // 16 * 4 + p % 16 // 4 // 2 * 2 + p % 4 // 2 for p in patches]
        assert torch.allclose(given.deepstack_features[0][0][token], layer[cells].mean(0), atol=1e-6)
    off = joined.prepare(*texts("qwen3_vl", ONE), features=item.patches[None], budget=3)["mm_encoder_outputs"]["video"]
    assert torch.equal(off.pooler_output[0], given.pooler_output[0])
    assert not off.deepstack_features[0][0].any()


def test_what_is_not_right_is_refused():
    vlm, compressor = vlm_of("llava_onevision"), compressor_of(method="tome")
    joined = attach(compressor, vlm)
    ids, mask = texts("llava_onevision", ONE, TWO)
    pixels = pixels_of("llava_onevision", [2, 3])
    tokens = compressor.compress(Features(torch.randn(2, 1, 16, SEEN), (4, 4)), budget=4)
    empty = tokens.select(torch.tensor([[True] * 4, [False] * 4]))
    wide = Tokens(torch.zeros(2, 1, 8), tokens.lengths * 0 + 1, *(x[:, :1] for x in (tokens.positions, tokens.group)),
                  tokens.rank[:, :1])  # fmt: skip
    for given, message in (
        ({}, r"0 video\(s\) were given, the texts have 2 placeholder"),
        (video_of(pixels, "llava_onevision", 0), r"1 video\(s\) were given, the texts have 2"),
        (dict(features=empty), "video 1 of the batch has no tokens"),
        (dict(features=wide), "tokens are 8 wide, the words of 'llava_onevision' 32"),
        (dict(features=tokens, budget=2), "Tokens already"),
        (dict(features=tokens, **pixels), "features and pixels"),
        (dict(features=torch.randn(2, 1, 15, SEEN)), "say the grid"),
        (dict(**pixels, pixles=1), "does not know pixles"),
        (dict(**pixels, pad="middle"), "pad='middle'"),
        (dict(pixel_values_videos=torch.randn(2, 3, 32, 32)), "expected .T, C, H, W."),
        (dict(**pixels, labels=ids[:, 1:]), "labels has shape"),
        (dict(**pixels, prompt=["what?"]), "1 prompts for 2"),
        (dict(**pixels, attention_mask=mask * torch.tensor([[1], [0]])), "text 1 is empty"),
        (dict(**pixels, times=[[0.0], [0.0]]), "give the seconds of each"),
    ):
        with pytest.raises(ValueError, match=message):
            joined.prepare(ids, **{"attention_mask": mask, **given})
    with pytest.raises(ValueError, match="needs video_grid_thw"):
        attach(compressor, vlm_of("qwen3_vl")).prepare(ids, mask, pixel_values_videos=torch.randn(16, 384))
    with pytest.raises(ValueError, match="positions='grid' is for models with M-RoPE"):
        attach(compressor, vlm, positions="grid")
    with pytest.raises(ValueError, match="of type 'qwen2', attach knows llava"):
        attach(compressor, transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)))
    with pytest.raises(ValueError, match="tokens are 16 wide"):
        attach(reducer.Model(reducer.Config(tower=TowerConfig(name="vlm:any"), in_dim=8, embedding_dim=16,
                                            embedding_rms=1.0)), vlm)  # fmt: skip


def test_labels_positions_and_times():
    vlm, joined = vlm_of("video_llava"), attach(compressor_of(method="tome"), vlm_of("video_llava"))
    ids, mask = texts("video_llava", ONE, TWO)
    pixels = pixels_of("video_llava", [2, 3])
    times = [torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.1, 0.2])]
    inputs = joined.prepare(ids, mask, labels=ids, **pixels, times=times, budget=3)
    assert inputs["labels"].tolist() == [
        [-100, -100, -100, -100, -100, -100, 6, 7],
        [-100, 9, -100, -100, -100, 10, 6, 7],
    ]
    assert inputs["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3, 4, 5], list(range(8))]
    right = joined.prepare(ids, mask, labels=ids, **pixels, budget=3, pad="right")
    assert right["input_ids"][0].tolist() == [5, VIDEO, VIDEO, VIDEO, 6, 7, PAD, PAD]
    losses = [vlm(**given).loss.item() for given in (inputs, right)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    trained = attach(compressor_of(method="tome"), vlm, freeze=False)
    assert trained.state_dict().keys() == {f"compressor.{k}" for k in trained.compressor.state_dict()}


def test_places_of_texts():
    rows = [[1, 9, 9, 2], [9, 3], []]
    assert find_places(rows, 9, [[4], [5]], "video") == [[Place(1, 3, 0, 0, 4)], [Place(0, 1, 1, 0, 5)], []]
    assert find_places(rows, 9, [[1], [2], [3]], "video")[0] == [Place(1, 2, 0, 0, 1), Place(2, 3, 1, 0, 2)]
    with pytest.raises(ValueError, match="in 2 run"):
        find_places([[9], [9]], 9, [[2, 2]], "video")
    assert expand([1, 9, 9, 2], [Place(1, 3, 0, 0, 3)]) == [1, 9, 9, 9, 2]
    # a token between two cells of the grid lies in the one that its middle is in; one without a place counts on
    cells = torch.tensor([[0.25, 0.25, 0.75], [0.75, 0.99, 1.0]])
    got = grid_positions(4, [Place(1, 2, 0, 0, 2)], [Span((2, 2, 4), cells, step=3.0)])
    assert got.T.tolist() == [[0, 0, 0], [1, 1, 4], [4, 2, 4], [5, 5, 5], [6, 6, 6]]
    nowhere = torch.full((2, 3), torch.nan)
    got = grid_positions(4, [Place(1, 2, 0, 0, 2)], [Span((2, 2, 4), nowhere)])
    assert got.tolist() == [list(range(5))] * 3


# --- the second way ---


@pytest.mark.parametrize("name", ["llava", "llava_next_video", "video_llava", "internvl"])
def test_a_swapped_projector_compresses_every_frame(name):
    torch.manual_seed(2)
    vlm, per_frame = MODELS[name]().eval(), 2
    in_dim = 4 * SEEN if name == "internvl" else SEEN  # after its pixel shuffle
    shape: Any = dict(tower=TowerConfig(name="vlm:any"), in_dim=in_dim, embedding_dim=WIDTH, embedding_rms=1.0)
    own = swap(reducer.Model(reducer.Config(**shape, method="tome")), vlm, budget=per_frame)
    pixels = pixels_of(name, [3])["pixel_values_videos"][0]
    given = {"pixel_values": pixels} if name in AS_IMAGES else {"pixel_values_videos": pixels[None]}
    ids = torch.tensor([[5, *[token_of(name)] * 3 * per_frame, 6]])
    out = vlm(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **given)
    out.loss.backward()
    assert vlm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given, **GREEDY).shape == (1, 8 + 5)
    assert all(p.grad.abs().max() > 0 for p in vlm.base_model.multi_modal_projector.compressor.parameters())
    vlm.base_model.multi_modal_projector = own


def test_a_projector_of_all_patches_is_swapped_where_they_are_rearranged():
    vlm = vlm_of("llava_onevision")
    pixels = torch.stack(pixels_of("llava_onevision", [2])["pixel_values_videos"])
    own = swap(compressor_of(method="none"), vlm)
    try:
        assert vlm.model.get_video_features(pixels).pooler_output.shape == (1, 2 * 4 + 1, WIDTH)
        swap(compressor_of(method="tome"), vlm, budget=4)
        with pytest.raises(ValueError, match="4 tokens of 16 patches"):
            vlm.model.get_video_features(pixels)
    finally:
        vlm.model.multi_modal_projector = own
    with pytest.raises(ValueError, match="no multi_modal_projector"):
        swap(compressor_of(method="none"), vlm_of("qwen3_vl"))


# --- where vtok is not installed ---


CLEAN = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vtok":
            raise ModuleNotFoundError("vtok is not here", name=name)

sys.meta_path.insert(0, Absent())
import numpy, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText

torch.set_num_threads(1)
root, names, greedy = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
compressor = AutoModel.from_pretrained(root + "/export", trust_remote_code=True)
given, out = load_file(root + "/given.safetensors"), {}
for name in names:
    vlm = AutoModelForImageTextToText.from_pretrained(root + "/" + name)
    inputs = {key.split(":")[1]: value for key, value in given.items() if key.startswith(name + ":")}
    joined = compressor.attach(vlm)
    out[name + ":ids"] = joined.generate(**inputs, budget=6, **greedy)
    out[name + ":beams"] = joined.generate(**inputs, budget=6, num_beams=3, **greedy)
    result = joined(**inputs, labels=inputs["input_ids"])
    out[name + ":logits"] = result.logits.detach()
    compressor.train()
    compressor.zero_grad()
    joined(**inputs, labels=inputs["input_ids"]).loss.backward()
    compressor.eval()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in compressor.parameters())
    assert all(p.grad is None for p in vlm.parameters())
tokens = compressor(torch.zeros(1, 2, 6, 24), grid=(2, 3), times=torch.zeros(1, 2), budget=3)
assert tokens.lengths.tolist() == [3] and tokens.embeddings.requires_grad
for wrong, error in ((lambda: compressor(torch.zeros(1, 2, 6, 24)), ValueError),
                     (lambda: compressor.encode(torch.zeros(1, 3, 2, 32, 32)), ImportError)):
    try:
        wrong()
    except error as problem:
        print(problem)
    else:
        raise AssertionError(error)
page = {"VLM": root + "/llava_onevision", "EXPORT": root + "/export", "torch": torch}
page |= {"prompts": ["w5 <video> w6", "w8 w9 <video> w7"], "videos": [numpy.zeros((4, 32, 32, 3), "uint8")] * 2}
exec(open(root + "/page.py").read(), page)
assert page["answers"].shape[0] == 2 and page["inputs"]["input_ids"].shape == (2, 2 + 1 + 4 * 4 + 1)
assert not [name for name in sys.modules if name.partition(".")[0] in ("vtok", "lightning", "timm")]
save_file({key: value.contiguous() for key, value in out.items()}, root + "/out.safetensors")
"""


@pytest.mark.slow
def test_an_export_answers_the_same_without_vtok(tmp_path):
    compressor, names = compressor_of("temporal"), ["llava_onevision", "qwen3_vl"]
    config = loads({"name": "attached", "model": to_dict(compressor.config)})
    publish(compressor, config, tmp_path / "export", entropy=False)
    given, joined = {}, {}
    for name in names:
        vlm_of(name).save_pretrained(tmp_path / name)
        vlm = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        joined[name] = attach(vtok.load(str(tmp_path / "export")), vlm)
        ids, mask = texts(name, ONE, TWO)
        pixels = pixels_of(name, [4, 4])
        if name not in GRIDS:
            pixels = {key: torch.stack(value) for key, value in pixels.items()}
        given[name] = {"input_ids": ids, "attention_mask": mask, **pixels}
    write_processor(tmp_path / "llava_onevision")
    page = (Path(__file__).parent.parent / "docs" / "projectors.md").read_text().partition("## The drop-in")[2]
    (tmp_path / "page.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.S)))
    flat = {f"{name}:{key}": value for name, inputs in given.items() for key, value in inputs.items()}
    save_file(flat, tmp_path / "given.safetensors")
    arguments = [str(tmp_path), json.dumps(names), json.dumps(GREEDY)]
    done = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN, *arguments], capture_output=True, text=True, timeout=PATIENCE_S,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "say the grid" in done.stdout and "vtok.vision" not in done.stdout and "tower 'vlm:any'" in done.stdout
    out = load_file(tmp_path / "out.safetensors")
    for name, inputs in given.items():
        assert torch.equal(out[f"{name}:ids"], joined[name].generate(**inputs, budget=6, **GREEDY))
        assert torch.equal(out[f"{name}:beams"], joined[name].generate(**inputs, budget=6, num_beams=3, **GREEDY))
        logits = joined[name](**inputs).logits
        assert torch.allclose(out[f"{name}:logits"], logits, atol=1e-6)
