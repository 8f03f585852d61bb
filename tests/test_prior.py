"""The prior: arithmetic that no machine disagrees about, files it codes, what it learns, and what it draws."""

import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import write_tar

import vtok
from vtok import bitstream, codec, prior_coding
from vtok import export as shipping
from vtok import prior as prior_room
from vtok import tokenize as tokenizing
from vtok.bitstream import Chunk, Header, Reader, Writer, file_key
from vtok.card import with_prior
from vtok.config import loads
from vtok.data.token_reader import SampleFacts, iter_token_samples
from vtok.entropy import StaticModel
from vtok.families import flexible
from vtok.layers import exact
from vtok.layers.token_prior import NULL, START, TokenPrior, TokenPriorConfig, TokenRows, coded_factors
from vtok.loading import ExportError, Identity, identify, load_prior
from vtok.prior import Training, prefix_of, row_of, stack, tokens_of_ids, train_prior
from vtok.prior_coding import PriorModel, PriorStream
from vtok.sample import budgets_of, choose, condition_words, draw_ids, kept, sheet
from vtok.types import Clip

SHA = bytes(range(32))
SHAPE = dict(width=16, depth=2, num_heads=2, head_width=8, context_groups=2, dropout=0.0)


def make_prior(*, sizes=(60, 7), factors=((4, 3, 5), (7,)), seed=0, noise=0.3, **changes) -> PriorModel:
    config = TokenPriorConfig(list(sizes), [list(f) for f in factors], **{"max_rank": 6, **SHAPE, **changes})
    torch.manual_seed(seed)
    net = TokenPrior(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return PriorModel(config, net.state_dict())


def random_ids(counts, sizes=(60, 7), seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, sum(counts)) for size in sizes], 1)


# ---- arithmetic


def test_the_table_of_exp_is_exp():
    for bits in (exact.ATTENTION_BITS, exact.LOGIT_BITS):
        table = exact.exp_table(bits)
        there = np.array([2.0**bits * math.exp(-i / exact.FINE) for i in range(len(table))])
        assert np.abs(table - there).max() <= 0.5 + 1e-6 and table[0] == 2**bits and table[-2:].tolist() == [1, 0]
    x = np.array([0.0, -0.5, -3.0, -100.0, -np.inf])
    assert np.allclose(exact.exp_of(np.maximum(x, -200), 24) / 2**24, np.exp(x), atol=1e-3)


@pytest.mark.parametrize("digits", ["chain", "parallel"])
@pytest.mark.parametrize("counts", [[1], [5, 5, 5, 5], [9, 0, 3, 12, 1]])
def test_many_at_once_and_one_by_one_are_equal_to_the_bit(digits, counts, monkeypatch):
    prior = make_prior(digits=digits)
    ids = random_ids(counts)
    whole = PriorStream(prior).frequencies(ids, counts)
    monkeypatch.setattr(prior_coding, "PIECE", 1)
    single = PriorStream(prior).frequencies(ids, counts)
    assert all(np.array_equal(a, b) for a, b in zip(whole, single))
    assert [f.shape for f in whole] == [(sum(counts), v) for v in (4, 3, 5, 7)]
    assert min(f.min() for f in whole) >= 1 and all((f == np.rint(f)).all() for f in whole)


def test_sums_may_be_taken_in_any_order():
    """Every matrix product and every sum of a step, its terms shuffled: the same bits come out."""
    prior, counts = make_prior(), [7, 7, 7]
    ids = random_ids(counts)
    before = PriorStream(prior).encode(ids, counts)
    turn = np.random.default_rng(0)

    def shuffled(self, x):
        order = turn.permutation(x.shape[-1])
        return (x[..., order] @ self.weight[order]) * self.unit + self.bias

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact._Linear, "__call__", shuffled)
        assert PriorStream(prior).encode(ids, counts) == before
    assert exact.largest(prior.config) < 53


def test_weights_too_large_for_exact_sums_are_refused():
    prior = make_prior()
    tensors = {name: value.clone() for name, value in prior.state_dict.items()}
    tensors["blocks.0.up.weight"][0, 0] = 65.0
    with pytest.raises(ValueError, match="blocks.0.up: weights up to 65"):
        PriorModel(prior.config, tensors)


@pytest.mark.parametrize("digits", ["chain", "parallel"])
def test_it_is_the_network_that_was_trained(digits):
    prior = make_prior(digits=digits, noise=0.1)
    net = TokenPrior(prior.config).eval()
    net.load_state_dict(prior.state_dict)
    counts = [8, 3, 8, 8]
    ids = random_ids(counts)
    tokens = tokens_of_ids(ids, counts, (60, 7))
    row = row_of(ids, tokens.group[0].numpy(), tokens.rank[0].numpy(), prior.config.index_factors, start=0, length=99)
    bits = net.bits(stack([row], [prefix_of([], prior.config)]))[0].detach().numpy()
    there = prior.token_bits(tokens)[0].numpy()
    assert np.abs(bits - there).max() < 0.02 and bits.std() > 0.1


