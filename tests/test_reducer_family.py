"""The family of training-free reducers: a projector before any of them, and pixels made smaller before the tower."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from vtok import config as configuration
from vtok.families.reducer import Config, Model, seed_of, small_grid
from vtok.reducers import REDUCERS, build
from vtok.types import Clip, Features
from vtok.vision import TowerConfig

LENGTHS = [5, 1, 3]
LAYERS = [2, 5]


def config(method: str, **settings) -> Config:
    layers = LAYERS[: REDUCERS[method].layers] if method in REDUCERS else []
    own = dict(in_dim=6, embedding_dim=8, embedding_rms=0.05, tower=TowerConfig(name="cached"), max_tokens=60)
    return Config(**(own | dict(method=method, attention_layers=layers) | settings))


def features(lengths=LENGTHS, *, dim=6) -> Features:
    batch, steps = len(lengths), max(lengths)
    x = torch.randn(batch, 1, 12, dim) + 0.5 * torch.randn(batch, steps, 12, dim)
    received = {layer: torch.rand(batch, steps, 12) for layer in LAYERS}
    made = dict(frame=x.mean(2), keys=torch.randn(batch, steps, 12, 4), attention=received)
    return Features(x, (3, 4), times=torch.arange(steps).expand(batch, -1) / 2.0, lengths=torch.tensor(lengths), **made)


@pytest.mark.parametrize("method", ["none", *REDUCERS])
def test_any_method_behind_one_projector(method):
    model, seen = Model(config(method)).eval(), features()
    clip = Clip(["a", "b", "c"], features={"cached": seen}, prompt=["what?"] * 3)
    budget = None if method == "none" else 7
    tokens = model.encode(clip, budget=budget)
    assert tokens.lengths.tolist() == ([60, 12, 36] if method == "none" else [7, 7, 7])
    sizes = tokens.embeddings[0].square().mean(-1).sqrt()
    assert sizes.max() < 0.0501 and sizes.mean() > 0.01, "as large as words, means of several a little smaller"
    if method != "none":
        own = {"seed": torch.tensor([seed_of(key, 0) for key in clip.keys])} if REDUCERS[method].random else {}
        projected = build(method, **own)(model.project(seen), budget=7)
        assert torch.equal(tokens.embeddings, projected.embeddings) and torch.equal(tokens.source, projected.source)
        kept = model.compress(seen, budget=20)
        assert kept.lengths.tolist() == [20, 12, 20], "clips with fewer patches give all they have"
        assert model.compress(seen).lengths.tolist() == [60, 12, 36]
    tokens.embeddings.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projector.out.parameters())


def test_without_a_method_all_tokens_stay():
    model, seen = Model(config("none")), features()
    tokens = model.compress(seen)
    torch.testing.assert_close(tokens.embeddings[0], model.projector(seen.patches[0]).flatten(0, 1))
    with pytest.raises(ValueError, match="keeps all patches: a clip has 60, the budget is 7.*choose a method"):
        model.compress(seen, budget=7)
    with pytest.raises(ValueError, match="a clip has 60, the budget is 48.*raise max_tokens"):
        Model(config("none", max_tokens=48)).compress(seen)


def test_budgets_out_of_range():
    model = Model(config("pooling", max_tokens=16))
    assert model.compress(features()).lengths.tolist() == [16, 12, 16]
    assert model.compress(features(), budget=torch.tensor([[3], [9], [16]])).lengths.tolist() == [3, 9, 16]
    for budget in (0, 17):
        with pytest.raises(ValueError, match=f"budget={budget} is out of range: ask for 1 to 16"):
            model.compress(features(), budget=budget)


def test_chance_is_the_seed_s_except_in_training():
    seen = features([5, 5])
    model = Model(config("random", options={"seed": 3})).eval()
    first = model.compress(seen, budget=6)
    assert torch.equal(first.source[0], first.source[1]) and torch.equal(
        first.source, model.compress(seen, budget=6).source
    )
    assert not torch.equal(first.source, Model(config("random")).eval().compress(seen, budget=6).source)
    model.train()
    torch.manual_seed(0)
    drawn = [model.compress(seen, budget=6).source for _ in range(2)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0][0], drawn[0][1])
    torch.manual_seed(0)
    assert torch.equal(model.compress(seen, budget=6).source, drawn[0]), "the step's seed decides"


@pytest.mark.parametrize("method", ["random", "kmeans"])
def test_every_clip_has_a_chance_of_its_own_and_keeps_it(method):
    """64 clips and five seeds are 320 draws; the same clip draws the same in any batch."""
    keys, x = [f"clip{i}" for i in range(64)], torch.randn(1, 4, 12, 6).expand(64, -1, -1, -1)
    found = []
    for seed in range(5):
        model = Model(config(method, options={"seed": seed})).eval()
        clip = Clip(keys, features={"cached": Features(x, (3, 4))})
        source = model.encode(clip, budget=4).source
        assert torch.equal(source, model.encode(clip, budget=4).source)
        few = Clip(keys[7:3:-2], features={"cached": Features(x[:2], (3, 4))})
        assert torch.equal(model.encode(few, budget=4).source, source[[7, 5]])
        found += [tuple(row.tolist()) for row in source]
    assert len(set(found)) > (300 if method == "random" else 20)


def test_settings_that_cannot_be():
    wrong = {
        "model.method='tomme' is unknown; choose one of none, downsample, random": dict(method="tomme"),
        "'tome' has no option 'r'": dict(method="tome", options={"r": 8}),
        "method=none has none": dict(method="none", options={"seed": 1}),
        r"hiprune follows the attention of 2 block\(s\)": dict(method="hiprune", attention_layers=[3]),
        "attention_from='head' is unknown": dict(method="none", attention_from="head"),
        "max_tokens=0 must be at least 1": dict(method="none", max_tokens=0),
    }
    for message, settings in wrong.items():
        with pytest.raises(ValueError, match=message):
            Config(**settings)


def test_a_compressor_begins_with_stage_0():
    stage0 = Model(config("none"))
    model = Model(config("tome"))
    model.warm_start(stage0)
    seen = features()
    same = build("tome")(stage0.project(seen), budget=5)
    assert torch.equal(model.compress(seen, budget=5).embeddings, same.embeddings)


def test_small_grids_fill_a_budget():
    for frames, h, w in ((16, 8, 8), (5, 3, 4), (1, 7, 7), (9, 1, 1)):
        for budget in (1, 2, 7, 16, 50, 64, 300, 2000):
            t, y, x = small_grid(frames, h, w, budget)
            assert t <= frames and y <= h and x <= w and t * y * x <= budget
            assert t * y * x >= 0.8 * min(budget, frames * h * w)
    assert small_grid(16, 8, 8, 128) == (8, 4, 4) and small_grid(16, 8, 8, 16) == (4, 2, 2)


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> str:
    timm = pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(1)
    shape = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **shape)
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_args=shape)
    return str(folder)


def videos(lengths) -> Clip:
    video = torch.randint(0, 256, (len(lengths), 3, max(lengths), 40, 40), dtype=torch.uint8)
    times = torch.arange(max(lengths)).expand(len(lengths), -1) / 4
    return Clip([str(i) for i in range(len(lengths))], video=video, lengths=torch.tensor(lengths), times=times)


def test_downsampling_is_what_a_tower_sees_of_a_smaller_video(tower):
    model = Model(config("downsample", in_dim=24, tower=TowerConfig(name=tower), max_tokens=128)).eval()
    clip = videos([8, 2])
    tokens = model.encode(clip, budget=16)  # 4 frames of 2 x 2, or the 2 that there are
    assert tokens.lengths.tolist() == [16, 8] and tokens.num_groups.tolist() == [4, 2]
    assert tokens.times[0, :, 0].tolist() == [0.25, 0.75, 1.25, 1.75] and tokens.times[1, :2, 0].tolist() == [0, 0.25]
    small = model._load(TowerConfig(name=tower, size=[16, 16]))
    for i, frame in enumerate((1, 3, 5, 7)):
        seen = small.forward(clip.video[:1, :, frame : frame + 1])
        expected = model.projector(seen.patches[0, 0])
        torch.testing.assert_close(tokens.embeddings[0, 4 * i : 4 * i + 4], expected, atol=1e-6, rtol=1e-4)
    whole = model.encode(videos([8]))
    assert whole.lengths.tolist() == [128], "at the largest budget nothing is made smaller"


def test_downsampling_refuses_a_cache_of_features(tower):
    model = Model(config("downsample"))
    with pytest.raises(ValueError, match="read shards of videos instead of the feature cache"):
        model.encode(Clip(["a", "b", "c"], features={"cached": features()}), budget=4)
    with pytest.raises(ValueError, match="features come too late"):
        model.compress(features(), budget=4)


@pytest.mark.parametrize("method", ["visionzip", "hiprune", "holitom", "fastvid"])
def test_what_a_method_follows_is_asked_of_the_tower(tower, method):
    layers = [0, -1][: REDUCERS[method].layers]
    options = dict(in_dim=24, tower=TowerConfig(name=tower), attention_layers=layers)
    model = Model(config(method, **options))
    assert model.encode(videos([4, 2]), budget=9).lengths.tolist() == [9, 9]
    if method == "visionzip":
        bare = Clip(["a"], features={tower: Features(torch.randn(1, 2, 16, 24), (4, 4))})
        with pytest.raises(ValueError, match="without the attention keys"):
            model.encode(bare, budget=4)


def test_presets_train_the_same_projector():
    folder = Path(__file__).parent.parent / "configs" / "reducer"
    full, small = (configuration.load(folder / f"{name}.yaml") for name in ("stage0", "tiny"))
    assert full.model.method == small.model.method == "none"
    for stage0, pooled in (("stage0", "pooling"), ("tiny", "tiny_pooling")):
        one, other = (configuration.flatten(configuration.load(folder / f"{n}.yaml")) for n in (stage0, pooled))
        changed = {key for key in one if one[key] != other[key]}
        assert changed == {"name", "model.method", "model.max_tokens", "objective.budgets.law"}
    full.model.in_dim, full.model.embedding_dim, full.model.embedding_rms = 1152, 3584, 0.02
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Model(full.model).parameters())
    text = (folder / "stage0.yaml").read_text()
    assert math.isclose(parameters / 1e6, float(text.partition("# Parameters: ")[2].split()[0]), abs_tol=0.05)
