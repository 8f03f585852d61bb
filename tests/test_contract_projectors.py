"""The laws of `vtok/types.py` for projectors: every family that speaks to a language model, in every form with code of
its own, behind one table. A new family joins by one entry in `FORMS`; test_contract.py holds those of tokenizers.

Clips bring features, or texts: no tower is loaded. Both language models are real classes with small random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_caption_lm
import test_language_family
import test_reducer_family
import test_tempo
import test_temporal
import test_vqtoken
import torch
from test_contract import PROJECTORS, Poison
from test_language_family import folders  # noqa: F401
from torch import Tensor

from vtok import config as configuration
from vtok.config import load_family
from vtok.families import reducer
from vtok.types import Clip, Features, Projector, Tokens

torch.set_num_threads(1)
LENGTHS = [7, 1, 4]
PROMPTS = ["what moves?", "Where is the ring?", "red"]
TEXTS = [
    "A red ring moves left over the blue ground. Then a green star stays still.",
    "hello",
    "Where is the ring? " * 2,
]
LAYERS = [2, 5]  # of the tower, whose attention is recorded
REDUCERS = ("none", "random", "pooling", "tome", "kmeans", "visionzip", "hiprune", "holitom", "scissor")

Make = Callable[[str], Any]  # folder of a language model -> a model in eval mode
FORMS: dict[str, dict[str, Make]] = {
    "reducer": {m: lambda _, m=m: reducer.Model(test_reducer_family.config(m, max_tokens=90)) for m in REDUCERS},
    "temporal": {form: lambda _, form=form: test_temporal.make(form) for form in test_temporal.FORMS},
    "vqtoken": {form: lambda _, form=form: test_vqtoken.build(form) for form in test_vqtoken.FORMS},
    "language": {
        **{f: lambda home, f=f: test_language_family.made(home, f)[0] for f in test_language_family.FORMS},
        **{f"captions {f}": lambda home, f=f: test_caption_lm.made(home, f)[0] for f in test_caption_lm.FORMS},
        **{f"tempo {s}": lambda home, s=s: test_tempo.tempo(home, s) for s in test_tempo.SCORES},
        "tempo pooled": lambda home: test_tempo.tempo(home, "learned", queries="pooled"),
    },
}
CASES = [(family, form) for family, forms in FORMS.items() for form in forms]
each = pytest.mark.parametrize("case", CASES, ids="-".join)
# fewer tokens than the budget: as there is to tell, as clusters differ, as levels go; all others meet it exactly
FEWER = {("vqtoken", form) for form in test_vqtoken.ADAPTIVE} | {("temporal", "matryoshka")}
FEWER |= {case for case in CASES if case[1].startswith("captions")}
# words not in the prompts; the offset of keys shifts every score alike
QUIET = ("words.letters", "places.attention.in_proj_bias")
NEAR = {"temporal": 1e-5, "language": 1e-4}  # float32 to float64, where nothing is chosen
TOLERANCE = {"vqtoken": 1e-7}  # sums over members are float32 whatever the weights are; 1e-9 else
ALL_OR_NOTHING = {("reducer", "none")}  # no number of tokens to choose
KEPT: dict[tuple[str, str], Any] = {}


@pytest.fixture
def home(folders) -> str:  # noqa: F811
    return folders["llama"]


def model_of(case: tuple[str, str], home: str) -> Any:
    """In float64; shared by tests, which leave it as it is."""
    if case not in KEPT:
        torch.manual_seed(0)
        KEPT[case] = FORMS[case[0]][case[1]](home).eval().double()
    return KEPT[case]


def clips(model: Any, lengths: list[int] = LENGTHS, *, seed: int = 0) -> Clip:
    """A ragged batch of what the model reads, with questions; padding is zeros."""
    keys, prompts = [str(i) for i in range(len(lengths))], PROMPTS[: len(lengths)]
    if getattr(model.config, "source", "video") == "text":
        return Clip(keys, text=TEXTS[: len(lengths)], prompt=prompts)
    seen = {model.config.tower.name: features(lengths, model.config.in_dim, seed=seed)}
    audio = getattr(model.config, "audio", None)
    if audio is not None and audio.name:
        heard = features([2 * n for n in lengths], audio.in_dim, seed=seed + 1)
        seen[audio.name] = Features(heard.patches[:, :, :2], (1, 2), lengths=heard.lengths)
    return Clip(keys, prompt=prompts, features=seen)


def features(lengths: list[int], dim: int, *, seed: int = 0) -> Features:
    """Scenes of three frames of 3 x 4 patches, frames of a scene alike, with all that a tower can give."""
    draw: dict[str, Any] = dict(generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    batch, steps = len(lengths), max(lengths)
    scenes = torch.randn(batch, -(-steps // 3), 12, dim, **draw).repeat_interleave(3, 1)[:, :steps]
    x = scenes + 0.3 * torch.randn(batch, steps, 12, dim, **draw)
    received = {layer: torch.rand(batch, steps, 12, **draw) for layer in LAYERS}
    own = dict(frame=x.mean(2), keys=torch.randn(batch, steps, 12, 4, **draw), attention=received)
    times = torch.arange(steps, dtype=torch.float64).expand(batch, -1) / 2
    return filled(Features(x, (3, 4), times=times, lengths=torch.tensor(lengths), **own), 0.0)


def filled(seen: Features, value: float) -> Features:
    """The same with `value` in everything that is padding."""
    hole = ~seen.mask

    def fill(x: Tensor | None) -> Any:
        return None if x is None else x.masked_fill(hole.reshape(*hole.shape, *[1] * (x.ndim - 2)), value)

    received = None if seen.attention is None else {layer: fill(x) for layer, x in seen.attention.items()}
    return replace(seen, patches=fill(seen.patches), frame=fill(seen.frame), keys=fill(seen.keys), attention=received)


def alone(clip: Clip, row: int) -> Clip:
    """A clip of a batch by itself, without its padding."""
    one = clip.rows(slice(row, row + 1))

    def short(seen: Features) -> Features:
        real = slice(0, int(seen.count()[0]))
        cut = {name: None if x is None else x[:, real] for name, x in vars(seen).items()
               if name in ("patches", "times", "frame", "keys")}  # fmt: skip
        received = None if seen.attention is None else {layer: x[:, real] for layer, x in seen.attention.items()}
        return replace(seen, **cut, attention=received, lengths=None)

    return replace(one, features={name: short(seen) for name, seen in one.features.items()} if one.features else None)


def changed(clip: Clip, change: Callable[[Features], Features]) -> Clip:
    return replace(clip, features={name: change(seen) for name, seen in (clip.features or {}).items()} or None)


def row_of(tokens: Tokens, row: int) -> Tokens:
    count = int(tokens.lengths[row])
    cut = {name: getattr(tokens, name)[row : row + 1, :count] for name in ("embeddings", "positions", "group", "rank")}
    return Tokens(lengths=tokens.lengths[row : row + 1], **cut)


def same(a: Tokens, b: Tokens, tolerance: float = 1e-9) -> None:
    assert a.lengths.tolist() == b.lengths.tolist()
    for name in ("group", "rank"):
        assert torch.equal(getattr(a, name)[a.mask], getattr(b, name)[b.mask]), name
    assert (a.embeddings[a.mask] - b.embeddings[b.mask]).abs().max() <= tolerance
    assert torch.allclose(a.positions[a.mask], b.positions[b.mask], rtol=0, atol=1e-6, equal_nan=True)


def most_of(model: Any, case: tuple[str, str]) -> list[int | None]:
    return [None] if case in ALL_OR_NOTHING else [None, 5, 1]


def test_every_projector_of_the_package_is_here():
    assert set(FORMS) == PROJECTORS, "give each family its tiny forms in FORMS"


@each
@torch.no_grad()
def test_tokens_say_what_they_are(case, home):
    model = model_of(case, home)
    assert isinstance(model, Projector)
    for budget in most_of(model, case):
        tokens = model.encode(clips(model), budget=budget)
        assert tokens.embeddings.shape[2] == model.embedding_dim and tokens.embeddings.isfinite().all()
        assert 1 <= int(tokens.lengths.min()) and int(tokens.lengths.max()) <= (budget or model.max_tokens)
        assert int(tokens.lengths.max()) == tokens.embeddings.shape[1], "no more padding than the longest needs"
        for b, count in enumerate(tokens.lengths.tolist()):
            group, rank = tokens.group[b, :count], tokens.rank[b, :count]
            assert (group.diff() >= 0).all() and int(group.min()) >= 0, "in time order"
            for g in group.unique():
                assert sorted(rank[group == g].tolist()) == list(range(int((group == g).sum())))
            places = tokens.positions[b, :count]
            assert bool(((places >= 0) & (places <= 1) | places.isnan()).all())
            if tokens.mass is not None:
                assert bool((tokens.mass[b, :count] > 0).all())
            if tokens.source is not None:
                assert set(tokens.source[b].tolist()) - {-1} <= set(range(count))
            if tokens.times is not None:
                spans = tokens.times[b, : int(tokens.num_groups[b])]
                assert len(spans) == int(tokens.num_groups[b]) and bool((spans[:, 0] <= spans[:, 1]).all())
                assert 0 <= float(spans.min()) and float(spans[:, 0].max()) <= (LENGTHS[b] - 1) / 2
        reads_text = getattr(model.config, "source", "video") == "text"
        assert reads_text == (tokens.times is None), "when a group was seen"


@each
@torch.no_grad()
def test_a_clip_in_a_batch_is_as_it_is_alone_whatever_its_padding_holds(case, home):
    model = model_of(case, home)
    clip = clips(model)
    for budget in most_of(model, case):
        together = model.encode(clip, budget=budget)
        same(model.encode(clip, budget=budget), together, 0.0)
        near = TOLERANCE.get(case[0], 1e-9)
        same(model.encode(changed(clip, lambda seen: filled(seen, 7.0)), budget=budget), together, near)
        for row in range(len(clip)):
            same(model.encode(alone(clip, row), budget=budget), row_of(together, row), near)


@each
@torch.no_grad()
def test_budgets_are_met_exactly_or_never_exceeded(case, home):
    model = model_of(case, home)
    clip = clips(model)
    natural = model.encode(clip).lengths
    if case in ALL_OR_NOTHING:
        with pytest.raises(ValueError, match="budget is 7"):
            model.encode(clip, budget=7)
    else:
        for budget in (1, 2, 5, 8, model.max_tokens):
            if budget > model.max_tokens:
                continue
            lengths = model.encode(clip, budget=budget).lengths
            if case in FEWER:
                assert bool((lengths >= 1).all()) and bool((lengths <= budget).all())
            else:
                assert lengths.tolist() == natural.clamp(max=budget).tolist()
    if hasattr(model, "most_tokens"):
        assert torch.equal(model.most_tokens(clip.features[model.config.tower.name]), natural)
    for wrong in (0, -1, model.max_tokens + 1):
        with pytest.raises(ValueError, match=f"budget={wrong}"):
            model.encode(clip, budget=wrong)


@each
@torch.no_grad()
def test_a_nested_model_keeps_some_of_all_tokens(case, home):
    model = model_of(case, home)
    clip = clips(model)
    if not getattr(model, "nested", False):
        pytest.skip("every budget of this model has tokens of its own")
    everything = model.encode(clip)
    for budget in (1, 3, 6):
        cut = model.encode(clip, budget=budget)
        sizes = torch.zeros(len(clip), int(everything.num_groups.max()), dtype=torch.int64)
        sizes[:, : cut.group_sizes.shape[1]] = cut.group_sizes
        same(cut, everything.truncate(sizes))
        same(cut, model.encode(clip, budget=sizes))


@each
@torch.no_grad()
def test_how_many_there_will_be_is_known_before(case, home):
    """`token_bounds` of the configuration alone; every budget that `budgets` names can be asked for."""
    model = model_of(case, home)
    clip = clips(model)
    config = model.config
    seen = (clip.features or {}).get(config.tower.name) if getattr(config, "source", "video") == "video" else None
    listed = model.budgets(seen)
    assert listed == (
        [None] if case in ALL_OR_NOTHING else sorted(b for b in listed if b) + [b for b in listed if not b]
    )
    for budget in {*listed, *most_of(model, case)}:
        lengths = model.encode(clip, budget=budget).lengths.tolist()
        for frames, count in zip(LENGTHS, lengths):
            least, most = config.token_bounds(frames, 3, 4, budget=budget)
            assert least <= count <= most
            if config.length_policy == "metadata":
                assert config.token_count(frames, 3, 4, budget=budget) == count
    if case not in FEWER | ALL_OR_NOTHING and listed[-1] is not None:
        full = model.encode(clip).lengths
        assert model.encode(clip, budget=listed[-1]).lengths.tolist() == full.tolist(), "the most that there is"


@each
@torch.no_grad()
def test_one_frame_is_enough(case, home):
    model = model_of(case, home)
    clip = clips(model, [1])
    for budget in most_of(model, case):
        tokens = model.encode(clip, budget=budget)
        assert tokens.embeddings.isfinite().all() and 1 <= int(tokens.lengths[0]) <= (budget or model.max_tokens)


@each
def test_every_parameter_has_a_gradient_whatever_the_budget(case, home):
    """Engines that split gradients (ZeRO) await them all; and none is zero by construction."""
    model = copy.deepcopy(model_of(case, home)).train()
    clip = clips(model)
    told = getattr(model, "captioner", None)
    if told is not None:
        clip.captions = [[{"text": "a red ring"}], [], [{"text": "two stars"}]]
    for budget in most_of(model, case):
        model.zero_grad()
        tokens = model.encode(clip, budget=budget)
        loss = (tokens.embeddings * torch.randn_like(tokens.embeddings)).sum()
        taken = model.pop_quantizer_loss() if hasattr(model, "pop_quantizer_loss") else None
        loss = loss if taken is None else loss + taken
        if told is not None and told.learned is not None:
            loss = loss + told.learned.nll + (0 if told.learned.length is None else told.learned.length)
        scores = getattr(tokens, "scores", None)
        if scores is not None and scores.requires_grad:
            loss = loss + scores[scores.isfinite()].square().sum()
        loss.backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, without
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        if budget is None and case[0] != "language":  # what learns there is asked in test_language_family
            still = {name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
            assert still <= {name for name in still if name.startswith(QUIET)}, still


@each
@torch.no_grad()
def test_modules_are_called_as_often_whatever_the_clips_hold(case, home):
    """A rank with one-frame clips must not wait for one with long clips, nor be waited for (ZeRO-3)."""
    model = model_of(case, home)

    def calls(clip: Clip, budget: int | None) -> dict[str, int]:
        count: dict[str, int] = {}

        def note(name: str) -> Callable[..., None]:
            return lambda *_: count.__setitem__(name, count.get(name, 0) + 1)

        parts = [(name, part) for name, part in model.named_modules() if name]
        handles = [part.register_forward_hook(note(name)) for name, part in parts]
        model.encode(clip, budget=budget)
        for handle in handles:
            handle.remove()
        return count

    speaks = getattr(model, "captioner", None) is not None  # words one after the other: ranks agree on how many
    if speaks:
        model.captioner.config.how == "parallel" or pytest.skip("ranks go on together (captioner._anyone)")
    wanted = calls(clips(model), None)
    held = {name for name, part in model.named_modules() if name and list(part.parameters(recurse=False))}
    # of words that nothing has here; read by torch's own attention inside of its forward, which engines know
    quiet = {name for name in held if name.endswith(("embed_tokens", "lm_head", "places.attention.out_proj"))}
    assert held - quiet <= wanted.keys(), "a part that is never called would wait for its gradients"
    for lengths, budget in (([1], None), ([4, 4, 4], None), (LENGTHS, 1)):
        if budget is not None and case in ALL_OR_NOTHING:
            continue
        assert calls(clips(model, lengths, seed=4), budget) == wanted, (lengths, budget)
    still = changed(clips(model, [4]), lambda seen: replace(seen, patches=seen.patches[:, :1].expand_as(seen.patches)))
    assert calls(still, None) == wanted, "nothing moves"


@each
@torch.no_grad()
def test_saved_and_loaded_it_gives_the_same(case, home):
    model = model_of(case, home)
    family = load_family(case[0])
    values = configuration.to_dict(model.config)
    again = family.Model(configuration.from_dict(family.Config, values, where="export")).double().eval()
    again.load_state_dict(model.state_dict(), strict=True)
    if hasattr(model, "_tokenizer"):
        again._tokenizer = model._tokenizer
    same(again.encode(clips(model)), model.encode(clips(model)), 0.0)


@each
@torch.no_grad()
def test_float32_is_near_and_bfloat16_finite(case, home):
    model = copy.deepcopy(model_of(case, home))
    exact = model.encode(clips(model))

    def single(seen: Features) -> Features:
        kept = {
            name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in vars(seen).items()
        }
        received = None if seen.attention is None else {layer: x.float() for layer, x in seen.attention.items()}
        return Features(**kept | {"attention": received})

    clip = changed(clips(model), single)
    model.float()
    got = model.encode(clip)
    assert got.embeddings.dtype == torch.float32
    if case not in FEWER:
        assert got.lengths.tolist() == exact.lengths.tolist()
        if case[0] in NEAR:
            assert (got.embeddings - exact.embeddings).abs().max() < NEAR[case[0]]
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode(clip).embeddings.isfinite().all()


@each
@torch.no_grad()
def test_the_answer_is_never_read(case, home):
    model = model_of(case, home)
    clip = clips(model)
    poisoned = replace(clip, target=Poison([""] * 3), qa=Poison([[]] * 3))
    same(model.encode(poisoned), model.encode(clip), 0.0)
