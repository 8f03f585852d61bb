"""Audio at evaluation as in training: features of another name, from shards on disk, reach `compress` in every row."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_llm import folders  # noqa: F401  (a fixture)

from vtok.data.feature_shards import Recording
from vtok.data.pipeline import ValidationSet
from vtok.data.sources import Shard
from vtok.data.view import Cached, View
from vtok.evaluation.answering import AnsweringEvaluator
from vtok.families import reducer, temporal
from vtok.layers.dynamic_context import FormerConfig
from vtok.layers.segments import SegmentConfig
from vtok.llm import LLMConfig, ObjectiveConfig, PartsConfig, ProjectorObjective, ask, load_llm
from vtok.metrics.cost import Timed, clock_of, compress_flops, first_token_seconds
from vtok.types import Clip, Features
from vtok.vision import TowerConfig

torch.set_num_threads(1)
TEMPLATE = "<video>\nQuestion: {question}\nAnswer:"
FRAMES, EARS = 6, 3  # frames of a clip, feature frames of sound for each


def write_shard(path: Path, *, width: int, frames: int, grid: tuple[int, int], seed: int) -> Shard:
    """A shard of recorded features, as `vtok features` writes them, with the questions of each clip."""
    generator = torch.Generator().manual_seed(seed)
    qa = [dict(id=f"q{i}", type=kind, question="What colour is the circle?", answer="red", choices=["red", "blue"])
          for i, kind in enumerate(("colour", "order"))]  # fmt: skip
    with tarfile.open(path, "w") as tar:
        for clip in range(3):
            patches = torch.randn(1, frames, grid[0] * grid[1], width, generator=generator)
            seconds = torch.arange(frames, dtype=torch.float64) * (FRAMES / 4 / frames)
            recorded = Recording(
                Features(patches, grid), seconds, 1, False, 0.0, FRAMES / 4, FRAMES / 4, frames / 1.5, 1e-3
            )
            members = {"features.safetensors": recorded.to_bytes(), "json": json.dumps({"qa": qa}).encode()}
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"clip{clip}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return Shard(str(path), path.name)


def read_shard(shard: Shard, *, name: str, frames: int) -> Clip:
    view = View(num_frames=frames, fps=None, crop="none", cached=Cached(name, 1, ("", "", "", "")))
    (clip,) = ValidationSet([shard], view=view, batch_size=3)
    return clip


@pytest.fixture(scope="module")
def lab(folders, tmp_path_factory):  # noqa: F811
    """(llm, a temporal model that hears and reads questions, its stage 0, clips with both towers' features)."""
    root = tmp_path_factory.mktemp("hearing")
    seen = write_shard(root / "seen.tar", width=5, frames=FRAMES, grid=(2, 2), seed=1)
    heard = write_shard(root / "heard.tar", width=4, frames=FRAMES * EARS, grid=(1, 1), seed=2)
    clip = read_shard(seen, name="tower", frames=FRAMES)
    ears = read_shard(heard, name="ears", frames=FRAMES * EARS)
    assert ears.keys == clip.keys and clip.features and ears.features
    clip = replace(clip, features={**clip.features, **ears.features})
    llm = load_llm(LLMConfig(name=folders["llama"]))
    sizes = dict(in_dim=5, embedding_dim=32, embedding_rms=llm.embedding_rms, tower=TowerConfig(name="tower"))
    torch.manual_seed(0)
    model = temporal.Model(
        temporal.Config(
            **sizes, max_tokens=12, window=3, text=True, segments=SegmentConfig(most=1),
            former=FormerConfig(num_queries=2, width=16, depth=2, num_heads=2),
            audio=temporal.AudioConfig(name="ears", in_dim=4, tokens=2),
        )
    ).eval()  # fmt: skip
    full = reducer.Model(reducer.Config(**sizes)).eval()
    return llm, model, full, clip


def deaf(clip: Clip) -> Clip:
    assert clip.features
    heard = clip.features["ears"]
    return replace(clip, features={**clip.features, "ears": replace(heard, patches=torch.zeros_like(heard.patches))})


def test_questions_are_answered_with_what_is_heard(lab):
    """Each question by hand: the clip's own features, both towers', into `compress` with its prompt."""
    llm, model, _, clip = lab
    found = ask(llm, clip, model, template=TEMPLATE, budget=4)
    silent = ask(llm, deaf(clip), model, template=TEMPLATE, budget=4)
    assert len(found) == 6 and all(a.likelihoods != b.likelihoods for a, b in zip(found, silent))
    assert clip.features and clip.qa
    for row, key in enumerate(clip.keys):
        at = slice(row, row + 1)
        own = {name: replace(each, patches=each.patches[at], times=None) for name, each in clip.features.items()}
        own = Clip([key], features=own, qa=[clip.qa[row]])
        alone = ask(llm, own, model, template=TEMPLATE, budget=4)
        for one, other in zip(alone, [each for each in found if each.key == key]):
            assert one.likelihoods == pytest.approx(other.likelihoods, abs=1e-4)


def test_parts_hear_their_own_stretch(lab):
    llm, model, _, clip = lab
    parts = PartsConfig(2, "<video>\nDescription:", 2)
    found = ask(llm, clip, model, template=TEMPLATE, budget=4, parts=parts)
    assert all(len(each.parts) == 2 for each in found)


def test_every_row_of_a_table_hears_and_costs_are_counted_with_it(lab):
    llm, model, full, clip = lab
    how = dict(template=TEMPLATE, budgets=[2, 4], full=full, seeds=1, progress=False)
    found = AnsweringEvaluator(model, llm, val=[clip], **how).run()
    silent = AnsweringEvaluator(model, llm, val=[deaf(clip)], **how).run()
    rows, others = ({(r["method"], r["budget"]): r for r in f["rows"]} for f in (found, silent))
    for budget in (2, 4):
        assert rows["temporal", budget]["loss"] != others["temporal", budget]["loss"]
        assert rows["temporal", budget]["compress_flops"] > rows["pooling", budget]["compress_flops"] > 0
        assert rows["pooling", budget]["loss"] == others["pooling", budget]["loss"], "reducers hear nothing"
        assert rows["temporal", budget]["ttft_ms"] > 0
    assert rows["temporal", 2]["kv_bytes"] < rows["full", None]["kv_bytes"]
    assert "cannot be made smaller" in rows["downsample", 2]["note"]
    assert {each["budget"] for each in found["versus"]} == {2, 4} and found["benchmark"]["tells_apart"] is not None


def test_the_report_shows_answers_of_clips_without_frames(lab):
    llm, model, full, clip = lab
    evaluator = AnsweringEvaluator(
        model, llm, val=[clip], template=TEMPLATE, budgets=[2], full=full, seeds=1, progress=False
    )
    result = evaluator.run()
    shown = evaluator.show(result, fps=4.0, each=1, most=3)
    assert 1 <= len(shown) <= 3 and all("original" not in each for each in shown)
    for each in shown:
        methods = [reader["method"] for reader in each["readers"]]
        assert methods[:2] == ["blind", "temporal"] and methods[-1] == "full"
        for question in each["questions"]:
            assert len(question["said"]) == len(methods) and all(s["text"] is not None for s in question["said"])
            (ours,) = [s for s, method in zip(question["said"], methods) if method == "temporal"]
            table = result["per_question"]
            at = [
                i
                for i, (k, q) in enumerate(zip(table["keys"], table["types"]))
                if (k, q) == (each["key"], question["type"])
            ]
            assert table["right"]["temporal"]["2"][at[0]] == float(ours["right"])


def test_a_step_of_training_hears_the_same(lab, folders):  # noqa: F811
    """The features that model and teacher share are made once and keep what is heard."""
    _, model, full, clip = lab
    config = ObjectiveConfig(llm=LLMConfig(name=folders["llama"]), teacher="stage0", logits=1.0)
    loss_of = ProjectorObjective(config, model.config, load=lambda _: full)
    asked = replace(clip, prompt=["What colour?"] * 3, target=["red"] * 3)
    with torch.no_grad():
        heard, silent = (float(loss_of(model, each, 0).report["nll"]) for each in (asked, deaf(asked)))
    assert heard != silent


def test_what_is_timed_is_asked_as_the_projector_is(lab):
    _, model, full, clip = lab
    ticks = iter(range(100))
    timed = Timed(model, lambda: float(next(ticks)))
    assert (
        timed.reads_prompt and set(timed.beside(clip)) == {"audio"} and Timed(full, clock_of("cpu")).beside(clip) == {}
    )
    prompted = replace(clip, prompt=["What colour?"] * 3)
    with torch.no_grad():
        made = timed.encode(prompted, budget=3)
        again = timed.compress(model.features(clip), budget=3, prompt=["What colour?"] * 3, **timed.beside(clip))
    assert timed.seconds == 2.0 and torch.equal(made.embeddings, again.embeddings)


def test_counting_leaves_parameters_as_they_were(lab):
    _, model, _, clip = lab
    model.projector.requires_grad_(False)
    try:
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        few, many = (compress_flops(model, each, budget=2) for each in (clip.rows(slice(1)), clip))
        assert few == pytest.approx(many, rel=0.01) and few > 0, "per clip"
        assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    finally:
        model.projector.requires_grad_(True)


def test_the_first_token_of_every_prompt_is_timed_in_turns(lab):
    llm = lab[0]
    asked: list[int] = []

    class Watched:
        device, max_length, embed = llm.device, llm.max_length, staticmethod(llm.embed)

        def generate(self, embeds, mask, *, max_new_tokens):
            asked.append(embeds.shape[1])
            assert max_new_tokens == 1 and bool(mask.all())
            return llm.generate(embeds, mask, max_new_tokens=max_new_tokens)

    found = first_token_seconds(Watched(), [9, 30, 9, llm.max_length, 0], repeats=3)
    assert asked == [9, 30] * 4, "a round of warm-up, then three in turns; no room, no time"
    assert set(found) == {9, 30} and all(0 < value < 60 for value in found.values())
