"""Feature shards: what the loader gives from them is what the tower makes of the loader's videos, after any kill."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from miniature import clip, config, movie, photo, take, write_index, write_tar

from vtok import reducers
from vtok.data.feature_index import FeatureShardError
from vtok.data.health import TooManyBroken
from vtok.data.module import ClipDataModule
from vtok.data.pipeline import num_val_clips, training_batches, validation_batches
from vtok.data.view import View
from vtok.families import reducer
from vtok.features import record_features
from vtok.layers.projector import ProjectorConfig, ProjectorModel
from vtok.types import Clip, Features, Tokens
from vtok.vision import TowerConfig, load_tower

timm = pytest.importorskip("timm")
sys.path.append(str(Path(__file__).parents[1] / "data"))
from tiny_tower import write_tower  # noqa: E402

FRAMES = (24, 4, 9, 1, 30)  # of the clips, in turn: one image
FILE = "features.safetensors"
# what a run reads features with: no random crop
SEEN = {"crop": "center", "num_frames": 5, "fps": 12.0, "size": [17, 17]}  # 17: resized to so many, then cropped to 16


def corpus(folder: Path, shards: int = 2, first: int = 0) -> Path:
    counts = {}
    for s in range(first, first + shards):
        members = []
        for i, frames in enumerate(FRAMES):
            media = photo(40 * s) if frames == 1 else movie(30 * s + 10 * i, frames=frames)
            facts = {"caption": f"clip {s} {i}", "qa": [{"id": f"{s}{i}", "question": "what?", "answer": str(i)}]}
            members += clip(f"k{s}_{i}", media, "png" if frames == 1 else "mov", **facts, duration_s=frames / 12)
        counts[write_tar(folder / f"train-{s:06d}.tar", members).name] = len(FRAMES)
    write_index(folder, counts)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A corpus, a tower, and the tower's features of every frame and at 12 frames a second, made once."""
    root = tmp_path_factory.mktemp("features")
    corpus(root / "shards")
    write_tower(root / "tower", size=16, width=16, depth=2)
    for fps in (None, 12.0):
        run(root, root / f"at_{fps}", fps=fps)
    return root


def tower_config(home: Path, **changes) -> TowerConfig:
    return TowerConfig(**({"name": str(home / "tower"), "dtype": "bfloat16", "frames_per_call": 16} | changes))


def run(home: Path, out: Path, **keywords):
    settings = {"tower": tower_config(home), "workers": 0, "progress": False}
    return record_features(keywords.pop("shards", home / "shards"), out, **(settings | keywords))


def module(home: Path, folder: Path, *, tower=None, **changes) -> ClipDataModule:
    get = (lambda: tower) if tower is not None else (lambda: load_tower(tower_config(home)))
    return ClipDataModule(config(folder, **(SEEN | changes)), tower=get)


def same(cached: Features, live: Features) -> None:
    """Equal in every field. One call of a tower on more frames may round a sum otherwise: a last bit, rarely."""
    assert cached.grid == live.grid and cached.patches.dtype == live.patches.dtype == torch.bfloat16
    assert (cached.lengths is None) == (live.lengths is None)
    for name in ("times", "lengths"):
        if getattr(live, name) is not None:
            assert torch.equal(getattr(cached, name), getattr(live, name)), name
    for name in ("patches", "frame"):
        a, b = getattr(cached, name), getattr(live, name)
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-3)
            assert (a == b).float().mean() > 0.999


def pairs(home: Path, cached: Path, count: int, **changes):
    """(clip of features, clip of video) at the same place of two streams."""
    tower = load_tower(tower_config(home))
    from_features = module(home, cached, tower=tower, **changes)
    from_pixels = ClipDataModule(config(home / "shards", **(SEEN | changes)))
    loaders = [each.train_dataloader() for each in (from_features, from_pixels)]
    return tower, list(zip(*(take(loader, count) for loader in loaders), strict=True))


# ---- what is read is what would be seen


