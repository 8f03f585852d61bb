"""Lengths of time blocks: never more than was asked, measured as the decoder will see them, better than one for all."""

import io
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from test_codec import BLOCKS, make_model, moving
from test_contract import FLOW, LATENTS

from vtok.coding import codec
from vtok.coding.bitstream import Chunk, DamagedFile, Header, Reader, Writer, file_key
from vtok.coding.entropy import varint
from vtok.coding.prior_coding import PriorModel
from vtok.coding.rate_control import Asked
from vtok.coding.sharing import Allocated
from vtok.coding.spending import TokenPurse
from vtok.coding.trial import Trial, frames_of_groups, groups_of, mse_of, squared_error, steps_to_come, usual_frames
from vtok.coding.wanted_quality import Predicted, Searched
from vtok.data.encode import write_video
from vtok.export import fit_entropy
from vtok.families import flexible, flow
from vtok.layers.flow import SamplerConfig
from vtok.layers.token_prior import TokenPrior, TokenPriorConfig
from vtok.loading import Identity, identify
from vtok.types import Clip

DCT = dict(
    num_frames=4, size=[16, 16], patch=[2, 8, 8], width=16, encoder_depth=1, decoder_depth=1, num_heads=2,
    num_tokens=32, registers="dct", dct_frequencies=[4, 8, 8], predictor_width=0, mask="full",
)  # fmt: skip


