"""A run begins with another model's weights: all of them, or all but what is named, and never in silence."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_export import TINY, clip, make_run
from test_llm import small_model, small_tokenizer
from test_projector_card import SMALL, TOWER, make_projector

import vtok
from vtok import config as configuration
from vtok.config import load_family, loads, to_dict
from vtok.loading import FORMAT, PREFIX, WEIGHTS, identify, load_run
from vtok.train import build, check
from vtok.training.init_from import EXCEPTIONS, begin_from, check_allowed

torch.set_num_threads(1)


def ship(run: Path) -> Path:
    """As much of an export as loading it reads: writing code, card and entropy model takes seconds."""
    model, _ = load_run(run)
    who, folder = identify(model), run / "export"
    folder.mkdir()
    facts = {
        "model_type": "vtok", "format": FORMAT, "family": model.config.name, "model": to_dict(model.config),
        "model_id": who.model_id, "weights_sha256": who.weights_sha256.hex(),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(facts))
    save_file({PREFIX + name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Exports by what of the tiny models they change; made once each."""
    folder, made = tmp_path_factory.mktemp("sources"), {}

    def get(family: str = "flexible", **model: Any) -> Path:
        key = json.dumps([family, model], sort_keys=True)
        if key not in made:
            made[key] = ship(make_run(folder / f"run-{len(made)}", family=family, **model))
        return made[key]

    return get


def fresh(family: str = "flexible", seed: int = 5, **model: Any) -> Any:
    config = loads({"model": {**TINY[family], **model}}).model
    torch.manual_seed(seed)
    return load_family(family).Model(config)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def weights(source: Path) -> dict[str, torch.Tensor]:
    return state(vtok.load(str(source)))


@pytest.mark.parametrize("family", ["flexible", "discrete"])
def test_without_exceptions_every_tensor_is_taken(shipped, family):
    source, model = shipped(family), fresh(family)
    begun = begin_from(model, str(source))
    given = weights(source)
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())
    assert begun.taken == len(given) and not (begun.resized or begun.new or begun.left_out or begun.changed)
    (line,) = begun.lines()
    assert str(source) in line and "all weights" in line and vtok.load(str(source)).shipped.model_id in line


def test_what_does_not_fit_is_named_with_both_shapes_and_the_key(shipped):
    model = fresh(width=32)
    before = state(model)
    with pytest.raises(ValueError) as caught:
        begin_from(model, str(shipped()))
    said = str(caught.value)
    assert f"init_from={str(shipped())!r}" in said and "patch_in.weight [32, 384] here, [16, 384] there" in said
    assert "No exception is for model.width was 16 and is 32" in said and "init_allow" not in said
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "nothing is half taken"


def test_a_new_resolution_stretches_position_tables(shipped):
    source = shipped()
    with pytest.raises(ValueError, match=r"model.size differs: init_allow=\[resolution\] lets it, or put"):
        begin_from(fresh(size=[32, 16]), str(source))
    model = fresh(size=[32, 16])
    begun = begin_from(model, str(source), allow=["resolution"])
    given, own = weights(source), model.state_dict()
    tables = {"encoder_positions.tables.1", "decoder_positions.tables.1"}
    assert begun.resized == dict.fromkeys(tables, ([2, 16], [4, 16])) and not begun.new
    assert all(torch.equal(own[name], given[name]) for name in given if name not in tables)
    assert begun.changed == {"size": ([16, 16], [32, 16])}
    told = "\n".join(begun.lines())
    assert "resized    encoder_positions.tables.1: [2, 16] -> [4, 16]" in told and "model.size: [16, 16] ->" in told
    old = vtok.load(str(source)).encoder_positions
    # what the source read for such frames is what this model begins with
    torch.testing.assert_close(model.encoder_positions((2, 4, 2)), old((2, 4, 2)))
    frames = clip(height=32, frames=4)
    torch.testing.assert_close(model.eval().encode(frames).embeddings, vtok.load(str(source)).encode(frames).embeddings)


def test_more_frames_begin_as_the_last_ones(shipped):
    blocks = dict(mask="time_block_causal_last", blocks=2)
    source = shipped(**blocks)
    more = dict(blocks, num_frames=8, blocks=4)
    with pytest.raises(ValueError, match=r"model.num_frames, model.blocks differ: init_allow=\[frames\] lets them"):
        begin_from(fresh(**more), str(source))
    model = fresh(**more)
    begun = begin_from(model, str(source), allow=["frames"])
    given, own = weights(source), model.state_dict()
    assert begun.resized["registers"] == ([8, 16], [16, 16]) and not begun.new
    for name in ("registers", "decoder_registers"):
        assert torch.equal(own[name][:8], given[name])
        assert torch.equal(own[name][8:], given[name][4:].repeat(2, 1)), "later blocks as the last"
    table = "encoder_positions.tables.0"
    assert torch.equal(own[table][:2], given[table]) and torch.equal(own[table][2:], given[table][1:].expand(2, -1))
    short, old = clip(frames=4), vtok.load(str(source))
    torch.testing.assert_close(model.eval().encode(short).embeddings, old.encode(short).embeddings)
    fewer = fresh(**dict(blocks, num_frames=2, blocks=1, mask="causal_last"))
    with pytest.raises(ValueError, match="model.mask"):
        begin_from(fewer, str(source), allow=["frames"])