def test_only_the_last_groups_are_seen_and_memory_is_theirs():
    prior = make_prior(context_groups=2)
    stream, sizes = PriorStream(prior), []
    for n in range(60):
        stream.encode(random_ids([5], seed=n), [5])
        sizes.append((stream.state.length, stream.state.keys.nbytes))
    assert len(set(sizes[2:])) == 1
    # Two layers of two groups each: what lies further back than the receptive field has no say.
    ids = random_ids([5] * 8)
    other = ids.copy()
    other[:5] = random_ids([5], seed=99)
    one, two = (PriorStream(prior).bits(each, [5] * 8) for each in (ids, other))
    assert not np.array_equal(one[5:10], two[5:10]) and np.array_equal(one[20:], two[20:])


def test_later_tokens_never_change_earlier_ones():
    prior, counts = make_prior(), [4, 6]
    ids = random_ids(counts)
    for at in range(10):
        other = ids.copy()
        other[at] = (other[at] + 1) % np.array([60, 7])
        one, two = (PriorStream(prior).bits(each, counts) for each in (ids, other))
        assert np.array_equal(one[:at], two[:at]) and one[at] != two[at]


def test_padding_of_a_row_changes_nothing():
    prior = make_prior(noise=0.1)
    net = TokenPrior(prior.config).eval()
    net.load_state_dict(prior.state_dict)
    rows = []
    for counts in ([3], [4, 4]):
        tokens = tokens_of_ids(random_ids(counts), counts, (60, 7))
        where = tokens.group[0].numpy(), tokens.rank[0].numpy()
        rows.append(row_of(random_ids(counts), *where, prior.config.index_factors, start=0, length=99))
    prefix = prefix_of([], prior.config)
    alone = [net.bits(stack([row], [prefix]))[0] for row in rows]
    both = net.bits(stack(rows, [prefix] * 2))
    torch.testing.assert_close(both[0, :3], alone[0])
    torch.testing.assert_close(both[1], alone[1])
    assert not both[0, 3:].any()


# ---- coding


@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(0, 7), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_ids_come_back_at_their_cost(counts, seed):
    prior = PRIOR
    ids = random_ids(counts, seed=seed)
    data = PriorStream(prior).encode(ids, counts)
    assert np.array_equal(PriorStream(prior).decode(data, counts), ids)
    bits = PriorStream(prior).bits(ids, counts).sum()
    assert len(data) * 8 <= bits + 8 * prior_coding.CHECK_BYTES + 40  # a carry is open, once in some 20 streams
    tokens = tokens_of_ids(ids, counts, (60, 7))
    assert float(prior.bits(tokens)[0]) == pytest.approx(bits)


PRIOR = make_prior()


def test_a_stream_ends_within_a_byte_of_its_cost():
    over = []
    for seed in range(40):
        ids = random_ids([3], seed=seed)
        data = PriorStream(PRIOR).encode(ids, [3])
        over.append(len(data) * 8 - 8 * prior_coding.CHECK_BYTES - PriorStream(PRIOR).bits(ids, [3]).sum())
    assert np.median(over) < 9 and np.mean(over) < 12


@pytest.mark.parametrize("counts", [[7], [7, 7, 7], [200, 200], [3, 90, 41], [1, 2] * 40])
def test_lengths_cost_what_a_record_spends_on_them(counts):
    tokens = tokens_of_ids(random_ids(counts), counts, (60, 7))
    alike = len(set(counts)) == 1
    spent = len(bitstream.varint(1 + counts[0])) if alike else len(bitstream._packed_counts(counts))
    assert float(prior_coding.signalling_bits(tokens)[0]) == 8 * spent


@pytest.mark.slow
def test_ten_thousand_random_sequences_come_back():
    prior = make_prior(sizes=(20,), factors=((4, 5),), width=8, depth=1, head_width=4)
    rng = np.random.default_rng(1)
    for _ in range(10_000):
        counts = rng.integers(0, 3, rng.integers(1, 4)).tolist()
        ids = rng.integers(0, 20, (sum(counts), 1))
        assert np.array_equal(PriorStream(prior).decode(PriorStream(prior).encode(ids, counts), counts), ids)


def test_codebooks_too_large_for_one_table_are_split():
    assert coded_factors([[8, 8, 5], [8192], [1 << 18]]) == [[8, 8, 5], [91, 91], [512, 512]]
    assert all(math.prod(each) >= n for each, n in zip(coded_factors([[70_000_001]]), [70_000_001]))
    factors = coded_factors([[8192]])
    prior = make_prior(sizes=(8192,), factors=factors)
    ids = random_ids([3, 3], (8192,))
    ids[0] = 8191
    data = PriorStream(prior).encode(ids, [3, 3])
    assert np.array_equal(PriorStream(prior).decode(data, [3, 3]), ids)
    drawn = draw_ids(prior, groups=[6, 6], count=8, temperature=5.0)
    assert drawn.max() < 8192 and len(np.unique(drawn)) > 50