def uneven(frames, side=16, seed=0):
    """uint8 [T, H, W, 3]: by turns, six frames of a still gradient and six of blobs that jump."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    out = np.zeros((frames, side, side, 3), np.uint8)
    for t in range(frames):
        base = 90 + 60 * x
        if t // 6 % 2:
            for _ in range(3):
                cx, cy, s = rng.random(), rng.random(), 0.05 + 0.1 * rng.random()
                base = base + rng.integers(-120, 120) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / s**2)
        out[t] = base.clip(0, 255)[..., None]
    return out


@pytest.fixture(scope="module")
def fitted():
    """A transform code for which every token is worth something, fitted to clips of the same kind."""
    torch.manual_seed(0)
    model = flexible.Model(flexible.Config(**DCT)).eval()
    clips = torch.stack([torch.from_numpy(uneven(72, seed=1 + s)) for s in range(4)]).permute(0, 4, 1, 2, 3)
    model.fit_statistics([piece / 127.5 - 1 for piece in clips.float().split(4, 2)])
    model.shipped = Identity(*with_entropy(model))
    return model


@pytest.fixture(scope="module")
def blocks():
    model = make_model(**dict(BLOCKS, num_tokens=32))  # enough for the static coding of near-constant ids to cost bytes
    model.shipped = Identity(*with_entropy(model))
    return model


def with_entropy(model):
    who = identify(model)
    pixels = torch.from_numpy(uneven(16)).permute(3, 0, 1, 2)[None]
    torch.manual_seed(1)
    factors = [list(each) for each in model.index_factors]
    shape = dict(width=16, depth=1, num_heads=2, head_width=8, context_groups=2, dropout=0.0)
    config = TokenPriorConfig(list(model.codebook_sizes), factors, max_rank=model.num_tokens, **shape)
    prior = PriorModel(config, TokenPrior(config).state_dict())
    return who.model_id, who.weights_sha256, fit_entropy(model, [Clip(keys=["a"], video=pixels)]), prior


def video(path, frames):
    write_video(path, frames, fps=25, codec="ffv1")
    return path


def lengths_in(path, model):
    with open(path, "rb") as file:
        reader = Reader(file)
        who = identify(model)
        reader.expect(who.model_id, who.weights_sha256, entropy=who.coder(reader.header.coding))
        return reader.header, [n for chunk in reader for n in chunk.counts]


def error_of(model, path, frames):
    """Summed squared error of the decoded file."""
    got = np.stack(list(codec.decode_frames(model, path))).astype(np.float64)
    return np.square(got - frames).sum()


@pytest.mark.parametrize("which", ["fitted", "blocks"])
@pytest.mark.parametrize("coding", ["packed", "static", "ar"])
@pytest.mark.parametrize("ahead", [None, 0, 2])
def test_a_file_is_never_larger_than_asked(request, tmp_path, which, coding, ahead):
    model, out = request.getfixturevalue(which), tmp_path / "x.vtok"
    source, frames = video(tmp_path / "in.mkv", uneven(27)), 27
    whole = codec.encode_file(model, source, out, coding=coding)
    with pytest.raises(ValueError, match="bytes=60 is too small.* ask for that or more") as caught:
        codec.encode_file(model, source, out, coding=coding, asked=Asked(bytes=60, look_ahead=ahead))
    assert not list(tmp_path.glob(".*"))
    least = int(str(caught.value).split(" bytes, ask")[0].split()[-1])
    spread = [least + (whole.bytes - least) * i // 2 for i in range(3)]
    tokens = []
    for limit in [*spread, whole.bytes + 100]:
        done = codec.encode_file(model, source, out, coding=coding, asked=Asked(bytes=limit, look_ahead=ahead))
        header, lengths = lengths_in(out, model)
        assert out.stat().st_size == done.bytes <= limit and done.frames == frames
        assert (header.asked, header.asked_value, header.look_ahead) == ("bytes", limit, ahead)
        assert min(lengths) >= 1 and len(lengths) == -(-frames // model.config.block_frames)
        tokens.append(sum(lengths))
    assert tokens[0] < tokens[-1] and tokens[0] < tokens[1], tokens
    if which == "fitted":  # of an untrained model, fewer tokens can be better
        assert tokens[1] < tokens[-1] == whole.tokens
    if which == "fitted" and ahead is None:  # the size is measured: what is named is the least, and little is left
        assert tokens[0] == len(lengths)
        with pytest.raises(ValueError, match="too small"):
            codec.encode_file(model, source, out, coding=coding, asked=Asked(bytes=least - 1))


@pytest.mark.parametrize("frames", [1, 17, 100])
def test_an_image_a_clip_and_a_long_video(tmp_path, fitted, frames):
    source, out = video(tmp_path / "in.mkv", uneven(frames)), tmp_path / "x.vtok"
    whole = codec.encode_file(fitted, source, out)
    least = codec.encode_file(fitted, source, out, asked=Asked(budget=1))
    room = (least.bytes + whole.bytes) // 2
    rate = Fraction(whole.tokens + least.tokens, 2) * 25 / frames
    for asked in (Asked(bytes=room), Asked(bytes=room, look_ahead=1), Asked(tokens_per_second=rate)):
        done = codec.encode_file(fitted, source, out, asked=asked)
        assert done.frames == frames and codec.decode_file(fitted, out, tmp_path / "out.mkv").frames == frames
        assert least.tokens < done.tokens < whole.tokens, "the setting binds"
        assert done.bytes <= (asked.bytes or whole.bytes) and done.tokens <= rate * frames / 25


def test_tokens_of_the_whole_video_are_never_passed_and_all_spent(tmp_path, fitted, blocks):
    source, out = video(tmp_path / "in.mkv", uneven(40)), tmp_path / "x.vtok"
    for ahead in (None, 0, 3):
        done = codec.encode_file(fitted, source, out, asked=Asked(tokens=120, look_ahead=ahead))
        assert 120 * 0.9 < done.tokens <= 120
        assert codec.encode_file(blocks, source, out, asked=Asked(tokens=50, look_ahead=ahead)).tokens <= 50
        with pytest.raises(ValueError, match="tokens=9 is too small.* ask for 10 or more"):
            codec.encode_file(fitted, source, out, asked=Asked(tokens=9, look_ahead=ahead))


def flow_model(num_frames, num_tokens):
    """A tokenizer whose chunks share a frame, in steps of 1 + 4 n frames, then 4 n; with noise, so that ids differ."""
    torch.manual_seed(0)
    sampler = SamplerConfig(steps=1)
    config = dict(FLOW, num_frames=num_frames, num_tokens=num_tokens, sampler=sampler, latents_config=LATENTS)
    model = flow.Model(flow.Config(**config)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.shipped = Identity(*with_entropy(model))
    return model


def told(monkeypatch, model, frames):
    """Encoding `frames` reads the network once, and decoding is not tried: a block's curve follows from its ids."""
    steps = list(codec.stream_steps(model, frames))

    def again(_model, given):
        assert len(list(given)) == len(frames)
        yield from steps

    def measure(self, group, lengths):
        return [(1 + int(group.ids.sum()) % 97) * 1e3 / k for k in lengths]

    monkeypatch.setattr(codec, "stream_steps", again)
    monkeypatch.setattr(Trial, "measure", measure)
    monkeypatch.setattr(Trial, "accept", lambda self, group, length: None)
    return steps