def test_a_new_quantizer_begins_anew_and_nothing_else(shipped):
    source = shipped(quantizer={"name": "vq", "codebook_size": 512, "dim": 4})
    larger = dict(quantizer={"name": "vq", "codebook_size": 1024, "dim": 4})
    with pytest.raises(ValueError, match=r"ids of \[1024\], the source's vq with \[512\].*init_allow=\[quantizer\]"):
        begin_from(fresh(**larger), str(source))
    model = fresh(**larger)
    own = state(model)
    begun = begin_from(model, str(source), allow=["quantizer"])
    names = {name for name in own if name.startswith("quantizer.")}
    assert names and begun.new.keys() == names, "a codebook that is new is not marked as begun"
    given = weights(source)
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name] if name in names else given[name]), name
    other = fresh(quantizer={"name": "fsq", "levels": [8, 5, 5]})  # other ids, another width
    begun = begin_from(other, str(source), allow=["quantizer"])
    assert {"to_latent.weight", "from_code.weight"} <= begun.new.keys() and begun.left_out.keys() == names
    assert "patch_in.weight" not in begun.new and "left out   quantizer." in "\n".join(begun.lines())


def test_ids_that_would_mean_something_else_are_refused_though_every_tensor_fits(shipped):
    levels = {"name": "fsq", "levels": [8, 8, 8, 5, 5, 4]}
    with pytest.raises(ValueError, match=r"model.quantizer is fsq with ids of \[51200\].*init_allow=\[quantizer\]"):
        begin_from(fresh(quantizer=levels), str(shipped()))
    begun = begin_from(fresh(quantizer=levels), str(shipped()), allow=["quantizer"])
    assert begun.taken == len(weights(shipped())) and not begun.new


def test_a_transform_code_that_came_fitted_stays_and_a_new_one_is_fitted(shipped):
    dct = dict(registers="dct", dct_frequencies=[2, 8, 8], mask="full", quantizer={"name": "fsq", "levels": [8, 8]})
    videos = [torch.rand(4, 3, 4, 16, 16) * 2 - 1]
    plain = shipped(**dct)
    learned = fresh(**dct)
    begin_from(learned, str(plain))
    assert learned.fit_statistics(videos), "of a source that was never fitted, it still has to be"
    fitted = state(learned)
    assert bool(fitted["code.fitted"]) and not learned.fit_statistics(videos)
    assert all(torch.equal(fitted[name], value) for name, value in learned.state_dict().items())
    finer = fresh(**dict(dct, quantizer={"name": "fsq", "levels": [16, 16]}))
    begun = begin_from(finer, str(plain), allow=["quantizer"])
    assert {name for name in state(finer) if name.startswith("code.")} <= begun.new.keys()
    assert not bool(finer.code.fitted) and finer.fit_statistics(videos)


def test_an_exception_without_reason_is_an_error(shipped):
    source = str(shipped())
    for allow, why in (
        (["resolution"], "resolution is not needed, model.size is the source's: leave it out"),
        (["frames"], "frames is not needed, model.num_frames, model.blocks are the source's: leave it out"),
        (["tower"], "tower is not needed, this family has none: leave it out"),
        (["quantizer"], "quantizer is not needed, model.quantizer is the source's: leave it out"),
    ):
        with pytest.raises(ValueError, match=why):
            begin_from(fresh(), source, allow=allow)
    grid = str(shipped("discrete"))
    with pytest.raises(ValueError, match="resolution is not needed, no tensor depends on model.size: leave it out"):
        begin_from(fresh("discrete", size=[32, 32]), grid, allow=["resolution"])
    begun = begin_from(fresh("discrete", size=[32, 32]), grid)  # convolutions know no size
    assert begun.changed == {"size": ([16, 16], [32, 32])}
    with pytest.raises(ValueError, match=r"model.num_frames differs: init_allow=\[resolution,frames\]"):
        begin_from(fresh(size=[32, 16], num_frames=8), source, allow=["resolution"])
    begun = begin_from(fresh(size=[32, 16], num_frames=8), source, allow=["resolution", "frames"])
    assert {name.rpartition(".")[2] for name in begun.resized} == {"0", "1"}


