"""A video file to .vtok and back: the frames of the model's own stream, constant memory, within budget, or an error."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from waiting import PATIENCE_S

import vtok
from vtok import export as shipping
from vtok.coding import bitstream, codec
from vtok.coding.bitstream import Reader
from vtok.data.decode import DecodeError, iter_frames, probe
from vtok.data.encode import write_video
from vtok.export import fit_entropy
from vtok.info import describe
from vtok.loading import Identity, identify
from vtok.types import Clip, to_uint8

PLAIN = dict(
    num_frames=4, size=[16, 16], patch=[2, 8, 8], width=16, encoder_depth=1, decoder_depth=1, num_heads=2, num_tokens=4
)
BLOCKS = dict(PLAIN, mask="time_block_causal_last", blocks=2)


def make_model(*, seed=0, **values):
    from vtok.families import flexible

    torch.manual_seed(seed)
    model = flexible.Model(flexible.Config(**{**PLAIN, **values}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def moving(frames, height=18, width=22):
    """uint8 [T, H, W, 3]: a bright square that moves over a gradient."""
    out = np.zeros((frames, height, width, 3), np.uint8)
    out[...] = np.linspace(0, 200, width, dtype=np.uint8)[None, None, :, None]
    for t in range(frames):
        out[t, (t * 2) % (height - 4) :, :][:4, (t * 3) % (width - 4) :][:, :4] = (255, 80 * (t % 3), 30)
    return out


def make_video(path: Path, frames=11, fps=25, **size) -> Path:
    write_video(path, moving(frames, **size), fps=fps, codec="ffv1")
    return path


def direct(model, frames, *, budget=None):
    """What the model's own streaming calls give for these frames, in one go: uint8 [T, H, W, 3]."""
    size = frames.shape[1:3]
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None]
    with torch.inference_mode():
        tokens, state = model.step(Clip(keys=["x"], video=video), model.init_state(1, size))
        pieces = [p for p in (tokens, model.flush(state)) if p is not None]
        out, state = [], model.init_decode_state(1, size)
        for piece in pieces:
            if budget is not None:
                piece = piece.truncate(torch.full((1, int(piece.num_groups[0])), budget))
            decoded, state = model.decode_step(piece, state)
            out.append(decoded)
    return to_uint8(torch.cat(out, 2))[0].permute(1, 2, 3, 0).numpy()


def read(path):
    return np.stack([frame for frame, _ in iter_frames(path)])


