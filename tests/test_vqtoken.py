"""VQToken: clusters of a clip's patches as tokens, whatever numbers, order, batch or padding they came in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vtok.families.vqtoken import AdaptiveConfig, Config, Model, Objective
from vtok.layers.place_map import KINDS, MIXERS, PlaceConfig, PlaceMap
from vtok.quantize import QuantizerConfig
from vtok.types import Clip, Features, ShapeError, Tokens
from vtok.vision import TowerConfig

RMS = 0.03
GRID = (3, 4)
FORMS: dict[str, dict] = {
    "plain": {},
    "euclidean": dict(metric="euclidean", init="farthest", space="tower"),
    "fourier": dict(places=PlaceConfig(kind="fourier", mixer="attention_residual", num_heads=2, hidden=16)),
    "histogram": dict(places=PlaceConfig(kind="histogram", bins=[4, 2, 2], hidden=16)),
    "paper": dict(places=PlaceConfig(kind="label_map", mixer="attention", map_size=[4, 3, 4], num_heads=2, hidden=16)),
    "none": dict(places=PlaceConfig(kind="none"), order="time"),
    "blocks": dict(scope="blocks", block_frames=2, order="time"),
    "stream": dict(scope="stream", block_frames=2),
    "continue": dict(scope="stream", block_frames=2, restart=False, metric="euclidean"),
    "weighted": dict(weighting="learned"),
    "weighted-stream": dict(weighting="learned", scope="stream", block_frames=2, order="time"),
    "weighted-vq": dict(weighting="learned", codebook=QuantizerConfig(levels=[3, 3])),
    "variance": dict(adaptive=AdaptiveConfig(criterion="variance", share=0.6)),
    "elbow": dict(adaptive=AdaptiveConfig(criterion="elbow", min_tokens=2), scope="blocks", block_frames=3),
    "silhouette": dict(adaptive=AdaptiveConfig(criterion="silhouette")),
    "fsq": dict(codebook=QuantizerConfig(levels=[3, 3])),
    "vq": dict(codebook=QuantizerConfig(name="vq", codebook_size=12, dim=4, ema_decay=0.0, kmeans_init=False)),
}
ADAPTIVE = {"variance", "elbow", "silhouette", "fsq", "vq", "weighted-vq"}


def build(form: str = "plain", **changes) -> Model:
    """A model whose parameters have all moved from where they begin."""
    torch.manual_seed(0)
    settings = dict(tower=TowerConfig(name="tower"), in_dim=6, embedding_dim=8, embedding_rms=RMS, num_tokens=6)
    model = Model(Config(**settings | FORMS[form] | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def features(batch: int = 3, frames: int = 5, *, lengths: list[int] | None = None, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(batch, frames, 12, 6, generator=generator)
    real = None if lengths is None else torch.tensor(lengths)
    times = 0.5 * torch.arange(frames).expand(batch, -1)
    out = Features(patches, GRID, times=times, lengths=real)
    out.patches = patches * out.mask[..., None, None]
    return out


def one(of: Features, row: int) -> Features:
    """A clip by itself, without its padding."""
    count = int(of.count()[row])
    assert of.times is not None
    return Features(of.patches[row : row + 1, :count], of.grid, times=of.times[row : row + 1, :count])


def same(a: Tokens, b: Tokens, row: int, *, tolerance: float = 1e-5) -> None:
    """Clip 0 of `a` is clip `row` of `b`."""
    count, groups = int(a.lengths[0]), int(a.num_groups[0])
    assert int(b.lengths[row]) == count
    for name in ("embeddings", "positions", "mass"):
        torch.testing.assert_close(
            getattr(a, name)[0, :count], getattr(b, name)[row, :count], atol=tolerance, rtol=tolerance, equal_nan=True
        )
    for name in ("group", "rank", "indices"):
        if getattr(a, name) is not None:
            assert torch.equal(getattr(a, name)[0, :count], getattr(b, name)[row, :count])
    if a.source is not None and b.source is not None:
        assert torch.equal(a.source[0], b.source[row, : a.source.shape[1]])
        assert bool((b.source[row, a.source.shape[1] :] == -1).all())
    if a.times is not None and b.times is not None:
        torch.testing.assert_close(a.times[0, :groups], b.times[row, :groups])


@pytest.mark.parametrize("form", FORMS)
def test_batched_as_one_by_one_and_padding_changes_nothing(form):
    model, seen = build(form), features(4, 6, lengths=[6, 3, 1, 4])
    with torch.no_grad():
        together = model.compress(seen)
        again = model.compress(seen)
        noisy = model.compress(replace(seen, patches=seen.patches.masked_fill(~seen.mask[..., None, None], 7.0)))
        for row in range(4):
            same(model.compress(one(seen, row)), together, row)
    for other in (again, noisy):
        assert torch.equal(other.embeddings, together.embeddings) and torch.equal(other.source, together.source)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_say_what_they_are(form):
    model, seen = build(form), features(3, 5, lengths=[5, 2, 4])
    with torch.no_grad():
        tokens = model.compress(seen)
    assert tokens.embeddings.shape[2] == model.embedding_dim and int(tokens.lengths.max()) <= model.max_tokens
    assert form in ADAPTIVE or tokens.lengths.tolist() == [6, 6, 6]
    real = tokens.mask
    assert tokens.mass is not None and tokens.source is not None and tokens.times is not None
    for row, frames in enumerate((5, 2, 4)):
        count, patches = int(tokens.lengths[row]), frames * 12
        source = tokens.source[row]
        assert bool((source[:patches] >= 0).all()) and bool((source[patches:] == -1).all())
        assert source[:patches].bincount(minlength=count).tolist() == tokens.mass[row, :count].tolist()
        t, y, x = torch.meshgrid(
            (torch.arange(5) + 0.5) / frames, (torch.arange(3) + 0.5) / 3, (torch.arange(4) + 0.5) / 4, indexing="ij"
        )
        for token in range(count):  # each lies in the middle of its patches
            own = (source == token).reshape(5, 3, 4)
            middle = torch.stack([t[own].mean(), y[own].mean(), x[own].mean()])
            torch.testing.assert_close(tokens.positions[row, token], middle, atol=1e-5, rtol=1e-5)
        for group in tokens.group[row, :count].unique():
            inside = tokens.group[row, :count] == group
            rank, mass = tokens.rank[row, :count][inside], tokens.mass[row, :count][inside]
            assert rank.sort()[0].tolist() == list(range(len(rank)))
            assert mass[rank.argsort()].tolist() == mass.sort(descending=True)[0].tolist()
            if model.config.order == "time":
                t = tokens.positions[row, :count, 0][inside]
                assert t.tolist() == t.sort()[0].tolist()
    assert bool((tokens.group.diff(dim=1)[real[:, 1:]] >= 0).all())
    if model.config.scope == "blocks":
        cut = model.config.block_frames
        assert int(tokens.group.max()) == -(-5 // cut) - 1
        assert tokens.times[0, :, 0].tolist() == [0.5 * cut * g for g in range(-(-5 // cut))]
        frame = torch.arange(60) // 12
        where = tokens.group[0].gather(0, tokens.source[0])
        assert torch.equal(where, frame // cut)  # no token holds patches of two blocks
    else:
        assert int(tokens.group.max()) == 0 and tokens.times.tolist() == [[[0.0, 2.0]], [[0.0, 0.5]], [[0.0, 1.5]]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("budget", [1, 3, 6])
def test_budgets_are_met_or_not_exceeded(form, budget):
    with torch.no_grad():
        tokens = build(form).compress(features(), budget=budget)
    lengths = tokens.lengths
    assert bool((lengths <= budget).all()) and bool((lengths >= 1).all())
    assert form in ADAPTIVE or lengths.tolist() == [budget] * 3
    if budget == 1 and FORMS[form].get("scope") != "blocks":
        assert tokens.mass is not None and tokens.mass.flatten().tolist() == [60.0] * 3  # nothing is dropped


def test_budgets_of_blocks():
    model = build("blocks")
    share = torch.tensor([[1, 0, 2], [3, 2, 1]])
    tokens = model.compress(features(2, 6), budget=share)
    assert tokens.lengths.tolist() == [3, 6] and tokens.group[0, :3].tolist() == [0, 2, 2]
    assert tokens.source is not None and bool((tokens.source[0, 24:48] == -1).all())
    assert tokens.group[1].tolist() == [0, 0, 0, 1, 1, 2]
    with pytest.raises(ValueError, match="budget=7 is above model.num_tokens=6"):
        model.compress(features(2, 6), budget=7)
    with pytest.raises(ValueError, match="budget=7 is out of range"):
        build().compress(features(), budget=7)


def test_learned_weights_begin_even_and_say_what_a_mean_is_of():
    plain, seen = build(num_tokens=2), features(2, 4)
    model = build("weighted", num_tokens=2)
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        torch.nn.init.zeros_(model.weigh.weight), torch.nn.init.zeros_(model.weigh.bias)
        even, expected = model.compress(seen), plain.compress(seen)
        torch.testing.assert_close(even.embeddings, expected.embeddings)
        model.places.leave.weight.zero_(), model.places.leave.bias.zero_()  # contents alone
        torch.nn.init.normal_(model.weigh.weight, std=3.0)
        tokens, projected = model.compress(seen), model.project(seen).patches.flatten(1, 2)
    weight = 2 * model.weigh(projected / RMS).sigmoid()
    for row in range(2):
        for token in range(2):
            own = tokens.source[row] == token
            x, w = projected[row, own], weight[row, own]
            mean, size = (x * w).sum(0) / w.sum(), (x.square().mean(1).sqrt() * w[:, 0]).sum() / w.sum()
            told = mean * size / mean.square().mean().sqrt()
            torch.testing.assert_close(tokens.embeddings[row, token], told, atol=1e-5, rtol=1e-4)
    assert torch.equal(tokens.positions, even.positions) and torch.equal(tokens.mass, even.mass)


def test_every_patch_its_own_token():
    """As many tokens as patches: the projector's own patches, at its own scale."""
    model = build("none", num_tokens=60, order="mass")
    seen = features()
    with torch.no_grad():
        tokens = model.compress(seen)
        patches = model.project(seen).patches.flatten(1, 2)
    assert tokens.source is not None and tokens.source.tolist() == [list(range(60))] * 3
    torch.testing.assert_close(tokens.embeddings, patches, atol=1e-6, rtol=1e-5)
    few = model.compress(features(2, 2, lengths=[2, 1]))  # clips with fewer patches than tokens keep them all
    assert few.lengths.tolist() == [24, 12]
    split = build("blocks", num_tokens=60).compress(features(2, 3, lengths=[3, 1]))  # 30 for each block of 24 or 12
    assert split.lengths.tolist() == [36, 12]