@pytest.mark.parametrize(
    ("recorded", "fps", "frames"),
    [(None, 12.0, 5), (None, 5.0, 4), (None, None, 5), (12.0, 12.0, 5), (12.0, 12.0, 40)],
)
def test_a_run_on_features_gets_what_a_run_on_pixels_computes(home, recorded, fps, frames):
    """The same clips, windows, texts and features, batch by batch."""
    tower, batches = pairs(home, home / f"at_{recorded}", 8, fps=fps, num_frames=frames)
    ragged = 0
    for cached, live in batches:
        assert cached.keys == live.keys and cached.text == live.text and cached.qa == live.qa
        assert cached.video is None and live.video is not None and cached.features is not None
        assert torch.equal(cached.times, live.times)
        assert (cached.lengths is None) == (live.lengths is None)
        if live.lengths is not None:
            assert torch.equal(cached.lengths, live.lengths)
            ragged += 1
        same(tower.features(cached), tower.features(live))
    assert ragged and len({tuple(live.times.flatten().tolist()) for _, live in batches}) > 4


def test_validation_is_the_same_too(home):
    tower = load_tower(tower_config(home))
    cached = module(home, home / "at_None", tower=tower, crop="random", fps=6.0).val_dataloader()
    live = ClipDataModule(config(home / "shards", **(SEEN | {"fps": 6.0}))).val_dataloader()
    batches = list(zip(cached, live, strict=True))
    assert [key for batch, _ in batches for key in batch.keys] == [f"k{s}_{i}" for s in range(2) for i in range(5)]
    for a, b in batches:
        assert torch.equal(a.times, b.times) and a.text == b.text
        same(tower.features(a), tower.features(b))
    assert num_val_clips(str(home / "at_None")) == 10


def test_middle_windows_alone(home, tmp_path):
    """--frames records what validation sees; windows of fewer frames are drawn inside it."""
    assert run(home, tmp_path / "t", frames=5, fps=6.0).frames == 2 * (5 + 2 + 5 + 1 + 5)
    tower, view = load_tower(tower_config(home)), View(num_frames=5, size=(17, 17), fps=6.0, crop="center")
    keywords = {"view": view, "batch_size": 4}
    found = list(validation_batches(str(tmp_path / "t"), **keywords))
    for a, b in zip(found, validation_batches(str(home / "shards"), **keywords), strict=True):
        assert torch.equal(a.times, b.times)
        same(tower.features(a), tower.features(b))
    (batch,) = take(training_batches(str(tmp_path / "t"), view=View(3, (17, 17), 6.0, "center"), batch_size=10), 1)
    middle = {key: times for clip in found for key, times in zip(clip.keys, clip.times.tolist())}
    for key, times in zip(batch.keys, batch.times):
        assert min(middle[key[2:]]) <= times.min() and times.max() <= max(middle[key[2:]]) + 1e-6
    with pytest.raises(FeatureShardError, match="6 frames of a clip is asked, 5 was recorded"):
        module(home, tmp_path / "t", num_frames=6, fps=6.0).train_dataloader()


@dataclass
class MeanConfig(ProjectorConfig):
    tower: TowerConfig = field(default_factory=TowerConfig)


class Mean(ProjectorModel):
    """Mean of the projected patches of a clip's real frames, to predict a number: enough to train on."""

    def forward(self, clip: Clip) -> torch.Tensor:
        found = self.project(self.features(clip))
        mask = found.mask[..., None, None].float()
        return (found.patches * mask).sum((1, 2)) / (mask.sum((1, 2)) * found.patches.shape[2])