@pytest.mark.parametrize("coding", ["packed", "static", "ar"])
@pytest.mark.parametrize(("num_frames", "num_tokens", "count"), [(17, 16, 56), (9, 4, 47), (9, 4, 5), (1, 4, 7)])
def test_bytes_hold_where_chunks_share_a_frame(tmp_path, monkeypatch, num_frames, num_tokens, count, coding):
    """Every budget from the least on is met, with nothing ahead, some or all; the error names one that is."""
    model, out = flow_model(num_frames, num_tokens), tmp_path / "x.vtok"
    source = video(tmp_path / "in.mkv", uneven(count))  # it states no frames: they follow from its duration
    steps = told(monkeypatch, model, uneven(count))
    assert [frames_of_groups(model, step) for step in steps] == steps_to_come(model, count, begins=True)
    whole = codec.encode_file(model, source, out, coding=coding)
    for ahead in (None, 0) if coding == "ar" else (None, 0, 4):

        def encode(limit, ahead=ahead):
            return codec.encode_file(model, source, out, coding=coding, asked=Asked(bytes=limit, look_ahead=ahead))

        with pytest.raises(ValueError, match="ask for that or more") as caught:
            encode(60)
        out.unlink(missing_ok=True)
        least = int(str(caught.value).split(" bytes, ask")[0].split()[-1])
        with pytest.raises(ValueError, match="too small"):
            encode(least - 1)
        assert not out.exists() and not list(tmp_path.glob(".*"))
        done = encode(least)
        assert done.bytes <= least and done.frames == count
        if coding == "packed" or ahead is None:
            assert (done.bytes, done.tokens) == (least, done.groups)  # nothing smaller is possible
        for limit in range(least + 3, whole.bytes, max(17, (whole.bytes - least) // 2)):
            done = encode(limit)
            assert out.stat().st_size == done.bytes <= limit
        assert encode(whole.bytes + 99).tokens == whole.tokens or coding == "ar"


def forged(model, coding, *, counts=(4, 4), groups=2, frames=4, ids=b"", real=False):
    """A file of one step whose checksums all agree, of bytes `ids` that no encoder made (real: of zeros, coded)."""
    who = identify(model)
    entropy, out = who.coder(coding), io.BytesIO()
    facts = dict(model_id=who.model_id, key=file_key(who.weights_sha256, entropy), size=(16, 16), fps=Fraction(25))
    writer = Writer(out, Header(**facts, codebook_sizes=tuple(model.codebook_sizes), coding=coding), entropy=entropy)
    if real:
        width = len(model.codebook_sizes)
        writer.write(Chunk(np.zeros((sum(counts), width), np.int64), tuple(counts), frames))
    else:
        body = b"".join(map(varint, (1, groups, 1 + frames, counts[0] + 1))) + ids
        writer._put(b"R" + varint(len(body)) + body)
        writer._totals.update(groups=groups, tokens=groups * counts[0], records=1)
    writer.close(frames=frames or 4)
    return out.getvalue()


@pytest.mark.parametrize("coding", ["packed", "static", "ar"])
def test_forged_records_are_damage(tmp_path, blocks, coding):
    """Whatever ids a file claims under valid checksums, decoding says DamagedFile or gives frames."""
    path, rng, seen = tmp_path / "x.vtok", np.random.default_rng(0), set()
    for trial in range(24):
        ids = (b"\xff" * 60, bytes(40), rng.integers(0, 256, 60).astype(np.uint8).tobytes())[trial % 3]
        path.write_bytes(forged(blocks, coding, counts=[int(rng.integers(1, 33))], ids=ids[: int(rng.integers(61))]))
        try:
            seen.add(len(list(codec.decode_frames(blocks, path))))
        except DamagedFile:
            seen.add("damaged")
    assert "damaged" in seen and seen <= {4, "damaged"}


@pytest.mark.parametrize("coding", ["packed", "static", "ar"])
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (dict(counts=[40, 40]), "a group of 40 tokens, this model has 32"),
        (dict(counts=[4, 4, 4]), "4 frames has 3 groups"),
        (dict(counts=[4]), "4 frames has 1 groups"),
        (dict(counts=[4, 4], frames=None), "states no frames"),
        (dict(counts=[4, 4], frames=0), "states 0 frames"),
        (dict(counts=[4, 4], frames=1 << 22), "has 2 groups"),
    ],
)
def test_steps_that_a_model_does_not_make_are_damage(tmp_path, blocks, coding, step, message):
    path = tmp_path / "x.vtok"
    path.write_bytes(forged(blocks, coding, **step, real=True))
    with pytest.raises(DamagedFile, match=message):
        list(codec.decode_frames(blocks, path))


