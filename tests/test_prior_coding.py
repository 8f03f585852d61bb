"""Coding with a prior: arithmetic that no machine disagrees about, and the files it codes."""

import io
import math
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import PATIENCE_S

from vtok.coding import bitstream, prior_coding, records
from vtok.coding.bitstream import Chunk, Header, Reader, Writer, file_key
from vtok.coding.entropy import StaticModel, varint
from vtok.coding.prior_coding import PriorModel, PriorStream
from vtok.coding.prior_data import prefix_of, row_of, stack, tokens_of_ids
from vtok.coding.records import packed_counts
from vtok.coding.sample import draw_ids
from vtok.layers import exact
from vtok.layers.token_prior import TokenPrior, TokenPriorConfig, coded_factors

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
    spent = len(varint(1 + counts[0])) if alike else len(packed_counts(counts))
    assert float(prior_coding.signalling_bits(tokens)[0]) == 8 * spent


@pytest.mark.slow
def test_ten_thousand_random_sequences_come_back():
    prior = make_prior(sizes=(20,), factors=((4, 5),), width=8, depth=1, head_width=4)
    rng = np.random.default_rng(1)
    for number in range(10_000):
        counts = rng.integers(0, 3 if number % 500 else 60, rng.integers(1, 4)).tolist()
        ids = rng.integers(0, 20, (sum(counts), 1))
        assert np.array_equal(PriorStream(prior).decode(PriorStream(prior).encode(ids, counts), counts), ids)


@pytest.mark.parametrize("factors", [(8, 8, 8, 5, 5, 5), (64, 128)], ids=["fsq", "vq"])
def test_files_of_codebooks_as_presets_have_them_come_back(factors):
    """Ids that the prior thinks likely, so that records are coded, and random ones, so that some are packed."""
    size = math.prod(factors)
    prior = make_prior(sizes=(size,), factors=(factors,), width=8, depth=1, head_width=4, noise=1.0)
    rng, coded = np.random.default_rng(1), 0
    for number in range(40):
        counts = rng.integers(0, 12, 3).tolist()
        likely = draw_ids(prior, groups=counts, seed=number)[0]
        ids = likely if number % 4 else rng.integers(0, size, (sum(counts), 1))
        data = write_file(prior, [Chunk(ids, tuple(counts), 3)])
        (back,) = read_file(data, prior)
        assert np.array_equal(back.indices, ids) and back.counts == tuple(counts)
        coded += len(data) < len(write_file(prior, [Chunk(np.full_like(ids, size - 1), tuple(counts), 3)]))
    assert coded > 5, "files of likely ids are smaller than packed ones"


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
    monkeypatch.setattr(records, "RECORD_TOKENS", 40)
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
from test_prior_coding import PRIOR, random_ids
from vtok.coding.prior_coding import PriorStream
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
            [sys.executable, "-c", PROBE], cwd=root, env=os.environ | changes, capture_output=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        seen.add(done.stdout)
    assert len(seen) == 1