def test_settings_are_checked_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"\['size'\] unknown; choose from resolution, frames, quantizer, tower, llm"):
        check_allowed("x", ["size"])
    with pytest.raises(ValueError, match=r"init_allow=\['frames'\] has no effect without init_from"):
        check(loads({"model": TINY["flexible"], "init_allow": ["frames"], "data": {"shards": "x"}}))
    known = {name for keys in EXCEPTIONS.values() for name in keys}
    families = {name: vars(load_family(name).Config()) for name in configuration.family_names()}
    assert all(any(key in config for config in families.values()) for key in known), "keys that families have"


def test_stages_of_a_family_say_what_they_add(shipped):
    quantizer = {"name": "identity", "dim": 6}
    model = fresh("discrete")
    begun = begin_from(model, str(shipped("discrete", quantizer=quantizer)))
    assert "new, and fitted to training clips: model.to_latent, model.from_code" in begun.done
    with pytest.raises(ValueError, match="trainer.statistics_clips"):
        model(clip(frames=3).video, torch.tensor([3, 3]))  # the maps wait for the clips
    wider = fresh("discrete", latent_channels=TINY["discrete"].get("latent_channels", 16) + 1)
    with pytest.raises(ValueError, match=r"tensors differ: .*put model.latent_channels=\d+ back") as caught:
        begin_from(wider, str(shipped("discrete", quantizer=quantizer)))
    assert "init_allow" not in str(caught.value), "ids go behind continuous latents without it"
    with pytest.raises(ValueError, match="quantizer is not needed, ids go behind the latents of the continuous source"):
        begin_from(fresh("discrete"), str(shipped("discrete", quantizer=quantizer)), allow=["quantizer"])
    scorer = fresh(scorer_depth=1, scorer_levels=2)
    assert "but for model.scorer, which is new" in begin_from(scorer, str(shipped())).done


def test_maps_that_rank_0_fitted_are_every_ranks(shipped, tmp_path, capsys):
    values = {"out": str(tmp_path), "init_from": str(shipped("discrete", quantizer={"name": "identity", "dim": 6}))}
    lit = build(loads(values | {"model": TINY["discrete"], "data": {"shards": "none"}}))
    fitted = fresh("discrete").state_dict()
    lit._trainer = SimpleNamespace(global_rank=1, strategy=SimpleNamespace(broadcast=lambda own: fitted))
    lit.setup("fit")
    assert torch.equal(lit.model.from_code.weight, fitted["from_code.weight"])
    assert torch.isfinite(lit.model(clip(frames=3).video, torch.tensor([3, 3])).recon).all()


# projectors