def test_nothing_is_decoded_of_a_record_that_claims_millions_of_tokens(tmp_path, blocks, monkeypatch):
    monkeypatch.setattr("vtok.coding.records.decode_static", None)
    path = tmp_path / "x.vtok"
    path.write_bytes(forged(blocks, "static", counts=[(1 << 23) - 2], ids=b"ab"))
    assert path.stat().st_size < 100
    with pytest.raises(DamagedFile, match="a group of 8388606 tokens"):
        list(codec.decode_frames(blocks, path))


def test_a_video_longer_than_its_container_says_is_never_larger(tmp_path, fitted, monkeypatch):
    """No file is left where the room was counted on frames that are not those that came."""
    source, out = video(tmp_path / "in.mkv", uneven(40)), tmp_path / "x.vtok"
    info = codec.probe(source)
    monkeypatch.setattr(codec, "probe", lambda path: replace(info, frames=20))
    for limit in (110, 115, 120, 130, 150):
        try:
            assert codec.encode_file(fitted, source, out, asked=Asked(bytes=limit, look_ahead=0)).bytes <= limit
        except ValueError as error:
            assert f"bytes={limit} is too small" in str(error) and not list(tmp_path.glob(".*"))
            assert not out.exists()
        out.unlink(missing_ok=True)


def test_where_it_matters_it_is_better_than_one_length_for_all(tmp_path, fitted):
    frames = uneven(96, seed=9)
    source, out = video(tmp_path / "in.mkv", frames), tmp_path / "x.vtok"
    fixed = codec.encode_file(fitted, source, out, budget=8)
    error = error_of(fitted, out, frames)
    gains = {}
    for ahead in (None, 0, 4):
        done = codec.encode_file(fitted, source, out, asked=Asked(bytes=fixed.bytes, look_ahead=ahead))
        assert done.bytes <= fixed.bytes
        gains[ahead] = 10 * np.log10(error / error_of(fitted, out, frames))
    assert gains[None] > 0.5 and gains[4] > 0.25 and gains[None] >= gains[4] - 0.05, gains


def test_the_least_length_that_reaches_a_quality(tmp_path, fitted):
    frames = uneven(24)
    source, out = video(tmp_path / "in.mkv", frames), tmp_path / "x.vtok"
    done = codec.encode_file(fitted, source, out, asked=Asked(psnr_db=24))
    header, lengths = lengths_in(out, fitted)
    assert header.asked == "psnr_db" and header.asked_value == 24 and "decodes a block" in done.note
    assert len(set(lengths)) > 1
    got = np.stack(list(codec.decode_frames(fitted, out))).astype(np.float64)
    for g, length in enumerate(lengths):
        here = slice(4 * g, 4 * g + 4)
        error = np.square(got[here] - frames[here]).mean()
        assert error <= mse_of(24) + 1e-3 or length == 32
        if 1 < length < 32:  # one token less would not do
            step = next(iter(codec.stream_steps(fitted, frames[here])))
            assert trial_of(fitted).measure(groups_of(fitted, step)[0], [length - 1])[0] / frames[here].size > mse_of(
                24
            )
    done = codec.encode_file(fitted, source, out, asked=Asked(psnr_db=90))
    assert "do not reach it at any length" in done.note


def trial_of(model, size=(16, 16)):
    return Trial(model, size, squared_error)


