"""Sound: frozen audio towers, their features in a cache and from a window's wav, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import clip, config, movie, take, write_index, write_tar

from vtok import features as recording
from vtok.data.audio import WavFile, frame_spans
from vtok.data.decode import DecodeError
from vtok.data.feature_index import FeatureShardError
from vtok.data.module import ClipDataModule
from vtok.data.pipeline import validation_batches
from vtok.data.view import View
from vtok.families.temporal import AudioConfig, Config, Model
from vtok.features import record_features
from vtok.layers.dynamic_context import FormerConfig, StaticConfig
from vtok.types import Clip, Sound, means_over
from vtok.vision import AudioTower, AudioTowerConfig, TowerConfig, audio_width, load_audio_tower, load_tower

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
import sys  # noqa: E402

sys.path.append(str(Path(__file__).parents[1] / "data"))
from tiny_tower import write_tower  # noqa: E402

torch.set_num_threads(1)
RATE = 16000
WIDTH = 16
SMALL = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
WAVES = dict(conv_dim=(8, 8), conv_kernel=(400, 4), conv_stride=(160, 2), num_conv_pos_embeddings=8)
KINDS = ("whisper", "ast", "wav2vec2", "wavlm")


def write_audio_tower(folder: Path, kind: str, **changes) -> str:
    """A small audio tower of random weights, as save_pretrained writes it."""
    t = transformers
    torch.manual_seed(0)
    if kind == "whisper":  # hears one second, 50 vectors
        facts = t.WhisperConfig(
            d_model=WIDTH, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=50, num_mel_bins=16, vocab_size=60,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **changes,
        )  # fmt: skip
        model, extractor = t.WhisperModel(facts), t.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    elif kind == "ast":  # 1.04 s, 10 vectors
        facts = t.ASTConfig(**SMALL, max_length=106, num_mel_bins=32, patch_size=16)
        model, extractor = t.ASTModel(facts), t.ASTFeatureExtractor(max_length=106, num_mel_bins=32)
    else:  # any length, 50 vectors a second
        made = {"wav2vec2": (t.Wav2Vec2Config, t.Wav2Vec2Model), "wavlm": (t.WavLMConfig, t.WavLMModel)}[kind]
        facts = made[0](**SMALL, **WAVES, num_conv_pos_embedding_groups=4)
        model, extractor = made[1](facts), t.Wav2Vec2FeatureExtractor(return_attention_mask=kind == "wavlm")
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("audio_towers")
    return {kind: write_audio_tower(root / kind, kind) for kind in KINDS}


def tone(seconds: float, hertz: float = 440.0, *, rate: int = RATE, level: float = 0.3) -> np.ndarray:
    at = np.arange(round(seconds * rate)) / rate
    return np.rint(32767 * level * np.sin(2 * np.pi * (hertz + 40 * at) * at)).astype("<i2")


def wav(samples: np.ndarray, *, rate: int = RATE, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


# ---- the towers


@pytest.mark.parametrize("kind", KINDS)
def test_every_tower_hears_as_its_own_library_does(towers, kind):
    """The first chunk's vectors are those of the library's model on its own feature extractor's output."""
    config = AudioTowerConfig(name=towers[kind], tokens=5, chunk_s=0.0 if kind in ("whisper", "ast") else 1.0)
    tower = load_audio_tower(config)
    assert tower.embedding_dim == audio_width(config) == WIDTH and tower.rate == RATE
    assert not any(p.requires_grad for p in tower.model.parameters()) and not tower.model.training
    sound = torch.from_numpy(tone(2.5))
    (found,) = tower.sequences([sound])
    assert found.shape == (-(-len(sound) // tower.step), WIDTH) and found.isfinite().all()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(towers[kind])
    model = transformers.AutoModel.from_pretrained(towers[kind]).eval()
    first = (sound[: tower.chunk].float() / 32768).numpy()
    given = extractor(first, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        if kind == "whisper":
            wanted = model.encoder(given["input_features"]).last_hidden_state[0]
        else:
            wanted = model(given["input_values"]).last_hidden_state[0]
    if kind == "ast":
        wanted = wanted[2:].unflatten(0, (-1, 10)).mean(0)
    own = tower.chunk // tower.step
    assert own == {"ast": 10}.get(kind, 50) and own - 2 <= len(wanted) <= own
    torch.testing.assert_close(found[: len(wanted)], wanted, rtol=1e-4, atol=1e-5)
    assert (found[len(wanted) : own] == found[len(wanted) - 1]).all(), "the last vector stands for those that lack"


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_ragged_sounds_is_each_by_itself(towers, kind):
    """Chunks are heard alone: neither other clips nor what comes later in the clip change a vector."""
    tower = load_audio_tower(AudioTowerConfig(name=towers[kind], tokens=3, chunk_s=0.8, chunks_per_call=3))
    sounds = [torch.from_numpy(tone(s, h)) for s, h in ((2.3, 300.0), (0.01, 500.0), (1.7, 900.0))]
    sounds.insert(1, torch.zeros(0, dtype=torch.int16))
    together = tower.sequences(sounds)
    assert [len(each) for each in together] == [-(-len(sound) // tower.step) for sound in sounds]
    for sound, vectors in zip(sounds, together):
        torch.testing.assert_close(tower.sequences([sound])[0], vectors, rtol=1e-4, atol=1e-5)
    (later,) = tower.sequences([sounds[0][2 * tower.chunk :]])
    torch.testing.assert_close(later, together[0][2 * tower.chunk // tower.step :], rtol=1e-4, atol=1e-5)


def test_features_lie_on_the_frames(towers):
    """Token j of frame t is the mean of the vectors of its part of the frame's time; without a sound, marked zeros."""
    tower = load_audio_tower(AudioTowerConfig(name=towers["whisper"], tokens=2, dtype="bfloat16"))
    samples = torch.zeros(2, 2 * RATE, dtype=torch.int16)
    samples[0] = torch.from_numpy(tone(2.0))
    spans = frame_spans(torch.arange(4).double() / 4 + 0.5, fps=4.0, rate=RATE).repeat(2, 1, 1)
    sound = Sound(samples, torch.tensor([round(1.3 * RATE), 0]), spans, RATE)
    found = tower(sound, torch.tensor([4, 3]), times=torch.rand(2, 4))
    assert found.patches.shape == (2, 4, 2, WIDTH) and found.grid == (1, 2) and found.patches.dtype == torch.bfloat16
    (vectors,) = tower.sequences([samples[0, : round(1.3 * RATE)]])
    for frame in range(4):
        for part in range(2):
            begin = 0.5 + frame / 4 + part / 8  # seconds; 50 vectors a second, 6.25 a part
            at = torch.arange(len(vectors)) / 50
            weight = (torch.minimum(at + 0.02, torch.tensor(begin + 0.125)) - at.clamp(min=begin)).clamp(min=0).double()
            wanted = (weight[:, None] * vectors.double()).sum(0) / weight.sum().clamp(min=1e-9)
            torch.testing.assert_close(found.patches[0, frame, part].double(), wanted, rtol=2**-8, atol=1e-3)
    assert found.frame is not None
    assert found.frame[0, :, 0].tolist() == pytest.approx([1, 1, 1, 0.2], abs=1e-5) and not found.frame[1].any()
    assert not found.patches[1].any() and found.patches[0, :3].any(-1).all()


def test_a_tower_is_a_reference(towers):
    first = load_audio_tower(AudioTowerConfig(name=towers["wavlm"]))
    again = pickle.loads(pickle.dumps(first))
    assert isinstance(again, AudioTower) and again.identity() == first.identity() and len(pickle.dumps(first)) < 2000
    with pytest.raises(ValueError, match="is expected, but .* other weights"):
        load_audio_tower(AudioTowerConfig(name=towers["wavlm"], sha256="0" * 64))
    inner = load_audio_tower(AudioTowerConfig(name=towers["wavlm"], layer=0))
    sound = torch.from_numpy(tone(0.5))
    assert not torch.allclose(inner.sequences([sound])[0], first.sequences([sound])[0], atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("whisper", dict(chunk_s=2.0), "hears 1 s at once"),
        ("whisper", dict(pool=60), "audio.pool=60 is more than the 50 vectors of a chunk"),
        ("whisper", dict(layer=2), "layer=2 is out of range"),
        ("whisper", dict(dtype="int8"), "audio.dtype='int8' is unknown"),
        ("whisper", dict(tokens=0), "audio.tokens=0 must be at least 1"),
        ("whisper", dict(name="ears"), "is no folder here and names no audio tower"),
    ],
)
def test_what_cannot_be_heard(towers, kind, changes, message):
    with pytest.raises(ValueError, match=message):
        load_audio_tower(AudioTowerConfig(**{"name": towers[kind]} | changes))


def test_other_networks_are_refused(towers, tmp_path):
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a vit; the audio towers read here are whisper"):
        load_audio_tower(AudioTowerConfig(name=str(tmp_path)))
    tower = load_audio_tower(AudioTowerConfig(name=towers["ast"]))
    empty = torch.zeros(1, 0, dtype=torch.int16)
    with pytest.raises(ValueError, match="hears sound at 16000 Hz, this one is at 8000 Hz"):
        tower(Sound(empty, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, 2, dtype=torch.int64), 8000))


# ---- means over time, wav files


@given(
    steps=st.integers(0, 7), parts=st.integers(1, 4),
    spans=st.lists(st.tuples(st.floats(-2, 9), st.floats(0.01, 4)), min_size=1, max_size=4),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_means_over_is_the_integral(steps, parts, spans):
    values = torch.randn(steps, 3, dtype=torch.float64)
    edges = torch.tensor([[a, a + d] for a, d in spans], dtype=torch.float64)
    means, share = means_over(values, edges, parts)
    for row, (begin, length) in enumerate(spans):
        inside = 0.0
        for part in range(parts):
            low, high = begin + length * part / parts, begin + length * (part + 1) / parts
            weights = torch.tensor(
                [max(0.0, min(high, i + 1) - max(low, i)) for i in range(steps)], dtype=torch.float64
            )
            inside += float(weights.sum())
            if float(weights.sum()) > 1e-6:
                wanted = (weights[:, None] * values).sum(0) / weights.sum()
                torch.testing.assert_close(means[row, part], wanted, rtol=1e-4, atol=1e-5)
        assert float(share[row]) == pytest.approx(inside / length, abs=1e-5)


def wav_file(data: bytes, **how) -> WavFile:
    return WavFile(lambda first, count: data[first : first + count], len(data), **how)


def test_wav_files_chunk_by_chunk():
    mono = tone(1.0)
    whole = wav_file(wav(mono), rate=RATE, chunk=3000)
    assert whole.total == len(mono) and np.array_equal(whole.chunks(0, 99).numpy(), mono)
    assert np.array_equal(whole.chunks(2, 4).numpy(), mono[6000:12000]) and len(whole.chunks(6, 9)) == 0
    stereo = np.stack([mono, np.zeros_like(mono)], 1)
    half = wav_file(wav(stereo, channels=2), rate=RATE, chunk=3000).chunks(0, 9).numpy()
    assert np.abs(half.astype(int) - mono / 2).max() <= 1
    other = wav_file(wav(tone(1.0, rate=24000), rate=24000), rate=RATE, chunk=4000)
    found = other.chunks(0, 4)
    assert len(found) == other.total == RATE
    assert np.abs(found.numpy().astype(int) - mono)[300:-300].mean() < 800, "the same tone, but for the seams"
    assert torch.equal(other.chunks(2, 3), found[8000:12000])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"RIFFxxxxWAVE", "tells no samples"),
        (b"OggS" + bytes(40), "is no wav file"),
        (wav(tone(0.1))[:-100], "is cut short"),
        (wav(tone(0.1))[:34] + b"\x08\x00" + wav(tone(0.1))[36:], "of 8 bits.*16-bit PCM is read"),
    ],
)
def test_damaged_wav_files_say_so(data, message):
    with pytest.raises(DecodeError, match=message):
        wav_file(data, rate=RATE, chunk=3000)


def test_a_frame_is_on_show_until_the_next():
    times = torch.tensor([0.0, 0.1, 0.4], dtype=torch.float64)
    assert frame_spans(times, fps=None, rate=100).tolist() == [[0, 10], [10, 40], [40, 70]]
    assert frame_spans(times, fps=5.0, rate=100).tolist() == [[0, 20], [10, 30], [40, 60]]
    assert frame_spans(times[:1], fps=None, rate=100).tolist() == [[0, 100]]


# ---- cached and live: the same values, windows and losses

SEEN = {"crop": "center", "num_frames": 5, "fps": 12.0, "size": [17, 17]}  # 17: what the tower resizes frames to
FRAMES = (24, 9, 30, 18)  # of the clips, in turn; the third has no sound, the fourth's is shorter than its frames


def corpus(folder: Path, shards: int = 2, *, sound: bool = True, rate: int = RATE) -> Path:
    counts = {}
    for s in range(shards):
        members = []
        for i, frames in enumerate(FRAMES):
            key = f"k{s}_{i}"
            members += clip(key, movie(30 * s + 10 * i, frames=frames), caption=f"clip {s} {i}")
            if sound and i != 2:
                seconds = frames / 12 * (0.6 if i == 3 else 1.0)
                members.append((f"{key}.wav", wav(tone(seconds, 200 + 300 * i + 100 * s, rate=rate), rate=rate)))
        counts[write_tar(folder / f"train-{s:06d}.tar", members).name] = len(FRAMES)
    write_index(folder, counts)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory, towers) -> Path:
    root = tmp_path_factory.mktemp("sound")
    corpus(root / "shards")
    write_tower(root / "tower", size=16, width=16, depth=2)
    for kind in ("whisper", "wavlm"):
        record(root, towers[kind], root / kind)
    return root


def ears(name: str, **changes) -> AudioTowerConfig:
    return AudioTowerConfig(**{"name": name, "tokens": 3, "dtype": "bfloat16", "chunk_s": 0.7} | changes)


def sees(home: Path) -> TowerConfig:
    return TowerConfig(name=str(home / "tower"), dtype="bfloat16", frames_per_call=16)


def record(home: Path, name: str, out: Path, **changes):
    how = {"shards": home / "shards", "fps": 12.0, "workers": 0, "progress": False, "audio": ears(name)} | changes
    return record_features(how.pop("shards"), out, tower=sees(home), **how)


def module(home: Path, folder: Path, heard: AudioTower, **changes) -> ClipDataModule:
    return ClipDataModule(config(folder, **SEEN | changes), tower=lambda: load_tower(sees(home)), audio=lambda: heard)


@pytest.mark.parametrize(("kind", "fps", "frames"), [("whisper", 12.0, 5), ("wavlm", 5.0, 4), ("whisper", 12.0, 40)])
def test_what_is_cached_is_what_is_heard_live(home, towers, kind, fps, frames):
    """At other rates than the recorded one too, since a cache keeps the tower's own steps of time."""
    heard, changes = load_audio_tower(ears(towers[kind])), dict(fps=fps, num_frames=frames)
    cached, live = (module(home, home / name, heard, **changes) for name in (kind, "shards"))
    silent = ragged = 0
    for a, b in zip(take(cached.train_dataloader(), 6), take(live.train_dataloader(), 6), strict=True):
        assert a.keys == b.keys and torch.equal(a.times, b.times) and a.video is None and a.sound is None
        assert b.sound is not None and b.features is None and set(a.features) == {str(home / "tower"), heard.name}
        found, wanted = a.features[heard.name], heard.features(b)
        assert found.patches.shape == wanted.patches.shape == (3, a.times.shape[1], 3, WIDTH)
        assert found.grid == wanted.grid == (1, 3) and found.patches.dtype == wanted.patches.dtype == torch.bfloat16
        assert torch.equal(found.times, wanted.times) and (found.lengths is None) == (wanted.lengths is None)
        if found.lengths is not None:
            assert torch.equal(found.lengths, wanted.lengths)
            ragged += 1
        torch.testing.assert_close(found.frame, wanted.frame, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.patches, wanted.patches, rtol=2**-7, atol=2e-3)
        for row, key in enumerate(a.keys):
            if key.endswith("_2"):
                assert not found.patches[row].any() and not found.frame[row].any()
                silent += 1
            elif not key.endswith("_3"):  # whose sound may end before the window begins
                assert found.patches[row].any()
    assert silent and (ragged or frames < 40)


def test_validation_hears_the_middle_window(home, towers, tmp_path):
    """And a cache of middle windows alone has it."""
    heard = load_audio_tower(ears(towers["whisper"]))
    done = record(home, towers["whisper"], tmp_path / "middle", frames=5)
    assert done.heard == 6
    loaders = [
        module(home, f, heard).val_dataloader() for f in (home / "whisper", tmp_path / "middle", home / "shards")
    ]
    for a, b, live in zip(*loaders, strict=True):
        wanted = heard.features(live)
        for found in (a, b):
            torch.testing.assert_close(found.features[heard.name].patches, wanted.patches, rtol=2**-7, atol=2e-3)


def temporal(home: Path, name: str, **changes) -> Model:
    audio = AudioConfig(**vars(ears(name)) | {"in_dim": WIDTH} | changes)
    shape = dict(in_dim=16, embedding_dim=8, embedding_rms=1.0, max_tokens=12, window=3)
    former = FormerConfig(num_queries=2, width=16, depth=1, num_heads=2)
    torch.manual_seed(0)
    return Model(Config(**shape, tower=sees(home), audio=audio, static=StaticConfig("pool", 2), former=former))


def losses(home: Path, folder: Path, name: str, steps: int = 10) -> list[float]:
    model = temporal(home, name)
    data = ClipDataModule(config(folder, **SEEN), tower=lambda: model.tower, audio=lambda: model.ears)
    optimizer, out = torch.optim.Adam(model.parameters(), lr=0.01), []
    for batch in take(data.train_dataloader(), steps):
        tokens = model.encode(batch, budget=8)
        goal = torch.tensor([float(text.split()[2]) for text in batch.text])
        loss = (tokens.embeddings.mean((1, 2)) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


def test_training_from_a_cache_and_from_pixels_gives_the_same_loss(home, towers):
    cached, live = (losses(home, home / folder, towers["whisper"]) for folder in ("whisper", "shards"))
    assert cached == pytest.approx(live, rel=5e-3) and len(set(live)) == len(live)


def test_sound_matters_and_towers_learn_nothing(home, towers):
    model = temporal(home, towers["whisper"])
    batch = take(module(home, home / "shards", model.ears).train_dataloader(), 1)[0]
    before = [p.clone() for p in model.ears.model.parameters()]
    tokens = model.encode(batch)
    tokens.embeddings.square().mean().backward()
    assert model.audio.weight.grad is not None and model.audio.weight.grad.any()
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.ears.model.parameters()))
    assert not any("ears" in name for name in model.state_dict())
    quiet = replace(batch, sound=replace(batch.sound, samples=batch.sound.samples // 50))
    assert not torch.allclose(model.encode(quiet).embeddings, tokens.embeddings, atol=1e-4)


def test_a_clip_is_moved_cut_and_pinned_with_its_sound(home, towers):
    heard = load_audio_tower(ears(towers["whisper"]))
    batch = take(module(home, home / "shards", heard).train_dataloader(), 1)[0]
    part = batch.rows(slice(1, 3))
    assert isinstance(part, Clip) and part.sound.samples.shape[0] == 2 and part.sound.rate == RATE
    torch.testing.assert_close(heard.features(part).patches, heard.features(batch).patches[1:3], rtol=2**-7, atol=2e-3)
    with pytest.raises(ValueError, match="Clip.sound has 2 entries for 1 keys"):
        Clip(["a"], sound=part.sound)


def test_sound_at_another_rate_is_resampled_alike(home, towers, tmp_path):
    """Chunk by chunk, so a window's sound is the recorded one's."""
    corpus(tmp_path / "shards", shards=1, rate=24000)
    heard = load_audio_tower(ears(towers["wavlm"]))
    record(home, towers["wavlm"], tmp_path / "t", shards=tmp_path / "shards")
    loaders = [module(home, tmp_path / name, heard).val_dataloader() for name in ("t", "shards")]
    for cached, live in zip(*loaders, strict=True):
        wanted = heard.features(live).patches
        torch.testing.assert_close(cached.features[heard.name].patches, wanted, rtol=2**-7, atol=2e-3)


# ---- the files, and what is refused


def test_the_files_are_as_documented(home, towers):
    safetensors = pytest.importorskip("safetensors")
    index = json.loads((home / "whisper" / "index.json").read_text())
    heard = load_audio_tower(ears(towers["whisper"]))
    assert index["audio"] == {**heard.identity(), "tokens": 3, "rate": RATE, "step": 320, "width": WIDTH}
    assert index["heard"] == 6 and index["shards"][0]["heard"] == 3
    with tarfile.open(home / "whisper" / "train-000000.tar") as tar:
        kinds = ("features.safetensors", "audio.safetensors", "json")
        assert tar.getnames() == [f"k0_{i}.{k}" for i in range(4) for k in kinds if (i, k[0]) != (2, "a")]
        tar.extract("k0_0.audio.safetensors", home / "out", filter="data")
    with safetensors.safe_open(home / "out" / "k0_0.audio.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
    assert set(found) == {"seconds", "crc32", "patches"} and found["patches"].shape == (100, 1, WIDTH)
    assert found["patches"].dtype == torch.bfloat16 and float(found["seconds"][-1]) == pytest.approx(1.98)


def test_a_loader_without_a_model_gives_all_that_was_recorded(home, towers):
    view = View(num_frames=5, size=(17, 17), fps=12.0, crop="center")
    batch = next(iter(validation_batches(str(home / "whisper"), view=view, batch_size=3)))
    assert batch.features[towers["whisper"]].patches.shape == (3, 5, 3, WIDTH)


def test_a_model_without_ears_reads_the_same_shards(home):
    data = ClipDataModule(config(home / "whisper", **SEEN), tower=lambda: load_tower(sees(home)), audio=lambda: None)
    assert list(take(data.train_dataloader(), 1)[0].features) == [str(home / "tower")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layer=0), "layer 1 and 0"),
        (dict(dtype="float32"), "dtype 'bfloat16' and 'float32'"),
        (dict(chunk_s=0.5), "chunk 11200 and 8000"),
        (dict(pool=2), "pool 1 and 2"),
    ],
)
def test_another_audio_tower_is_refused(home, towers, changes, message):
    heard = load_audio_tower(ears(towers["whisper"], **changes))
    with pytest.raises(FeatureShardError, match=f"the model has the audio tower .*{message}.*set the tower, its layer"):
        module(home, home / "whisper", heard).train_dataloader()


def test_shards_without_sound_are_refused(home, towers, tmp_path):
    corpus(tmp_path / "mute", shards=1, sound=False)
    heard = load_audio_tower(ears(towers["whisper"]))
    with pytest.raises(ValueError, match="no clip in train-000000.tar has a .wav, which model.audio.name=.* needs"):
        module(home, tmp_path / "mute", heard).train_dataloader()
    with pytest.raises(
        ValueError, match="has a .wav, which --audio-tower needs: pack the videos with `vtok shards --au"
    ):
        record(home, towers["whisper"], tmp_path / "t", shards=tmp_path / "mute")
    assert record(home, "", tmp_path / "t", shards=tmp_path / "mute", audio=None).heard == 0
    with pytest.raises(FeatureShardError, match="holds no features of sound .*--audio-tower on shards made with"):
        module(home, tmp_path / "t", heard).train_dataloader()
    with pytest.raises(ValueError, match="audio"):
        record(home, towers["whisper"], tmp_path / "t")


def test_damaged_sound_is_a_broken_sample(home, towers, tmp_path):
    heard = load_audio_tower(ears(towers["whisper"]))
    members = [m for i in range(3) for m in clip(f"a{i}", movie(10 * i), caption="x")]
    members += [("b.mov", movie(40)), ("b.wav", wav(tone(2.0))[:-9]), ("b.json", b"{}")]
    members[2:2] = [("a0.wav", wav(tone(2.0)))]
    write_index(tmp_path, {write_tar(tmp_path / "train-000000.tar", members).name: 4})
    data = module(home, tmp_path, heard, max_bad_fraction=0.9)
    assert [key for batch in data.val_dataloader() for key in batch.keys] == ["a0", "a1", "a2"]
    done = record(home, towers["whisper"], tmp_path / "out", shards=tmp_path, max_bad_fraction=0.9)
    assert [(r["key"], "cut short" in r["reason"]) for r in done.rejected] == [("b", True)] and done.heard == 1


def test_the_command(home, towers, tmp_path, capsys):
    arguments = [str(home / "shards"), "--tower", str(home / "tower"), "--fps", "12", "--frames-per-call", "16"]
    arguments += ["--workers", "0", "--audio-tower", towers["whisper"], "--audio-chunk", "0.7"]
    assert recording.main([*arguments, "--out", str(tmp_path / "t"), "--quiet"]) == 0
    assert "sound: 6 clips have one; a model reads it with model.audio.dtype=bfloat16" in capsys.readouterr().out
    tars = [(folder / "train-000001.tar").read_bytes() for folder in (tmp_path / "t", home / "whisper")]
    assert tars[0] == tars[1], "as of a call from Python, and again the same"
    assert recording.main([*arguments, "--out", str(tmp_path / "few"), "--audio-tokens", "1", "--quiet"]) == 0
    assert "model.audio.pool=4" in capsys.readouterr().out
    heard = load_audio_tower(ears(towers["whisper"], pool=4))
    loaders = [module(home, folder, heard).val_dataloader() for folder in (tmp_path / "few", home / "shards")]
    for cached, live in zip(*loaders, strict=True):
        wanted = heard.features(live).patches
        torch.testing.assert_close(cached.features[heard.name].patches, wanted, rtol=2**-7, atol=2e-3)
    for wrong, message in (("9", "gives 4.17 vectors a frame"), ("0", "give 1 or more")):
        with pytest.raises(ValueError, match=message):
            recording.main([*arguments, "--out", str(tmp_path / "u"), "--audio-tokens", wrong])