def losses(home: Path, shards: Path, steps: int = 12) -> list[float]:
    torch.manual_seed(0)
    model = Mean(MeanConfig(16, 8, 1.0, tower_config(home)), load=load_tower)
    data = ClipDataModule(config(shards, **SEEN, batch_size=4), tower=lambda: model.tower)
    optimizer, out = torch.optim.Adam(model.parameters(), lr=0.01), []
    for batch in take(data.train_dataloader(), steps):
        goal = torch.tensor([[float(text.split()[2])] for text in batch.text])
        loss = (model(batch) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


def test_training_from_features_and_from_pixels_gives_the_same_loss(home):
    cached, live = losses(home, home / "at_12.0"), losses(home, home / "shards")
    assert cached == pytest.approx(live, rel=1e-3)
    assert min(live[-4:]) < live[0] and len(set(cached)) == len(cached)


def test_batches_are_padded_with_zeros(home):
    tower, ((cached, _), *_) = pairs(home, home / "at_12.0", 1, num_frames=40, batch_size=10)
    (found,) = cached.features.values()
    assert sorted(found.lengths.tolist()) == sorted(FRAMES * 2) and found.patches.shape[1] == 30
    assert not found.patches[~found.mask].any() and not found.frame[~found.mask].any()
    assert found.patches[found.mask].abs().sum(-1).min() > 0
    moved = cached.to("cpu")
    assert torch.equal(moved.features[tower.name].patches, found.patches)


def test_parts_of_one_kind_each(home):
    """Buckets: windows of videos, single frames of the same ones; a padded bucket keeps its length."""
    shards = home / "at_12.0"
    parts = {"shards": f"{shards}::{shards}", "part_frames": [5, 1], "weights": [1.0, 1.0]}
    batches = take(module(home, shards, **parts).train_dataloader(), 8)
    assert {batch.times.shape[1] for batch in batches} == {1, 5}
    for batch in batches:
        (found,) = batch.features.values()
        assert found.patches.shape[1] == batch.times.shape[1]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resume_is_exact(home, workers):
    def prints(batches):
        return [(b.keys, *(f.patches.sum().item() for f in b.features.values())) for b in batches]

    first = module(home, home / "at_12.0", num_workers=workers)
    loader, whole = iter(first.train_dataloader()), []
    for step in range(9):
        whole.append(next(loader))
        first.advance(whole[-1])
        if step == 3:
            state = json.loads(json.dumps(first.state_dict()))
    second = module(home, home / "at_12.0", num_workers=workers)
    second.load_state_dict(state)
    assert prints(take(second.train_dataloader(), 5)) == prints(whole[4:])
    with pytest.raises(ValueError, match="the shards under data.shards"):
        ClipDataModule(config(home / "shards", **SEEN, num_workers=workers)).load_state_dict(state)


# ---- video towers


@pytest.fixture(scope="module")
def film_tower(tmp_path_factory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("videomae")
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    model = transformers.VideoMAEModel(transformers.VideoMAEConfig(**small, patch_size=16, num_frames=4))
    model.save_pretrained(folder)
    shape = {"height": 32, "width": 32}
    transformers.VideoMAEVideoProcessor(size=shape, crop_size=shape).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_video_towers_keep_their_windows(home, film_tower, tmp_path):
    """Frames are seen 4 at once: a window of features begins where one of these does, and is what is seen live."""
    settings = {"name": str(film_tower), "dtype": "bfloat16", "frames_per_call": 8}
    run(home, tmp_path / "t", tower=TowerConfig(**settings), fps=12.0)
    tower = load_tower(TowerConfig(**settings))
    seen = {"num_frames": 8, "size": [32, 32]}
    batches = take(module(home, tmp_path / "t", tower=tower, **seen, batch_size=5).train_dataloader(), 4)
    whole = View(num_frames=40, size=(32, 32), fps=12.0, crop="center")
    videos = {
        k: v for c in validation_batches(str(home / "shards"), view=whole, batch_size=1) for k, v in [(*c.keys, c)]
    }
    starts = set()
    for batch in batches:
        found = batch.features[tower.name]
        for row, key in enumerate(batch.keys):
            live, count = videos[key[2:]], int(batch.lengths[row]) if batch.lengths is not None else 8
            first = round(float(batch.times[row, 0]) * 12)
            starts.add(first)
            asked = tower(live.video[:, :, first : first + count], times=live.times[:, first : first + count])
            steps = -(-count // 2)
            assert torch.equal(found.patches[row, :steps], asked.patches[0])
            assert torch.allclose(found.times[row, :steps], asked.times[0], atol=1e-6)
            assert found.lengths is None or int(found.lengths[row]) == steps
    assert {s % 4 for s in starts} == {0} and len(starts) > 3
    with pytest.raises(FeatureShardError, match="num_frames=6 is no multiple of the 4 frames"):
        take(module(home, tmp_path / "t", tower=tower, **(seen | {"num_frames": 6})).train_dataloader(), 2)
    with pytest.raises(FeatureShardError, match=r"data.fps=6.0 is asked, 12.0 \(frames are seen 4 at once\)"):
        module(home, tmp_path / "t", tower=tower, **seen, fps=6.0).train_dataloader()


# ---- the files


def test_attention_and_keys_where_asked(home, tmp_path):
    asked = {"attention": (0, -1), "attention_from": "cls", "keys": True}
    run(home, tmp_path / "t", fps=12.0, **asked)
    tower = load_tower(tower_config(home))
    view = View(num_frames=40, size=(17, 17), fps=12.0, crop="center")
    for cached, live in zip(
        *(validation_batches(str(s), view=view, batch_size=1) for s in (tmp_path / "t", home / "shards"))
    ):
        found, wanted = cached.features[tower.name], tower.features(live, **asked)
        assert list(found.attention) == list(wanted.attention) == [0, 1] and found.attention_from == "cls"
        assert found.attention[1].dtype == torch.float32
        for layer in (0, 1):
            torch.testing.assert_close(found.attention[layer], wanted.attention[layer], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(found.keys, wanted.keys, rtol=1e-2, atol=1e-2)
    shape = dict(tower=tower_config(home), in_dim=16, embedding_dim=8, embedding_rms=1.0)

    def asks(layers: list[int], source: str = "cls", method: str = "visionzip") -> Tokens:
        told = dict(method=method, attention_layers=layers, attention_from=source, max_tokens=64)
        torch.manual_seed(0)
        return reducer.Model(reducer.Config(**shape, **told)).eval().encode(cached, budget=3)

    assert torch.equal(asks([-1]).source, asks([1]).source)
    assert torch.equal(asks([-1, 0], method="hiprune").source, asks([1, -2], method="hiprune").source)
    zero, one = (replace(found, attention={layer: found.attention[layer]}) for layer in (0, 1))
    for layer, only in ((0, zero), (1, one)):
        want = reducers.build("visionzip")(only, budget=3)
        assert torch.equal(asks([layer]).source, want.source), "of the layer that is asked"
    cached.features[tower.name] = zero
    with pytest.raises(ValueError, match=r"attention of layers \[0\] from cls, asked for is that of \[1\] from cls"):
        asks([-1])
    with pytest.raises(ValueError, match=r"asked for is that of \[0\] from all: record it .*--attention-from all"):
        asks([0], "all")
    with pytest.raises(ValueError, match="layer=-3 is out of range"):
        asks([-3])


# ---- other towers, other frames


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_half_precision_on_a_cpu_is_told_to_be_slow(home, tmp_path, caplog, dtype):
    run(home, tmp_path / "t", fps=2.0, tower=tower_config(home, dtype=dtype))
    told = [message for message in caplog.messages if "on a CPU" in message]
    assert len(told) == (dtype == "bfloat16") and all("works in bfloat16" in message for message in told)


def test_another_towers_features_are_refused(home, tmp_path):
    write_tower(tmp_path / "other", size=16, width=16, depth=2, seed=1)
    for changes, message in (
        ({"name": str(tmp_path / "other")}, rf"features of '{home / 'tower'}', the model has .*other': sha256"),
        ({"layer": 0}, "layer 1 and 0"),
        ({"dtype": "float32"}, "dtype 'bfloat16' and 'float32'"),
        ({"size": [24, 24]}, "preprocess"),
    ):
        tower = load_tower(tower_config(home, **changes))
        with pytest.raises(FeatureShardError, match=message):
            module(home, home / "at_12.0", tower=tower).train_dataloader()
        with pytest.raises(FeatureShardError, match="data.val_shards=.*" + message):
            module(home, home / "at_12.0", tower=tower, shards=str(home / "shards")).val_dataloader()


def test_the_same_weights_may_have_another_name(home, tmp_path):
    shutil.copytree(home / "tower", tmp_path / "copy")
    tower = load_tower(tower_config(home, name=str(tmp_path / "copy")))
    (batch,) = take(module(home, home / "at_12.0", tower=tower).train_dataloader(), 1)
    assert list(batch.features) == [str(tmp_path / "copy")] and tower.features(batch) is batch.features[tower.name]
    (batch,) = take(ClipDataModule(config(home / "at_12.0", **SEEN)).train_dataloader(), 1)
    assert list(batch.features) == [str(home / "tower")], "the recorded name, where no model is known"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": [24, 16]}, r"data.size=\[24, 16\] is asked, \[17, 17\] was recorded"),
        ({"crop": "random"}, "data.crop=random is asked, center was recorded"),
        ({"hflip": 0.5}, "data.hflip=0.5"),
        ({"fps": 24.0}, "data.fps=24.0 is asked, 12.0 or less was recorded"),
        ({"fps": None}, "data.fps=null"),
        ({"size_scales": [1.0, 2.0]}, "data.size_scales"),
        ({"map": "npy"}, "data.map='npy'"),
    ],
)
def test_frames_that_were_not_recorded_are_refused(home, changes, message):
    with pytest.raises(FeatureShardError, match=message):
        module(home, home / "at_12.0", **changes).train_dataloader()


def test_parts_that_do_not_belong_together(home, tmp_path):
    both = f"{home / 'at_12.0'}::{home / 'shards'}"
    with pytest.raises(FeatureShardError, match="holds no features, other parts do"):
        module(home, home, shards=both).train_dataloader()
    with pytest.raises(FeatureShardError, match="with the same settings"):
        module(home, home, shards=f"{home / 'at_12.0'}::{home / 'at_None'}").train_dataloader()
    run(home, tmp_path / "t", tower=tower_config(home, layer=0), fps=12.0)
    with pytest.raises(FeatureShardError, match="layer 0 and 1"):
        module(home, home, shards=f"{home / 'at_12.0'}::{tmp_path / 't'}").train_dataloader()


def test_damaged_features_are_left_out_as_broken_videos_are(home, tmp_path):
    """A flipped bit in a window that is read, a header that lies, a file that is cut."""
    shutil.copytree(home / "at_12.0", tmp_path / "t")
    path = tmp_path / "t" / "train-000000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = {member.name: member for member in tar.getmembers()}
    data[at[f"k0_1.{FILE}"].offset_data + at[f"k0_1.{FILE}"].size - 3] ^= 4
    data[at[f"k0_2.{FILE}"].offset_data + 3] ^= 255
    place = data.index(b'"BF16"', at[f"k0_4.{FILE}"].offset_data)
    data[place : place + 6] = b'"F32" '
    path.write_bytes(bytes(data))
    other = tmp_path / "t" / "train-000001.tar"
    data = bytearray(other.read_bytes())
    place = data.index(b'"end_s":"1.9') + len('"end_s":"')
    data[place : place + 2] = b"-1"
    other.write_bytes(bytes(data))
    keywords = {"max_bad_fraction": 0.9, "num_frames": 40, "batch_size": 4}
    batches = module(home, tmp_path / "t", **keywords)
    batches._quarantine = tmp_path / "q.jsonl"
    seen = {key.partition(":")[2] for batch in take(batches.train_dataloader(), 6) for key in batch.keys}
    assert seen == {"k0_0", "k0_3", *(f"k1_{i}" for i in range(1, 5))}
    lines = {
        (line := json.loads(text))["key"]: line["reason"] for text in (tmp_path / "q.jsonl").read_text().splitlines()
    }
    assert set(lines) == {"k0_1", "k0_2", "k0_4", "k1_0"} and "checksum" in lines["k0_1"]
    assert all("vtok features" in reason for reason in lines.values())
    strict = module(home, tmp_path / "t", **(keywords | {"max_bad_fraction": 0.0}))
    with pytest.raises(TooManyBroken):
        take(strict.train_dataloader(), 6)
    index = json.loads((tmp_path / "t" / "index.json").read_text())
    (tmp_path / "t" / "index.json").write_text(json.dumps({**index, "tower": {}}))
    with pytest.raises(FeatureShardError, match="does not say what its features are"):
        module(home, tmp_path / "t").train_dataloader()