@pytest.mark.parametrize("kind", [PLAIN, BLOCKS], ids=["whole", "blocks"])
@pytest.mark.parametrize("frames", [1, 3, 8, 11])
@pytest.mark.parametrize("coding", ["packed", "static"])
def test_decoded_frames_are_the_models_streaming_output(tmp_path, kind, frames, coding):
    model = make_model(**kind)
    source = make_video(tmp_path / "in.mkv", frames)
    if coding == "static":
        clip = Clip(keys=["a"], video=torch.from_numpy(moving(8)).permute(3, 0, 1, 2)[None])
        who = identify(model)
        model.shipped = Identity(who.model_id, who.weights_sha256, fit_entropy(model, [clip]))
    for budget in (None, 1, 3):
        done = codec.encode_file(model, source, tmp_path / "x.vtok", budget=budget, coding=coding)
        footer = codec.decode_file(model, tmp_path / "x.vtok", tmp_path / "out.mkv")
        got = read(tmp_path / "out.mkv")
        assert footer.frames == done.frames == frames and got.shape == (frames, 18, 22, 3)
        assert np.array_equal(got, direct(model, moving(frames), budget=budget))
        groups = -(-frames // model.config.block_frames)
        assert done.tokens == groups * (budget or 4) and done.groups == groups
    assert got.std() > 5, "frames that are all alike prove nothing"
    info = probe(tmp_path / "out.mkv")
    assert info.codec == "ffv1" and info.fps == pytest.approx(25)


def test_budget_of_every_block_is_met(tmp_path):
    model = make_model(**BLOCKS)
    source = make_video(tmp_path / "in.mkv", 23)
    codec.encode_file(model, source, tmp_path / "x.vtok", budget=2)
    with open(tmp_path / "x.vtok", "rb") as file:
        reader = Reader(file)
        reader.expect(reader.header.model_id, identify(model).weights_sha256)
        counts = [n for chunk in reader for n in chunk.counts]
    assert reader.header.budget == 2 and counts == [2] * 12


@pytest.mark.parametrize("rate", [12.5, 20, Fraction(100, 3), 50, 1000])
def test_tokens_per_second_is_never_passed_and_nearly_met(tmp_path, rate):
    model = make_model(**BLOCKS)  # blocks of 2 frames: 12.5 a second at 25 frames/s, at most 4 tokens each
    source = make_video(tmp_path / "in.mkv", 50)
    done = codec.encode_file(model, source, tmp_path / "x.vtok", tokens_per_second=rate)
    with open(tmp_path / "x.vtok", "rb") as file:
        reader = Reader(file)
        reader.expect(reader.header.model_id, identify(model).weights_sha256)
        counts = np.array([n for chunk in reader for n in chunk.counts])
    allowed = float(rate) * np.arange(1, 26) * 2 / 25
    assert (np.cumsum(counts) <= allowed + 1e-9).all() and counts.min() >= 1
    assert done.tokens == min(int(float(rate) * 2 + 1e-9), 4 * 25)


def test_sizes_rates_and_still_images(tmp_path):
    model = make_model()
    source = make_video(tmp_path / "in.mkv", 20, fps=10, height=20, width=40)
    done = codec.encode_file(model, source, tmp_path / "x.vtok", size=(16, 16), fps=5)
    assert (done.frames, done.size, done.duration_s) == (10, (16, 16), 2.0)
    codec.decode_file(model, tmp_path / "x.vtok", tmp_path / "out.mkv")
    kept = np.stack([codec.resize_crop(frame, (16, 16)) for frame in moving(20, 20, 40)[::2]])
    assert np.array_equal(read(tmp_path / "out.mkv"), direct(model, kept))
    assert probe(tmp_path / "out.mkv").fps == pytest.approx(5)
    write_video(tmp_path / "one.png", moving(1), fps=1, codec="png", container="image2")
    done = codec.encode_file(model, tmp_path / "one.png", tmp_path / "x.vtok")
    assert done.frames == 1


def test_validation_and_encode_see_the_same_pixels():
    from vtok.data.view import View, fit

    frame = moving(1, 37, 53)[0]
    same = fit(torch.from_numpy(frame)[None], View(num_frames=1, size=(16, 24), crop="center"), None)
    assert np.array_equal(codec.resize_crop(frame, (16, 24)), same[:, 0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("value", "ratio"),
    [
        (30000 / 1001, "30000/1001"),
        (25.0, "25"),
        (7.5, "15/2"),
        (23.976, "2997/125"),
        (1 / 3, "1/3"),
        (29.97, "2997/100"),
    ],
)
def test_rates_are_ratios(value, ratio):
    assert codec.as_fraction(value) == Fraction(ratio)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget=0 .* 1 to 4"),
        ({"budget": 5}, "budget=5 .* 1 to 4"),
        ({"budget": 1, "tokens_per_second": 9}, "give one of the two"),
        ({"tokens_per_second": -1}, "must be a number above 0"),
        ({"tokens_per_second": 2}, "ask for 6.250 or more"),
        ({"coding": "static"}, "needs the static entropy model"),
        ({"coding": "zip"}, "choose one of packed, static"),
        ({"fps": 0}, "fps=0 must be above 0"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    source = make_video(tmp_path / "in.mkv")
    with pytest.raises(ValueError, match=message):
        codec.encode_file(make_model(), source, tmp_path / "x.vtok", **settings)
    assert [p.name for p in tmp_path.iterdir()] == ["in.mkv"], "nothing half-written stays"


def test_models_that_cannot_stream_or_have_no_ids_say_so(tmp_path):
    source = make_video(tmp_path / "in.mkv")
    with pytest.raises(ValueError, match="cannot stream"):
        codec.encode_file(torch.nn.Linear(2, 2), source, tmp_path / "x.vtok")
    from vtok.quantize import QuantizerConfig

    model = make_model(quantizer=QuantizerConfig(name="identity", dim=4))
    with pytest.raises(ValueError, match="continuous tokens"):
        codec.encode_file(model, source, tmp_path / "x.vtok")


def test_bad_sources_and_folders(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(DecodeError):
        codec.encode_file(make_model(), tmp_path / "text.mp4", tmp_path / "x.vtok")
    source = make_video(tmp_path / "in.mkv", 100)
    with pytest.raises(ValueError, match="does not exist"):
        codec.encode_file(make_model(), source, tmp_path / "no" / "x.vtok")
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])
    with pytest.raises(DecodeError):
        codec.encode_file(make_model(), cut, tmp_path / "x.vtok")
    assert not (tmp_path / "x.vtok").exists() and not list(tmp_path.glob(".*"))


def test_another_models_file_and_damage_leave_nothing_behind(tmp_path):
    model = make_model()
    source = make_video(tmp_path / "in.mkv", 30)
    path, out = tmp_path / "x.vtok", tmp_path / "out.mkv"
    codec.encode_file(model, source, path)
    other = make_model(seed=1)
    with pytest.raises(bitstream.WrongModel, match=f"{identify(model).model_id}.*{identify(other).model_id}"):
        codec.decode_file(other, path, out)
    same_weights = make_model(**{"mask": "full"})
    with pytest.raises(bitstream.WrongModel):  # the configuration counts too
        codec.decode_file(same_weights, path, out)
    data = path.read_bytes()
    for at in (9, len(data) // 2, len(data) - 20):
        broken = bytearray(data)
        broken[at] ^= 4
        path.write_bytes(bytes(broken))
        with pytest.raises(bitstream.VtokFileError):
            codec.decode_file(model, path, out)
    path.write_bytes(data[:-30])
    with pytest.raises(bitstream.TruncatedFile):
        codec.decode_file(model, path, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mkv", "x.vtok"]


def test_a_lossy_codec_when_asked(tmp_path):
    model = make_model()
    codec.encode_file(model, make_video(tmp_path / "in.mkv", height=32, width=32), tmp_path / "x.vtok")
    codec.decode_file(model, tmp_path / "x.vtok", tmp_path / "out.mp4", codec="libx264", crf=10)
    assert probe(tmp_path / "out.mp4").codec == "h264" and probe(tmp_path / "out.mp4").frames == 11


def test_commands_from_run_and_export(tmp_path, capsys):
    from test_export import make_run

    run = make_run(tmp_path / "run")
    out = shipping.export(run, tmp_path / "export", entropy=False)
    source = make_video(tmp_path / "in.mkv")
    for model in (run, out):
        shipping.main_encode([str(model), str(source), "--out", str(tmp_path / "x.vtok"), "--budget", "2"])
        assert "11 frames" in capsys.readouterr().out
        shipping.main_decode([str(out), str(tmp_path / "x.vtok"), "--out", str(tmp_path / "out.mkv")])
        assert np.array_equal(read(tmp_path / "out.mkv"), direct(vtok.load(out), moving(11), budget=2))
    capsys.readouterr()
    for path, words in ((run, "last.ckpt"), (out, "weights_sha256"), (tmp_path / "x.vtok", "11 frames of 22x18")):
        describe.main([str(path)])
        assert words in capsys.readouterr().out
    describe.main([str(run / "config.yaml"), "--yaml"])
    assert "num_frames: 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no run directory, export"):
        describe.main([str(source)])


def test_size_option():
    model = make_model()
    assert codec.parse_size("24x32", model) == (24, 32)
    assert codec.parse_size("model", model) == (16, 16)
    assert codec.parse_size(None, model) is None
    for bad in ("24", "0x3", "axb", "1x2x3"):
        with pytest.raises(ValueError, match="not HxW"):
            codec.parse_size(bad, model)


MEMORY = """
import resource, sys, torch
torch.set_num_threads(1)
from vtok import load
from vtok.coding import codec
model = load(sys.argv[2])
if sys.argv[1] == "encode":
    codec.encode_file(model, sys.argv[3], sys.argv[4])
else:
    codec.decode_file(model, sys.argv[3], sys.argv[4])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_video(tmp_path):
    """6 times the frames, within 10 % of the peak memory, encoding and decoding."""
    from test_export import make_run

    out = shipping.export(make_run(tmp_path / "run"), tmp_path / "export", entropy=False)
    peaks: dict[str, list[int]] = {"encode": [], "decode": []}
    for frames in (250, 1500):
        source = make_video(tmp_path / f"{frames}.mkv", frames, height=96, width=128)
        coded = tmp_path / f"{frames}.vtok"
        steps = (("encode", source, coded), ("decode", coded, tmp_path / f"{frames}_out.mkv"))
        for what, given, made in steps:
            done = subprocess.run(
                [sys.executable, "-c", MEMORY, what, str(out), str(given), str(made)],
                capture_output=True, text=True, timeout=PATIENCE_S, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-2000:]
            peaks[what].append(int(done.stdout))
    for what, (short, long) in peaks.items():
        assert long < short * 1.1, (what, short, long)