def header(prior, **changes) -> Header:
    values = dict(
        model_id="flexible-0123456789ab",
        key=file_key(SHA, prior),
        size=(48, 64),
        fps=Fraction(30000, 1001),
        codebook_sizes=prior.codebook_sizes,
        coding="ar",
    )
    return Header(**{**values, **changes})


def write_file(prior, chunks, **changes) -> bytes:
    out = io.BytesIO()
    writer = Writer(out, header(prior, **changes), entropy=prior)
    for chunk in chunks:
        writer.write(chunk)
    writer.close(frames=7)
    return out.getvalue()


def read_file(data, prior=PRIOR) -> list[Chunk]:
    reader = Reader(io.BytesIO(data), name="x.vtok")
    reader.expect("flexible-0123456789ab", SHA, entropy=prior)
    return list(reader)


def chunks_of(count, seed=0, most=9) -> list[Chunk]:
    """Chunks of ids that PRIOR thinks likely: of others it says nothing worth coding, and a record is packed."""
    counts = np.random.default_rng(seed).integers(0, most, (count, 2))
    ids = draw_ids(PRIOR, groups=counts.reshape(-1).tolist(), seed=seed)[0]
    edges = np.concatenate([[0], counts.sum(1).cumsum()])
    return [Chunk(ids[a:b], tuple(each.tolist()), 16) for a, b, each in zip(edges, edges[1:], counts)]


def tags_of(data) -> str:
    """The tag of every record of a file."""
    reader, tags = Reader(io.BytesIO(data)), ""
    while (tag := reader._read(1)) != b"F":
        tags += tag.decode()
        reader._read_record(tag)
    return tags


@pytest.mark.parametrize("asked", [{}, {"asked": "bytes", "asked_value": Fraction(500), "look_ahead": None}])
def test_a_file_of_several_records_comes_back(asked, monkeypatch):
    monkeypatch.setattr(bitstream, "RECORD_TOKENS", 40)
    chunks = chunks_of(24)
    for n in range(8, 14):  # unlikely ones: packed where that is smaller, and the prior goes on after them
        chunks[n] = replace(chunks[n], indices=random_ids(chunks[n].counts, seed=n))
    data = write_file(PRIOR, chunks, **asked)
    assert "RP" in tags_of(data) and "PR" in tags_of(data)
    back = read_file(data)
    assert [c.counts for c in back] == [c.counts for c in chunks]
    assert all(np.array_equal(a.indices, b.indices) for a, b in zip(back, chunks))
    head = Reader(io.BytesIO(data)).header
    assert head == header(PRIOR, **asked)


def test_any_damage_is_noticed():
    data = write_file(PRIOR, chunks_of(3))
    for at in range(0, len(data), 3):
        broken = bytearray(data)
        broken[at] ^= 1 << (at % 8)
        with pytest.raises(bitstream.VtokFileError):
            read_file(bytes(broken))
    for length in range(0, len(data), 17):
        with pytest.raises(bitstream.VtokFileError):
            read_file(data[:length])


def test_another_prior_or_another_arithmetic_is_refused():
    data = write_file(PRIOR, chunks_of(2))
    with pytest.raises(bitstream.WrongModel, match="coded with the prior of .* lacks .prior.safetensors"):
        read_file(data, None)
    with pytest.raises(bitstream.WrongModel, match="lacks"):
        read_file(data, StaticModel.uniform(index_factors=[(60,), (7,)]))
    with pytest.raises(bitstream.WrongModel, match="the prior or the weights differ .* use the export"):
        read_file(data, make_prior(seed=3))
    with pytest.raises(bitstream.WrongModel, match="call expect"):
        list(Reader(io.BytesIO(data)))
    elsewhere = make_prior()
    elsewhere.fingerprint = bytes(8)  # this machine, had it made other numbers of the probe
    with pytest.raises(
        bitstream.OtherBuild, match=rf"{PRIOR.fingerprint.hex()[:8]}; on this machine .numpy .*. they are 00000000,"
    ):
        read_file(data, elsewhere)
    with pytest.raises(ValueError, match="needs the prior"):
        Writer(io.BytesIO(), header(PRIOR), entropy=None)
    with pytest.raises(ValueError, match="expected the 8 of file_key"):
        header(PRIOR, key=PRIOR.fingerprint[:4])