@pytest.mark.parametrize("kind", [dict(BLOCKS), {}], ids=["blocks", "whole"])
def test_what_is_tried_is_what_the_decoder_will_see(kind):
    """After blocks cut short, a block's distortion is that of the decoded stream; trying leaves the state alone."""
    model, frames = make_model(**dict(kind, num_tokens=8)), moving(11)
    with torch.inference_mode():
        steps = list(codec.stream_steps(model, frames))
        assert np.array_equal(np.concatenate([step.frames for step in steps]), frames)
        groups = [group for step in steps for group in groups_of(model, step)]
        assert sum(group.num_frames for group in groups) == 11
        lengths = [1 + (3 * g) % 8 for g in range(len(groups))]
        trial, measured = trial_of(model, frames.shape[1:3]), []
        for group, length in zip(groups, lengths):
            before = trial.measure(group, [length, 2])
            trial.measure(group, [1, 5, 8])
            assert trial.measure(group, [2, length])[::-1] == pytest.approx(before, rel=1e-3)
            measured.append(before[0])
            trial.accept(group, length)
        kept, at = [], 0
        for step in steps:
            count = int(step.tokens.num_groups[0])
            kept.append(step.tokens.truncate(torch.tensor([lengths[at : at + count]])))
            at += count
        decoded = np.stack(list(codec.stream_frames(model, kept, size=frames.shape[1:3]))).astype(np.float64)
    start = 0
    for group, error in zip(groups, measured):
        here = slice(start, start + group.num_frames)
        assert np.square(decoded[here] - frames[here]).sum() == pytest.approx(error, rel=1e-3)
        start += group.num_frames


@pytest.mark.parametrize("kind", ["whole", "blocks", "shared"])
def test_a_rate_is_never_passed_and_a_short_last_block_takes_its_token_from_those_before(kind):
    kinds = {"whole": {}, "blocks": dict(BLOCKS)}
    model = flow_model(9, 4) if kind == "shared" else make_model(**kinds[kind])
    usual = usual_frames(model)
    for frames in (2, 5, 6, 9, 14):
        groups = sum(map(len, steps_to_come(model, frames, begins=True)))

        def coded(rate, frames=frames):
            out = codec.stream_tokens(model, uneven(frames), tokens_per_second=rate)
            return [n for tokens in out for n in tokens.group[0].bincount().tolist()]

        for rate in (25 / usual, 37.5 / usual, 50 / usual):
            lengths: list[int] = []
            while not lengths:
                try:
                    lengths = coded(rate)
                except ValueError as error:  # named as far as the stream is known: the end may ask for more
                    asked = float(str(error).split("ask for ")[1].split(" ")[0])
                    assert rate < asked <= 50 / usual or frames < 2 * usual
                    rate = asked
            assert len(lengths) == groups and min(lengths) >= 1 and sum(lengths) <= rate * frames / 25 + 1e-9
    assert coded(50 / usual, usual + 1)[-1] == 1