@pytest.mark.parametrize("mixer", ["add", "attention_residual"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_tokens_begin_as_means_of_their_patches_as_long_as_these(kind, mixer):
    torch.manual_seed(0)
    places = PlaceConfig(kind=kind, mixer=mixer, num_heads=2, map_size=[2, 3, 4])
    model = Model(Config(in_dim=6, embedding_dim=8, embedding_rms=RMS, num_tokens=5, places=places))
    tokens = model.compress(features())
    patches = model.project(features()).patches.flatten(1, 2)
    assert tokens.source is not None
    for row, token in ((0, 0), (1, 3), (2, 4)):
        own = patches[row][tokens.source[row] == token]
        mean, size = own.mean(0), own.square().mean(1).sqrt().mean()
        torch.testing.assert_close(tokens.embeddings[row, token], mean * size / mean.square().mean().sqrt())
    assert float(tokens.embeddings.detach().square().mean().sqrt()) == pytest.approx(RMS, rel=0.05)  # as long as words


@pytest.mark.parametrize("form", FORMS)
def test_numbers_of_clusters_mean_nothing(form, monkeypatch):
    """Another numbering of the same clusters gives the same tokens (VQToken's released code moves by 3.6 %)."""
    from vtok.families import vqtoken
    from vtok.layers import cluster

    model, seen = build(form), features()
    with torch.no_grad():
        expected = model.compress(seen)

        def shuffled(labels: Tensor) -> Tensor:
            out = labels.clone()
            for row in out:
                count = int(row.max()) + 1
                row.copy_(torch.where(row < 0, -1, torch.randperm(count)[row.clamp_min(0)]))
            return out

        for module, name in ((vqtoken, "kmeans"), (vqtoken, "adaptive_kmeans"), (cluster, "kmeans")):
            plain = getattr(module, name)
            monkeypatch.setattr(
                module, name, lambda *a, _f=plain, **k: (c := _f(*a, **k))._replace(labels=shuffled(c.labels))
            )
        got = model.compress(seen)
    for row in range(3):
        same(Tokens(**{k: v[row : row + 1] for k, v in _tensors(expected).items()}), got, row)


def _tensors(tokens: Tokens) -> dict:
    return {k: v for k, v in vars(tokens).items() if isinstance(v, Tensor) and k != "indices"}


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_every_parameter(form):
    model = build(form).train()
    tokens = model.compress(features(3, 4, lengths=[4, 2, 1]))
    loss = (tokens.embeddings * torch.randn_like(tokens.embeddings)).sum()
    taken = model.pop_quantizer_loss()
    if taken is not None:
        loss = loss + taken
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        quiet = name == "places.attention.in_proj_bias"  # that of the keys shifts every score alike
        assert quiet or bool((parameter.grad != 0).any()), name
    assert (taken is not None) == (model.config.codebook is not None) and model.pop_quantizer_loss() is None


@pytest.mark.parametrize("form", ["plain", "stream", "fourier", "vq"])
def test_gradients_of_a_fresh_model_are_finite(form):
    """Zeros everywhere: features of padding, layers that begin at 0."""
    torch.manual_seed(0)
    model = Model(Config(**dict(in_dim=6, embedding_dim=8, embedding_rms=RMS, num_tokens=6) | FORMS[form]))
    model.compress(features(2, 5, lengths=[5, 1])).embeddings.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_an_image_and_a_still_clip():
    model = build()
    image = features(2, 1)
    tokens = model.compress(image)
    assert tokens.lengths.tolist() == [6, 6] and bool((tokens.positions[..., 0] == 0.5).all())
    still = Features(image.patches.expand(-1, 4, -1, -1).contiguous(), GRID)
    tokens = model.compress(still)
    assert tokens.source is not None
    source = tokens.source.unflatten(1, (4, 12))
    assert bool((source == source[:, :1]).all())  # a patch that does not change goes to one token
    flat = Features(torch.ones(1, 3, 12, 6), GRID)
    assert model.compress(flat).lengths.tolist() == [6]  # asked is asked
    for criterion in ("variance", "elbow", "silhouette"):
        assert build(criterion, scope="clip", adaptive=AdaptiveConfig(criterion=criterion)).compress(
            flat
        ).lengths.tolist() == [1]


def test_adaptive_tokens_shorten_the_sequence():
    """Clips with 2, 4 and 9 kinds of patches, of 32 frames: as many tokens, not one a frame."""
    kinds, clips = [2, 4, 9], []
    for number in kinds:
        basis = torch.linalg.qr(torch.randn(12, 12))[0][:number]
        which = torch.arange(32 * 12) % number
        clips.append((basis[which] + 0.02 * torch.randn(32 * 12, 12)).unflatten(0, (32, 12)))
    seen = Features(torch.stack(clips), GRID)
    for criterion in ("variance", "elbow", "silhouette"):
        adaptive = AdaptiveConfig(criterion=criterion, share=0.95)
        settings = dict(in_dim=12, embedding_dim=8, embedding_rms=RMS, num_tokens=20, space="tower", adaptive=adaptive)
        tokens = Model(Config(**settings)).compress(seen)
        assert tokens.lengths.tolist() == kinds and tokens.embeddings.shape[1] == 9
        assert Model(Config(**settings)).compress(seen, budget=3).lengths.tolist()[0] == 2


def test_paper_form_of_the_attention():
    """Tokens are softmax(B Wq (B Wk)^T) M Wv, with M from the whole label map, sampled where it has another size."""
    config = PlaceConfig(kind="label_map", mixer="attention", map_size=[2, 3, 4], num_heads=2, hidden=16)
    places = PlaceMap(config, dim=8, num_tokens=5, rms=RMS)
    content, maps = torch.randn(2, 5, 8), torch.randint(0, 5, (2, 2, 3, 4))
    mass = torch.ones(2, 5)
    got = places(content, torch.zeros(2, 5, 3), mass, frames=torch.tensor([2, 2]), maps=maps)
    told = places.leave(torch.nn.functional.gelu(places.enter((maps.flatten(1) + 1.0) / 5))).reshape(2, 5, 8)
    q, k, v = (part.reshape(8, 8) for part in places.attention.in_proj_weight.chunk(3))
    heads = [x.reshape(2, 5, 2, 4).transpose(1, 2) for x in (content @ q.T, content @ k.T, told @ v.T)]
    score = (heads[0] @ heads[1].transpose(2, 3) / 2).softmax(-1) @ heads[2]
    expected = places.attention.out_proj(score.transpose(1, 2).reshape(2, 5, 8))
    torch.testing.assert_close(got, expected)
    fewer = places(content[:, :3], torch.zeros(2, 3, 3), mass[:, :3], frames=torch.tensor([2, 2]), maps=maps)
    assert fewer.shape == (2, 3, 8)
    large = maps.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(3, 3)
    padded = torch.cat([large, torch.full_like(large, -1)], 1)
    assert torch.equal(places.sampled(padded, torch.tensor([4, 4])), maps)
    assert bool((places.sampled(padded, torch.tensor([4, 1])) >= 0).all())  # padding is never read


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("mixer", MIXERS)
def test_tokens_know_where_and_when(kind, mixer):
    """The same patches in the other half of the frames, or of the picture: the same clusters, other tokens."""
    places = PlaceConfig(kind=kind, mixer=mixer, num_heads=2, map_size=[4, 3, 4], hidden=16)
    model = build(places=places, num_tokens=2)
    a, b = torch.randn(6), torch.randn(6)
    patches = torch.empty(3, 4, 3, 4, 6)
    patches[:] = b
    patches[0, :1], patches[1, -1:], patches[2, :, :, 0] = a, a, a
    tokens = model.compress(Features(patches.flatten(2, 3), GRID))
    assert tokens.mass is not None and tokens.mass.tolist() == [[36.0, 12.0]] * 3
    for first, second in ((0, 1), (0, 2), (1, 2)):
        gap = (tokens.embeddings[first] - tokens.embeddings[second]).detach().norm() / tokens.embeddings[first].norm()
        assert float(gap) > 1e-3


@pytest.mark.parametrize("form", ["stream", "continue", "weighted-stream"])
@pytest.mark.parametrize("pieces", [[7], [1] * 7, [3, 4], [2, 2, 3]])
def test_streamed_equals_offline(form, pieces):
    model, seen = build(form), features(2, 7)
    assert seen.times is not None
    with torch.no_grad():
        offline = model.compress(seen)
        state, start = model.init_state(2), 0
        assert model.flush(state) is None
        for size in pieces:
            part = Features(seen.patches[:, start : start + size], GRID, times=seen.times[:, start : start + size])
            nothing, state = model.step(Clip(["a", "b"], features={"tower": part}), state)
            start += size
            assert nothing is None and state.buffer[0].shape[1] < 2  # constant memory: less than a block, and K sums
            assert "memory" not in state.cache or state.cache["memory"].mass.shape[1] <= 6
            now = model.flush(state)
            before = model.compress(Features(seen.patches[:, :start], GRID, times=seen.times[:, :start]))
            for row in range(2):  # tokens of what came so far, at any time
                same(Tokens(**{k: v[row : row + 1] for k, v in _tensors(before).items()}), now, row)
    assert now.source is None and torch.equal(now.mass, offline.mass)


def test_streams_take_what_they_can():
    model = build("stream")
    with pytest.raises(ValueError, match="set model.scope=stream"):
        build().init_state(1)
    with pytest.raises(ShapeError, match="without padding"):
        model.step_features(features(2, 3, lengths=[3, 2]), model.init_state(2))
    with pytest.raises(ShapeError, match="a stream of 3 videos"):
        model.step_features(features(2, 3), model.init_state(3))


def test_codes_are_clusters():
    model, seen, most = build("vq", num_tokens=3), features(), 3
    with torch.no_grad():
        tokens = model.compress(seen)
        z = model.to_code(model.project(seen).patches.flatten(1, 2) / RMS)
        ids = model.quantizer(z).indices[..., 0]
    assert tokens.indices is not None and tokens.codebook_sizes == (12,) and tokens.source is not None
    for row in range(3):
        used, numbers = ids[row].unique(return_counts=True)
        largest = used[numbers.argsort(descending=True, stable=True)][:most]
        count = int(tokens.lengths[row])
        assert count == most < len(used) and set(tokens.indices[row, :count, 0].tolist()) <= set(used.tolist())
        top = numbers.sort(descending=True)[0]
        if top[most - 1] > top[most]:
            assert set(tokens.indices[row, :count, 0].tolist()) == set(largest.tolist())
        own = tokens.indices[row, tokens.source[row], 0]
        kept = torch.isin(ids[row], tokens.indices[row, :count, 0])
        assert torch.equal(own[kept], ids[row][kept])  # patches of kept codes stay, others go to the nearest kept
        codes = model.quantizer.codebook
        gap = torch.cdist(codes[ids[row]], codes[tokens.indices[row, :count, 0]])
        assert torch.equal(own, tokens.indices[row, gap.argmin(1), 0])


def test_autocast_and_half_weights_stay_finite():
    seen = features()
    for form in ("plain", "paper", "vq", "stream"):
        model = build(form)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert bool(model.compress(seen).embeddings.isfinite().all())
        if form != "vq":
            half = build(form).bfloat16()
            tokens = half.compress(replace(seen, patches=seen.patches.bfloat16()))
            assert tokens.embeddings.dtype == torch.bfloat16 and bool(tokens.embeddings.isfinite().all())


def test_training_on_one_clip_lowers_the_loss_and_a_copy_gives_the_same():
    model = build("fourier").train()
    seen, target = features(), torch.randn(3, 6, 8) * RMS
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        loss = (model.compress(seen).embeddings - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    again = build("fourier")
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again.compress(seen).embeddings, model.eval().compress(seen).embeddings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(scope="frames"), "model.scope='frames' is unknown; choose one of clip, blocks, stream"),
        (dict(metric="l1"), "model.metric='l1'"),
        (dict(order="size"), "model.order='size'"),
        (dict(num_tokens=0), "model.num_tokens=0 must be 1 or more"),
        (dict(tolerance=-1.0), "model.tolerance=-1.0"),
        (dict(num_tokens=4, adaptive=dict(criterion="elbow", min_tokens=5)), "min_tokens=5 is above"),
        (dict(adaptive=dict(criterion="gap")), "adaptive.criterion='gap'"),
        (dict(adaptive=dict(share=0.0)), "share=0.0"),
        (dict(codebook=QuantizerConfig(), adaptive=dict(criterion="elbow")), "set model.adaptive.criterion=none"),
        (
            dict(codebook=QuantizerConfig(), space="tower"),
            "model.space='tower' is of k-means, and model.codebook takes",
        ),
        (dict(codebook=QuantizerConfig(), seed=3), "model.seed=3 is of k-means"),
        (dict(codebook=QuantizerConfig(), tolerance=0.5), "model.tolerance=0.5 is of k-means"),
        (dict(scope="stream", codebook=QuantizerConfig()), "model.codebook needs all patches"),
        (dict(scope="stream", places=PlaceConfig(kind="fourier")), "model.places.kind needs all patches"),
        (dict(scope="stream", adaptive=dict(criterion="elbow")), "model.adaptive.criterion needs all patches"),
        (dict(places=dict(kind="xyz")), "places.kind='xyz'"),
        (dict(places=dict(mixer="mul")), "places.mixer='mul'"),
        (dict(places=dict(kind="none", mixer="attention")), "places.mixer=attention"),
        (dict(places=dict(bins=[1, 2])), r"places.bins=\[1, 2\]"),
        (dict(places=dict(mixer="attention", num_heads=3)), "places.num_heads=3 does not divide"),
        (dict(codebook=QuantizerConfig(name="rvq", codebook_size=8, dim=4)), "ids a patch, a cluster has one"),
    ],
)
def test_bad_settings_are_named(settings, message):
    made = dict(settings)
    with pytest.raises(ValueError, match=message):
        if isinstance(made.get("adaptive"), dict):
            made["adaptive"] = AdaptiveConfig(**made["adaptive"])
        if isinstance(made.get("places"), dict):
            made["places"] = PlaceConfig(**made["places"])
        Model(Config(**dict(in_dim=6, embedding_dim=8, embedding_rms=RMS) | made))


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> str:
    """A folder with a small real language model, weights at random."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import ByteLevelBPETokenizer

    made, folder = ByteLevelBPETokenizer(), str(tmp_path_factory.mktemp("llm"))
    made.train_from_iterator(["a red circle"] * 3, vocab_size=300, special_tokens=["<end>"], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="<end>")
    tokenizer.save_pretrained(folder)
    shape = dict(n_embd=8, n_layer=1, n_head=2, n_positions=96, vocab_size=len(tokenizer))
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, eos_token_id=0)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["plain", "paper", "vq"])
def test_a_frozen_language_model_teaches_it(form, language):
    """The family's objective: every parameter learns from the LLM's loss, and the codebook's own is part of it."""
    from vtok.llm import BudgetConfig, LLMConfig

    model = build(form).train()
    config = Objective.Config(llm=LLMConfig(name=language), budgets=BudgetConfig(law="uniform"), quantizer=0.5)
    objective = Objective(config, model.config)
    clip = Clip(["a", "b"], features={"tower": features(2, 3, lengths=[3, 1])}, text=["a red circle", "a circle"])
    loss = objective(model, clip, 0)
    loss.total.backward()
    assert bool(loss.total.isfinite()) and ("quantizer" in loss.report) == (form == "vq")
    if form == "vq":
        expected = loss.report["nll"] + loss.report["quantizer"]
        assert float(loss.total.detach()) == pytest.approx(float(expected)) and float(loss.report["quantizer"]) > 0
    assert all(p.grad is not None for p in model.parameters())
    assert not list(objective.parameters()) and all(p.grad is None for p in objective.llm.model.parameters())


@pytest.mark.parametrize("name", ["vqtoken", "tiny", "paper", "paper_tiny"])
def test_presets_build_what_they_say(name):
    from pathlib import Path

    from vtok.config import load

    path = Path(__file__).parent.parent / "configs" / "vqtoken" / f"{name}.yaml"
    config = load(path)
    model = config.model
    model.in_dim, model.embedding_dim, model.embedding_rms = 1152, 896, 0.02
    with torch.device("meta"):
        made = Model(model)
    assert made.max_tokens == {"vqtoken": 256, "tiny": 64, "paper": 32, "paper_tiny": 16}[name]
    if made.places.config.kind == "label_map":
        assert made.places.config.map_size[0] == config.data.num_frames
    if "tiny" not in name:
        count = sum(p.numel() for p in made.parameters()) / 1e6
        assert f"# Parameters: {count:.1f} M (in_dim 1152, embedding_dim 896)" in path.read_text(encoding="utf-8")