def test_arithmetic_that_slips_past_the_probe_is_noticed(monkeypatch):
    """Frequencies that are off somewhere give other ids, and a record's check says so; the end of a short file does."""
    short, long = (write_file(PRIOR, chunks_of(count)) for count in (2, 24))
    right = exact.frequencies

    def wrong(logits):
        out = right(logits)
        out[..., 0] += 2000.0
        return out

    monkeypatch.setattr(prior_coding, "frequencies", wrong)
    with pytest.raises(bitstream.DamagedFile, match="check they were written with|bytes|ids"):
        read_file(long)
    with pytest.raises(bitstream.DamagedFile, match="or the prior gave other ids here"):
        read_file(short)


PROBE = """
import sys; sys.path.insert(0, "tests")
from test_prior import PRIOR, random_ids
from vtok.prior_coding import PriorStream
print(PRIOR.fingerprint.hex(), PriorStream(PRIOR).encode(random_ids([40, 40, 40]), [40, 40, 40]).hex())
"""


@pytest.mark.slow
def test_threads_and_cpu_kernels_change_no_byte():
    root = Path(__file__).resolve().parents[1]
    seen = set()
    for changes in (
        {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"},
        {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3"},
    ):
        done = subprocess.run(
            [sys.executable, "-c", PROBE], cwd=root, env=os.environ | changes, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        seen.add(done.stdout)
    assert len(seen) == 1


# ---- a tiny tokenizer of a procedural corpus, its token shards, and a prior


def corpus_videos(first: int, count: int, frames: int = 16) -> list[np.ndarray]:
    """uint8 [T, 32, 32, 3] each: scenes of the procedural corpus."""
    from vtok.data.synthetic import render, scene

    return [
        np.stack(list(render(scene(7, n, level=2, seconds=frames / 8, size=(32, 32), fps=8, needles=0))))
        for n in range(first, first + count)
    ]


def write_tokens(folder: Path, model, videos, labels, *, make=None) -> None:
    """Token shards of videos, as `vtok tokenize` writes them; `make(n)`: other ids in their stead."""
    who = tokenizing.identity_of(model)
    members, counts = [], []
    for n, video in enumerate(videos):
        with torch.inference_mode():
            clip = Clip(keys=["x"], video=torch.from_numpy(video).permute(3, 0, 1, 2)[None])
            tokens = model.encode(clip.as_float())
        groups = torch.bincount(tokens.group[0]).tolist()
        ids = tokens.indices[0].numpy() if make is None else make(n, tokens.indices[0].numpy())
        about = SampleFacts(groups, len(video), 8.0, list(video.shape[1:3]), [], list(who.codebook_sizes))
        facts = {"caption": f"a {labels[n]} thing", "label": labels[n], "tokens": about._asdict()}
        members += [(f"c{n}.tokens.npy", tokenizing.npy(ids, who.dtype)), (f"c{n}.json", json.dumps(facts).encode())]
        counts.append(len(ids))
    folder.mkdir(parents=True, exist_ok=True)
    path = write_tar(folder / "t-0.tar", members)
    entry = {"name": path.name, "samples": len(counts), "bytes": path.stat().st_size, "sha256": ""}
    entry |= {"tokens": sum(counts), "longest": max(counts)}
    index = {"kind": "tokens", "tokenizer": asdict(who), "shards": [entry]}
    (folder / "index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """An export whose transform code is fitted to the corpus, and token shards of it."""
    root = tmp_path_factory.mktemp("prior")
    quantizer = {"name": "fsq", "levels": [5, 5, 5]}
    shape = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "predictor_width": 0}
    config = loads(
        {
            "name": "tiny",
            "model": {
                "name": "flexible", "num_frames": 4, "size": [32, 32], "patch": [4, 16, 16], "num_tokens": 16,
                "registers": "dct", "mask": "full", "quantizer": quantizer, **shape,
            },
            "data": {"num_frames": 4, "size": [32, 32]},
        }
    )  # fmt: skip
    torch.manual_seed(0)
    model = flexible.Model(config.model).eval()
    train, val = corpus_videos(0, 48), corpus_videos(1000, 16, frames=48)
    pieces = [v[at : at + 4] for v in train for at in (0, 8)]
    batch = torch.from_numpy(np.stack(pieces)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    model.fit_statistics([batch])
    (root / "export").mkdir()
    shipping.write_export(model, config, root / "export")
    model = vtok.load(root / "export")
    write_tokens(root / "tokens" / "train", model, train, [f"l{n % 3}" for n in range(48)])
    write_tokens(root / "tokens" / "val", model, val, [f"l{n % 3}" for n in range(16)])
    return root


FAST = Training(steps=40, batch_size=8, length=64, lr=5e-3, warmup=5, seed=1)
SMALL = dict(width=32, depth=1, num_heads=2, head_width=16, dropout=0.0, eval_every=20)


@pytest.fixture(scope="module")
def shipped(home) -> tuple[Path, list[dict[str, float]]]:
    rows = train_prior(home / "tokens", model=home / "export", out=home / "with", how=FAST, **SMALL)
    return home / "with", rows


def test_held_out_ids_cost_less_than_static_and_nominal(shipped):
    out, rows = shipped
    assert [row["budget"] for row in rows] == [1, 4, 16]
    for row in rows:
        assert row["ar"] < 0.97 * row["static"] < row["static"] < row["nominal"], row
        assert row["signalling"] == pytest.approx(8 * 16 / row["tokens"])
    model = vtok.load(out)
    assert model.shipped.prior.codebook_sizes == (125,)
    facts = json.loads((out / "prior.json").read_text())
    assert facts["held_out"] == rows and facts["layout"] == {
        "groups": [16] * 4,
        "frames": 16,
        "fps": 8.0,
        "size": [32, 32],
    }
    card = (out / "README.md").read_text()
    assert "## Prior" in card and f"{rows[-1]['ar']:.3f}" in card and card.count("## Use\n") == 1


def test_files_of_held_out_clips_are_smaller_too(shipped, home):
    """All but their headers: a file for each clip of 48 frames, 192 tokens."""
    model = vtok.load(shipped[0])
    prior = model.shipped.prior
    static = prior_room.scan(
        iter_token_samples(home / "tokens" / "train"),
        index_factors=prior.config.index_factors, ranks=16, condition="none",
    ).static  # fmt: skip
    size = dict.fromkeys(("packed", "static", "ar"), 0)
    for sample in iter_token_samples(home / "tokens" / "val"):
        chunk = Chunk(sample.ids, tuple(sample.tokens.groups), 16)
        for coding, entropy in (("packed", None), ("static", static), ("ar", prior)):
            out = io.BytesIO()
            head = header(prior, coding=coding, key=file_key(SHA, entropy))
            writer = Writer(out, head, entropy=entropy)
            begin = out.tell()
            writer.write(chunk)
            writer.close(frames=16)
            size[coding] += out.tell() - begin
            reader = Reader(io.BytesIO(out.getvalue()))
            reader.expect(head.model_id, SHA, entropy=entropy)
            assert np.array_equal(np.concatenate([c.indices for c in reader]), sample.ids)
    assert size["ar"] < size["static"] < size["packed"]


def test_a_video_file_there_and_back(shipped, tmp_path):
    from vtok.data.encode import write_video

    model = vtok.load(shipped[0])
    write_video(tmp_path / "in.mkv", np.tile(corpus_videos(2000, 1, frames=40)[0], (6, 1, 1, 1)), fps=8, codec="ffv1")
    frames, size = {}, {}
    for coding in ("packed", "ar"):
        done = codec.encode_file(model, tmp_path / "in.mkv", tmp_path / f"{coding}.vtok", coding=coding)
        frames[coding] = np.stack(list(codec.decode_frames(model, tmp_path / f"{coding}.vtok")))
        size[coding] = done.bytes
    assert np.array_equal(frames["packed"], frames["ar"]) and frames["ar"].std() > 5 and len(frames["ar"]) == 240
    assert size["ar"] < size["packed"]
    bare = vtok.load(shipped[0])
    who = identify(bare)
    bare.shipped = Identity(who.model_id, who.weights_sha256)
    with pytest.raises(bitstream.WrongModel, match="prior.safetensors"):
        next(codec.decode_frames(bare, tmp_path / "ar.vtok"))
    with pytest.raises(ValueError, match="coding='ar' needs a prior"):
        codec.encode_file(bare, tmp_path / "in.mkv", tmp_path / "x.vtok", coding="ar")


def test_an_interrupted_training_ends_bitwise_the_same(home, shipped, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    advance, steps = prior_room.Trainer._advance, []

    def dies(self, batch):
        if len(steps) in (13, 25):
            steps.append(None)
            raise Killed
        steps.append(None)
        self.save_seconds = 0.0  # after every step
        return advance(self, batch)

    monkeypatch.setattr(prior_room.Trainer, "_advance", dies)
    ask = dict(model=home / "export", out=tmp_path / "out", how=FAST, **SMALL)
    for _ in range(2):
        with pytest.raises(Killed):
            train_prior(home / "tokens", **ask)
    train_prior(home / "tokens", **ask)
    assert len(steps) == FAST.steps + 2
    assert hashes(tmp_path / "out") == hashes(shipped[0])
    with pytest.raises(ValueError, match="training.seed=1 there, 2 now"):
        train_prior(
            home / "tokens", **{**ask, "out": tmp_path / "b", "how": replace(FAST, seed=2)}, run=tmp_path / "out.prior"
        )
    with pytest.raises(ValueError, match="is not empty"):
        train_prior(home / "tokens", **ask)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_the_command_killed_and_run_again(home, tmp_path, number):
    command = [sys.executable, "-m", "vtok.cli", "prior", str(home / "tokens"), "--model", str(home / "export")]
    command += [
        "--steps",
        "60",
        "--length",
        "64",
        "--width",
        "32",
        "--depth",
        "1",
        "--num-heads",
        "2",
        "--eval-every",
        "5",
    ]

    def start(out):
        return subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=300) == 0, whole.stdout.read().decode()[-2000:]
    process, metrics = start(tmp_path / "cut"), tmp_path / "cut.prior" / "metrics.jsonl"
    until = time.monotonic() + 200
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=200) != 0
    if number == signal.SIGTERM:
        assert (tmp_path / "cut.prior" / "state.pt").is_file()
    again = start(tmp_path / "cut")
    assert again.wait(timeout=300) == 0, again.stdout.read().decode()[-2000:]
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_it_is_added_to_the_export_in_place_and_again(home, tmp_path):
    import shutil

    shutil.copytree(home / "export", tmp_path / "export")
    before = hashes(tmp_path / "export")
    how = replace(FAST, steps=2)
    first = train_prior(home / "tokens", model=tmp_path / "export", how=how, run=tmp_path / "a", **SMALL)
    again = train_prior(
        home / "tokens", model=tmp_path / "export", how=replace(how, seed=5), run=tmp_path / "b", **SMALL
    )
    after = hashes(tmp_path / "export")
    assert set(after) - set(before) == {"prior.safetensors", "prior.json"} and first != again
    assert {n for n in before if before[n] != after[n]} == {"README.md", "config.json"}
    assert (tmp_path / "export" / "README.md").read_text().count("## Prior") == 1
    assert vtok.load(tmp_path / "export").shipped.model_id == vtok.load(home / "export").shipped.model_id
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "export"]


def test_the_card_has_one_section(shipped):
    facts = json.loads((shipped[0] / "prior.json").read_text())
    card = "# x\n\n## Tokens and bits\n\ntext\n\n## Use\n\nmore\n"
    once = with_prior(card, facts)
    assert with_prior(once, facts) == once and once.endswith("## Use\n\nmore\n")
    assert once.index("## Tokens") < once.index("## Prior") < once.index("## Use")
    assert with_prior("", facts).startswith("## Prior") or with_prior("", facts).strip().startswith("## Prior")


def test_damaged_and_foreign_priors_are_refused(shipped, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    def copy():
        shutil.rmtree(tmp_path / "e", ignore_errors=True)
        return Path(shutil.copytree(shipped[0], tmp_path / "e"))

    folder = copy()
    tensors = load_file(folder / "prior.safetensors")
    for change, message in (
        (lambda t: t["base"].add_(1.0), "not the prior that config.json"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.pop("norm.weight"), "norm.weight"),
        (lambda t: t.update(base=torch.full_like(t["base"], math.nan)), "not finite"),
    ):
        changed = {name: value.clone() for name, value in tensors.items()}
        change(changed)
        save_file(changed, folder / "prior.safetensors")
        with pytest.raises(ExportError, match=message):
            vtok.load(folder)
    (copy() / "prior.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ExportError, match="prior.safetensors is damaged"):
        vtok.load(folder)
    (copy() / "prior.json").unlink()
    with pytest.raises(ExportError, match="prior.json is missing"):
        vtok.load(folder)
    for changes in ({"width": 2.5}, {"unknown": 1}, {"vocabulary": [1]}, {"digits": "x"}):
        facts = json.loads((copy() / "prior.json").read_text())
        facts["config"] |= changes
        (folder / "prior.json").write_text(json.dumps(facts))
        with pytest.raises(ExportError, match="does not fit prior.json"):
            load_prior(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flexible", "discrete"])
def test_clips_of_any_length_and_tokens_on_a_grid(family, tmp_path):
    """Images and videos of 4 to 30 frames through `vtok tokenize`, a prior, files, and a draw."""
    from test_export import make_run
    from test_tokenize import corpus

    from vtok.data.encode import write_video
    from vtok.sample import sample

    export = shipping.export(make_run(tmp_path / "run", family=family), tmp_path / "export", entropy=False)
    corpus(tmp_path / "shards", shards=1)
    tokenizing.tokenize(tmp_path / "shards", tmp_path / "tokens", model=export, workers=0, progress=False)
    how = Training(steps=3, batch_size=3, length=12)  # shorter than clips, and than a group of the grid
    ask = dict(model=export, val=tmp_path / "tokens", how=how, **SMALL)
    rows = train_prior(tmp_path / "tokens", **ask)
    assert [row["budget"] for row in rows][-1] == max(
        max(s.tokens.groups) for s in iter_token_samples(tmp_path / "tokens")
    )
    assert len(rows) == (1 if family == "discrete" else 2) and all(row["ar"] < row["nominal"] for row in rows)
    model = vtok.load(export)
    write_video(tmp_path / "in.mkv", corpus_videos(0, 1, frames=11)[0], fps=8, codec="ffv1")
    frames = []
    for coding in ("packed", "ar"):
        codec.encode_file(model, tmp_path / "in.mkv", tmp_path / "x.vtok", coding=coding, size=(16, 16))
        frames.append(np.stack(list(codec.decode_frames(model, tmp_path / "x.vtok"))))
    assert np.array_equal(*frames) and len(frames[0]) == 11
    sample(export, tmp_path / "draws", count=1)
    assert (tmp_path / "draws" / "samples.png").is_file()
    if family == "discrete":
        with pytest.raises(ValueError, match="a grid, of which none can be left out"):
            sample(export, tmp_path / "draws", count=1, tokens=1)


# ---- training data


def test_rows_are_cut_where_groups_begin_and_know_what_lies_before():
    ids, counts = np.arange(10)[:, None], [3, 1, 4, 2]
    tokens = tokens_of_ids(ids, counts, (16,))
    row = row_of(ids, tokens.group[0].numpy(), tokens.rank[0].numpy(), [[16]], start=3, length=5)
    assert row["digits"][:, 0].tolist() == [3, 4, 5, 6, 7] and row["group"].tolist() == [1, 2, 2, 2, 2]
    assert row["previous"].tolist() == [-1, 0, 1, 2, 3] and row["above"].tolist() == [-1, 0, -1, -1, -1]


def test_conditions_and_their_words():
    config = make_prior(condition="caption", vocabulary=["a", "cup", "red"], max_words=2).config
    assert prefix_of(["a", "red", "cup"], config) == [START, 2, 4] and prefix_of(["?"], config) == [START, NULL]
    assert condition_words(config, caption="The RED, cup!") == [4, 3] and condition_words(config) == [NULL]
    with pytest.raises(ValueError, match="knows none of it; it knows a, cup, red"):
        condition_words(config, caption="nothing")
    with pytest.raises(ValueError, match="trained with --condition caption"):
        condition_words(config, label="red")
    assert condition_words(make_prior().config) == []


# ---- drawing


def test_draws_follow_the_probabilities():
    rng, logits = np.random.default_rng(0), np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    rows = np.broadcast_to(logits, (20_000, 4))
    share = np.bincount(choose(rows, rng, temperature=1.0, top_k=None, top_p=1.0), minlength=4) / 20_000
    assert np.allclose(share, np.exp(logits), atol=0.015)
    sharp = np.bincount(choose(rows, rng, temperature=0.5, top_k=None, top_p=1.0), minlength=4) / 20_000
    assert np.allclose(sharp, np.exp(2 * logits) / np.exp(2 * logits).sum(), atol=0.015)
    assert set(choose(rows, rng, temperature=1.0, top_k=2, top_p=1.0)) == {0, 1}
    assert set(choose(rows, rng, temperature=1.0, top_k=None, top_p=0.79)) == {0, 1}
    assert set(choose(rows, rng, temperature=1.0, top_k=None, top_p=0.81)) == {0, 1, 2}
    assert set(choose(rows, rng, temperature=0.0, top_k=None, top_p=1.0)) == {0}
    never = np.where(np.arange(4) == 3, -np.inf, rows)
    assert 3 not in choose(never, rng, temperature=9.0, top_k=None, top_p=1.0)


def test_samples_cost_what_the_prior_expects():
    """-log2 p of drawn tokens has the mean of the entropy of the distributions they were drawn from."""
    groups = [5, 5]
    drawn = draw_ids(PRIOR, groups=groups, count=60, seed=3)
    bits, entropy = [], []
    for ids in drawn:
        tables = PriorStream(PRIOR).frequencies(ids, groups)
        bits.append(PriorStream(PRIOR).bits(ids, groups).sum())
        shares = [t / t.sum(-1, keepdims=True) for t in tables]
        entropy.append(sum(-(p * np.log2(p)).sum() for p in shares))
    assert np.mean(bits) == pytest.approx(np.mean(entropy), rel=0.05)
    assert np.array_equal(drawn, draw_ids(PRIOR, groups=groups, count=60, seed=3))
    one, two = (draw_ids(PRIOR, groups=groups, count=2, temperature=0.0, seed=s) for s in (1, 2))
    assert np.array_equal(one, two) and np.array_equal(one[0], one[1])


@pytest.mark.slow
def test_a_chain_of_digits_knows_what_parallel_cannot(home, tmp_path):
    """Ids (d, 2 d mod 5, 0) of a random d, as the split halves of a large codebook may be: 2.3 bits, or twice that."""
    model = vtok.load(home / "export")
    videos, rng = corpus_videos(0, 48), np.random.default_rng(0)

    def make(n, ids):
        d = rng.integers(0, 5, ids.shape)
        return d + 5 * (2 * d % 5)

    for split in ("train", "val"):
        write_tokens(tmp_path / "tokens" / split, model, videos, ["x"] * 48, make=make)
    bits = {}
    for digits in ("chain", "parallel"):
        ask = dict(model=home / "export", out=tmp_path / digits, how=replace(FAST, steps=120, lr=1e-2), digits=digits)
        bits[digits] = train_prior(tmp_path / "tokens", **ask, **SMALL)[-1]["ar"]
    assert bits["chain"] < 3.0 < 4.3 < bits["parallel"]


def test_labels_are_learned_and_guidance_goes_beyond(home, tmp_path):
    """Ids that begin with the number of their label: what is drawn for a label begins so, and more so when guided."""
    model = vtok.load(home / "export")
    videos, labels = corpus_videos(0, 24, frames=4), [f"l{n % 3}" for n in range(24)]
    rng = np.random.default_rng(0)

    def make(n, ids):
        ids = rng.integers(0, 125, ids.shape)
        ids[:, 0] = np.where(rng.random(len(ids)) < 0.7, 40 * (n % 3), ids[:, 0])
        return ids

    for split in ("train", "val"):
        write_tokens(tmp_path / "tokens" / split, model, videos, labels, make=make)
    how = replace(FAST, steps=60, null=0.2)
    train_prior(tmp_path / "tokens", model=home / "export", out=tmp_path / "out", how=how, condition="label", **SMALL)
    prior = vtok.load(tmp_path / "out").shipped.prior
    assert prior.config.vocabulary == ["l0", "l1", "l2"]

    def share(words, **draw):
        return np.mean([draw_ids(prior, groups=[16], count=32, words=words, **draw)[:, :8, 0] == 40 * n for n in (2,)])

    told = share(condition_words(prior.config, label="l2"))
    assert told > 0.45 and told > 1.4 * share(None)
    assert share(condition_words(prior.config, label="l2"), guidance=3.0) > told
    with pytest.raises(ValueError, match="guidance=2 needs a condition"):
        draw_ids(prior, groups=[2], guidance=2)
    with pytest.raises(ValueError, match="top_p=0"):
        draw_ids(prior, groups=[2], top_p=0)


def test_the_sample_command(shipped, tmp_path, capsys):
    from vtok.cli import main
    from vtok.data.decode import probe

    assert main(["sample", str(shipped[0]), "--out", str(tmp_path / "s"), "--count", "2", "--top-p", "0.9"]) == 0
    assert "2 videos; samples.png shows each with 1, 4, 16 tokens a group" in capsys.readouterr().out
    info, picture = probe(tmp_path / "s" / "sample_01.mp4"), probe(tmp_path / "s" / "samples.png")
    assert (info.frames, info.height, info.width) == (16, 32, 32) and info.fps == pytest.approx(8)
    assert (picture.height, picture.width) == (2 * 32 + 2, 3 * 32 + 4)
    assert main(["sample", str(shipped[0]), "--out", str(tmp_path / "s"), "--label", "l0"]) == 1
    assert main(["sample", str(shipped[0]), "--out", str(tmp_path / "s"), "--tokens", "99"]) == 1


def test_pictures_of_several_lengths():
    assert budgets_of(256, nested=True) == [1, 4, 16, 64, 256] and budgets_of(9, nested=False) == [9]
    ids, counts = kept(np.arange(6)[:, None], [4, 2], 3)
    assert ids[:, 0].tolist() == [0, 1, 2, 4, 5] and counts == [3, 2]
    frames = {k: np.full((3, 4, 5, 3), k, np.uint8) for k in (1, 2)}
    assert sheet([frames, frames]).shape == (10, 12, 3) and sheet([frames])[0, -1].tolist() == [2, 2, 2]


def test_eval_counts_bits_under_the_prior_and_the_report_shows_draws(shipped, home, tmp_path):
    from vtok.evaluator import Evaluator
    from vtok.report import write_report
    from vtok.sample import draw_samples

    model = vtok.load(shipped[0])
    clips = [
        Clip(keys=[f"v{n}"], video=torch.from_numpy(v).permute(3, 0, 1, 2)[None])
        for n, v in enumerate(corpus_videos(1000, 4))
    ]
    found = Evaluator(model, val=clips, train=clips, budgets=[4, 64], controls=(), fps=8, progress=False).run()
    for row in found["rows"]:
        assert 0 < row["ar_bits_mean"] < row["bits_mean"] and row["signalling_bits_mean"] == 8
    made = draw_samples(model, json.loads((shipped[0] / "prior.json").read_text()), count=2)
    page = write_report(found, [], tmp_path / "r.html", samples=made).read_text()
    assert page.count("data:image/webp") == 6 and "bits under the prior" in page and "16 tokens" in page
    model = vtok.load(home / "export")
    found = Evaluator(model, val=clips[:1], budgets=[64], controls=(), fps=8, progress=False).run()
    assert found["rows"][0]["ar_bits_mean"] is None and "under a prior: the model has none" in found["rows"][0]["note"]


def test_rows_move_as_one():
    row = row_of(np.zeros((2, 1), np.int64), np.zeros(2, int), np.arange(2), [[4]], start=0, length=9)
    rows = stack([row], [[START]])
    assert isinstance(rows.to("cpu"), TokenRows)