def test_chunks_drawn_together_are_measured_together_and_mended(monkeypatch):
    """What lengths are judged by in the end is the error of the decoded file, and none that can be met is missed."""
    model, frames, size = flow_model(9, 8), uneven(16), (16, 16)  # steps of 1 + 2, 1, 1 blocks: two chunks
    with torch.inference_mode():
        steps = list(codec.stream_steps(model, frames))
        each = [groups_of(model, step) for step in steps]
        lengths, start, errors = [3, 8, 1, 5, 2], trial_of(model).mark(), []
        for chunk, here in ((each[0], lengths[:3]), (each[1] + each[2], lengths[3:])):
            errors += trial_of(model).measure_together(chunk, here, start)
            trial = trial_of(model)
            trial.state = start
            for group, length in zip(chunk, here):
                trial.accept(group, length)
            start = trial.state
        kept = [s.tokens.truncate(torch.tensor([k])) for s, k in zip(steps, (lengths[:3], lengths[3:4], lengths[4:]))]
        decoded = np.stack(list(codec.stream_frames(model, kept, size=size))).astype(np.float64)
    at = 0
    for group, error in zip([group for step in each for group in step], errors):
        here = slice(at, at + group.num_frames)
        assert np.square(decoded[here] - frames[here]).sum() == pytest.approx(error, rel=1e-3)
        at += group.num_frames
    alone, together = {1: 9.0, 2: 1.0}, []

    def whole(self, groups, lengths, start):
        together.append(len(groups))
        return [1.0 if k >= 4 or g == 0 else 2.0 for g, k in enumerate(lengths)]

    monkeypatch.setattr(Trial, "measure", lambda self, group, ks: [alone.get(k, 1.0 / k) for k in ks])
    monkeypatch.setattr(Trial, "measure_together", whole)
    policy = Searched(model, size, target=1.0, distance=squared_error)
    assert list(policy.lengths(iter(steps))) == [[2, 4, 4], [2], [4]]
    assert set(together) == {3, 2} and "3 got more tokens once their chunk was decoded whole" in policy.report()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(bytes=9, psnr_db=3), "bytes=9 and psnr_db=3: give one"),
        (dict(psnr_db=-1), "psnr_db=-1 must be a number above 0"),
        (dict(look_ahead=2), "look_ahead=2 goes with tokens or bytes"),
        (dict(psnr_db=30, predicted=True), "predicted=True goes with"),
        (dict(bytes=900, look_ahead=-1), "0 or more blocks"),
        (dict(psnr_db=float("inf")), "psnr_db=inf must be a number above 0"),
        (dict(psnr_db=4000.0), "psnr_db=4000.0 is above 150.0 dB"),
        (dict(lpips=0.1), "needs LPIPS weights: give --lpips-weights"),
        (dict(predicted_psnr_db=30), "needs a model with a halting head"),
        (dict(bytes=900, predicted=True), "needs a model with a scorer"),
    ],
)
def test_settings_that_cannot_be(tmp_path, fitted, asked, message):
    with pytest.raises(ValueError, match=message):
        codec.encode_file(fitted, video(tmp_path / "in.mkv", uneven(5)), tmp_path / "x.vtok", asked=Asked(**asked))
    assert [p.name for p in tmp_path.iterdir()] in ([], ["in.mkv"])


def test_the_benchmark_of_streams_gives_the_evaluator_what_the_file_had(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from streaming import window_budget

    flow_9, whole, blocks = flow_model(9, 4), make_model(), make_model(**BLOCKS)
    assert window_budget(flow_9, 3, length=9) == 9  # frames 1, 4, 4
    assert window_budget(whole, 3, length=4) == 3 and window_budget(blocks, 3, length=4) == 6


def test_only_flexible_can_predict():
    model = flow_model(9, 4)
    with pytest.raises(ValueError, match="halting head, which only family flexible can have: ask for psnr_db"):
        Predicted(model, psnr_db=30)
    with pytest.raises(ValueError, match="scorer, which only family flexible can have: leave it out"):
        Allocated(model, (16, 16), purse=TokenPurse(9), predicted=True)


@torch.no_grad()
def test_a_scorer_reads_a_last_chunk_as_one_though_it_comes_in_steps(tmp_path, monkeypatch):
    model = make_model(**dict(BLOCKS, num_tokens=8), scorer_depth=1, scorer_levels=4)
    frames, seen = uneven(11), []  # chunks of 4 frames, blocks of 2: the last chunk has 3
    predict = Allocated._predict
    monkeypatch.setattr(Allocated, "_predict", lambda *given: (seen.extend(predict(*given)), seen[-len(given[2]) :])[1])
    source = video(tmp_path / "in.mkv", frames)
    codec.encode_file(model, source, tmp_path / "x.vtok", asked=Asked(tokens=30, predicted=True))
    whole = model.predict_distortion(Clip(["a"], torch.from_numpy(frames).permute(3, 0, 1, 2)[None]))[0]
    assert len(seen) == len(whole) == 6
    for found, wanted, count in zip(seen, whole.double(), (2, 2, 2, 2, 2, 1)):
        assert torch.allclose(found[1::2], wanted * count, rtol=1e-4), "lengths that the scorer knows: 2, 4, 6, 8"


def test_a_scorer_shares_out_without_decoding(tmp_path, monkeypatch):
    model = make_model(**dict(BLOCKS, num_tokens=8), scorer_depth=1, scorer_levels=4)
    source, out = video(tmp_path / "in.mkv", uneven(30)), tmp_path / "x.vtok"
    monkeypatch.setattr(Trial, "measure", None)
    for asked in (Asked(bytes=320, predicted=True), Asked(tokens=40, predicted=True, look_ahead=2)):
        done = codec.encode_file(model, source, out, asked=asked)
        assert done.bytes <= (asked.bytes or done.bytes) and done.tokens <= (asked.tokens or done.tokens)