@pytest.fixture(scope="module")
def stage0(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("stage0"), {}

    def get(**model: Any) -> Path:
        key = json.dumps(model, sort_keys=True)
        if key not in made:
            made[key] = ship(make_projector(folder / f"run-{len(made)}", **model))
        return made[key]

    return get


def projector(family: str, seed: int = 5, **model: Any) -> Any:
    values = {"name": family, "in_dim": 6, "embedding_dim": 16, "embedding_rms": 0.05, "tower": {"name": TOWER}}
    config = loads({"model": values | SMALL[family] | model}).model
    torch.manual_seed(seed)
    return load_family(family).Model(config)


def test_a_compressor_begins_with_the_projector_of_stage_0_and_says_what_is_new(stage0):
    model = projector("temporal")
    own = state(model)
    begun = begin_from(model, str(stage0(family="reducer")))
    given = weights(stage0(family="reducer"))
    new = [name for name in own if not name.startswith("projector.")]
    assert all(torch.equal(value, given.get(name, own[name])) for name, value in model.state_dict().items())
    assert begun.taken == len(given)
    assert begun.done.startswith(f"the projector, {len(given)} tensors; model.") and f"{len(new)} tensors" in begun.done
    trained = stage0(family="temporal")
    begun = begin_from(model, str(trained))  # of its own family: everything
    assert begun.done == "all weights" and begun.taken == len(own)
    with pytest.raises(ValueError, match="tensors differ.*none here"):  # a trained compressor is no stage 0
        begin_from(projector("reducer"), str(trained))
    other = projector("temporal", former=dict(SMALL["temporal"]["former"], num_queries=3))
    with pytest.raises(ValueError, match=r"tensors differ: .*model.former.num_queries was 2 and is 3"):
        begin_from(other, str(trained))


@pytest.mark.parametrize("family", ["reducer", "temporal", "vqtoken"])
def test_another_tower_or_language_model_leaves_what_does_not_read_it(stage0, family):
    source = stage0(family="reducer")
    given = weights(source)
    wide = projector(family, in_dim=9, tower={"name": "timm:other"})
    with pytest.raises(ValueError, match=r"projector.hidden.weight \[16, 9\] here, \[16, 6\] there"):
        begin_from(wide, str(source))
    begun = begin_from(wide, str(source), allow=["tower"])
    reads = {"projector.norm.weight", "projector.norm.bias", "projector.hidden.weight"}
    assert begun.new.keys() == reads and begun.new["projector.hidden.weight"] == ([16, 6], [16, 9])
    assert torch.equal(wide.state_dict()["projector.out.weight"], given["projector.out.weight"])
    same = projector(family, tower={"name": "timm:other"})  # as wide, and yet another: its features mean other things
    own = state(same)
    assert begin_from(same, str(source), allow=["tower"]).new.keys() == reads
    assert all(torch.equal(same.state_dict()[name], own[name]) for name in reads)
    moved = projector(family, tower={"name": "timm:other"})
    begun = begin_from(moved, str(source))  # every tensor fits; a tower may be the same under another name
    assert begun.changed == {"tower.name": (TOWER, "timm:other")} and "'timm:other'" in "\n".join(begun.lines())
    assert torch.equal(moved.state_dict()["projector.hidden.weight"], given["projector.hidden.weight"])
    words = projector(family, embedding_dim=24, embedding_rms=0.1)
    begun = begin_from(words, str(source), allow=["llm"])
    assert {"projector.out.weight", "projector.hidden.weight", "projector.gain"} <= begun.new.keys()
    assert torch.equal(words.state_dict()["projector.norm.weight"], given["projector.norm.weight"])
    with pytest.raises(ValueError, match=r"init_allow=\[tower,llm\] lets it"):
        begin_from(projector(family, embedding_dim=24, in_dim=9), str(source), allow=["tower"])


def test_a_run_begins_so_and_every_key_is_in_its_configuration(shipped, tmp_path, capsys):
    values = {
        "out": str(tmp_path), "init_from": str(shipped()), "init_allow": ["resolution"],
        "model": {**TINY["flexible"], "size": [32, 16]},
        "data": {"shards": "none", "num_frames": 4, "size": [32, 16]},
    }  # fmt: skip
    model = build(loads(values)).model
    said = capsys.readouterr().out
    assert "resized    encoder_positions.tables.1: [2, 16] -> [4, 16]" in said
    assert torch.equal(model.state_dict()["registers"], weights(shipped())["registers"])
    again = build(loads(values), fresh=False)  # goes on from a checkpoint: nothing is loaded, nothing is said
    assert not capsys.readouterr().out
    assert not torch.equal(again.model.state_dict()["registers"], weights(shipped())["registers"])
    objective = [build(loads(values | {"init_from": f, "init_allow": a})).objective.state_dict()
                 for f, a in (("", []), (values["init_from"], ["resolution"]))]  # fmt: skip
    assert all(torch.equal(value, objective[1][name]) for name, value in objective[0].items()), "the same draws"


# small language models


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("words") / "llm"
    tokenizer = small_tokenizer("llama")
    small_model("llama", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_small_language_model_goes_on_from_texts_to_videos_or_from_stage_0(words):
    def made(seed: int, **more: Any) -> Any:
        values = {
            "name": "language",
            "embedding_dim": 16,
            "embedding_rms": 0.05,
            "num_tokens": 4,
            "lm": {"name": words},
        }
        torch.manual_seed(seed)
        module = load_family("language")
        return module.build(loads({"model": values | more}).model, load=vtok.load)

    video = {"source": "video", "in_dim": 6, "tower": {"name": TOWER}}
    texts, videos = made(0), made(1, **video)
    with torch.no_grad():
        texts.queries.vectors.add_(1.0)
    own = state(videos)
    assert "all weights; model.eye new" in videos.warm_start(texts)
    assert torch.equal(videos.queries.vectors, texts.queries.vectors)
    assert all(torch.equal(value, own[name]) for name, value in state(videos).items() if name.startswith("eye."))
    with pytest.raises(ValueError, match="init_from does not fit.*eye.projector.* none here"):
        texts.warm_start(videos)
    stage0 = projector("reducer", embedding_dim=videos.eye.embedding_dim)
    again = made(2, **video)
    assert "the projector, 8 tensors; model.head, model.lm, model.queries new" in again.warm_start(stage0)
    assert torch.equal(again.eye.projector.out.weight, stage0.projector.out.weight)
    with pytest.raises(ValueError, match="init_from does not fit.*eye.projector.out.weight"):
        again.warm_start(projector("reducer"))
