"""The .vtok container and the entropy model: every id comes back, every damage is noticed, sizes are the ideal ones."""

import hashlib
import io
import math
import zlib
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok.coding import bitstream, entropy, records
from vtok.coding.bitstream import Chunk, Header, Reader, Writer, file_key
from vtok.coding.entropy import StaticModel, packed_bytes
from vtok.types import Tokens

SHA = bytes(range(32))
LEVELS = (8, 8, 8, 5, 5, 5)


def make_tokens(counts, sizes, *, seed=0, frames=None, first_group=0, skew=False):
    """One clip's tokens with `counts[g]` tokens in group g and random ids."""
    rng = np.random.default_rng(seed)
    total = sum(counts)
    draw = [rng.integers(0, size, total) if not skew else (rng.random(total) ** 4 * size).astype(int) for size in sizes]
    indices = np.stack(draw, 1).astype(np.int64)
    group = np.repeat(np.arange(len(counts)), counts) + first_group
    rank = np.concatenate([np.arange(n) for n in counts])
    return Tokens(
        embeddings=torch.zeros(1, total, 1),
        lengths=torch.tensor([total]),
        positions=torch.full((1, total, 3), math.nan),
        group=torch.from_numpy(group)[None],
        rank=torch.from_numpy(rank)[None].long(),
        indices=torch.from_numpy(indices)[None],
        codebook_sizes=tuple(sizes),
        times=torch.zeros(1, len(counts), 2),
        frames=torch.tensor([frames]) if frames is not None else None,
    )


def make_file(chunks, sizes, *, model=None, frames=7, **header):
    out = io.BytesIO()
    coding = "static" if model else "packed"
    head = Header(
        model_id=header.pop("model_id", "flexible-0123456789ab"),
        key=file_key(header.pop("weights_sha256", SHA), model),
        size=(48, 64),
        fps=Fraction(30000, 1001),
        codebook_sizes=tuple(sizes),
        coding=coding,
        **header,
    )
    writer = Writer(out, head, entropy=model)
    for chunk in chunks:
        writer.write(chunk)
    writer.close(frames=frames)
    return out.getvalue()


def read_file(data, *, model=None, weights=SHA):
    reader = Reader(io.BytesIO(data), name="x.vtok")
    reader.expect("flexible-0123456789ab", weights, entropy=model)
    return reader, list(reader)


def fitted(sizes, *, index_factors=None, max_rank=4, seed=5):
    tokens = make_tokens([40] * 10, sizes, seed=seed, skew=True)
    return StaticModel.fit([tokens], index_factors=index_factors or [(size,) for size in sizes], max_rank=max_rank)


codebooks = st.lists(st.sampled_from([1, 2, 3, 7, 10, 255, 256, 1000, 64000, 1 << 18]), min_size=1, max_size=3)
steps = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.one_of(st.none(), st.integers(0, 99))),
    min_size=0,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(sizes=codebooks, steps=steps, seed=st.integers(0, 1000), static=st.booleans())
def test_any_ids_come_back(sizes, steps, seed, static):
    model = StaticModel.fit([], index_factors=[(s,) for s in sizes], max_rank=2) if static else None
    written = [make_tokens(counts, sizes, seed=seed + i, frames=frames) for i, (counts, frames) in enumerate(steps)]
    data = make_file(written, sizes, model=model, frames=123)
    reader, chunks = read_file(data, model=model)
    assert reader.header.codebook_sizes == tuple(sizes) and reader.header.fps == Fraction(30000, 1001)
    assert len(chunks) == len(written)
    for chunk, tokens, (counts, frames) in zip(chunks, written, steps):
        assert chunk.counts == tuple(counts) and chunk.frames == frames
        assert np.array_equal(chunk.indices, tokens.indices[0].numpy())
    total = sum(sum(counts) for counts, _ in steps)
    assert reader.footer is not None
    assert (reader.footer.frames, reader.footer.tokens) == (123, total)
    assert bitstream.read_footer(io.BytesIO(data)) == reader.footer


@settings(max_examples=60, deadline=None)
@given(sizes=codebooks, count=st.integers(0, 40), seed=st.integers(0, 1000))
def test_packing_costs_the_exact_number_of_bits(sizes, count, seed):
    indices = make_tokens([count], sizes, seed=seed).indices[0].numpy()
    data = entropy.pack(indices, sizes)
    exact = (math.prod(sizes) ** count - 1).bit_length()
    assert entropy.packed_bits(sizes, count) == exact
    assert len(data) == math.ceil(exact / 8)
    assert np.array_equal(entropy.unpack(data, count, sizes), indices)


def test_packing_64000_codes_beats_whole_bits():
    count = 256
    assert entropy.packed_bits((64000,), count) == math.ceil(count * math.log2(64000)) == 4088  # 16 bits each: 4096


@settings(max_examples=40, deadline=None)
@given(
    factors=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3), seed=st.integers(0)
)
def test_digits_are_the_inverse_of_ids(factors, seed):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.integers(0, math.prod(each), 20) for each in factors], 1)
    digits = entropy.to_symbols(ids, factors)
    radices = np.array([radix for each in factors for radix in each])
    assert (digits >= 0).all() and (digits < radices).all()
    assert np.array_equal(entropy.from_symbols(digits, factors), ids)


def test_blocks_longer_than_one_integer(monkeypatch):
    sizes = (7, 300)
    tokens = make_tokens([5000, 1], sizes)
    model = fitted(sizes)
    for given_model in (None, model):
        _, chunks = read_file(make_file([tokens], sizes, model=given_model), model=given_model)
        assert np.array_equal(chunks[0].indices, tokens.indices[0].numpy())


@pytest.mark.parametrize("static", [False, True])
def test_every_single_bit_flip_is_detected(static):
    sizes = (10, 64000)
    model = fitted(sizes) if static else None
    data = make_file([make_tokens([2, 1], sizes, frames=4), make_tokens([3], sizes, frames=2)], sizes, model=model)
    assert len(data) < 250
    for bit in range(len(data) * 8):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(bitstream.VtokFileError):
            read_file(bytes(broken), model=model)


@pytest.mark.parametrize("static", [False, True])
def test_every_truncation_and_every_appendix_is_detected(static):
    sizes = (500,)
    model = fitted(sizes) if static else None
    data = make_file([make_tokens([4, 4], sizes)] * 3, sizes, model=model)
    for length in range(len(data)):
        with pytest.raises(bitstream.VtokFileError) as error:
            read_file(data[:length], model=model)
        assert isinstance(error.value, bitstream.TruncatedFile) or length == 0
        with pytest.raises(bitstream.VtokFileError):
            bitstream.read_footer(io.BytesIO(data[:length]))
    with pytest.raises(bitstream.DamagedFile, match="more after its end"):
        read_file(data + b"\0", model=model)
    with pytest.raises(bitstream.DamagedFile):
        read_file(data + data, model=model)


def test_a_dropped_repeated_or_swapped_record_is_detected(monkeypatch):
    monkeypatch.setattr(records, "RECORD_TOKENS", 1)
    sizes = (500,)
    parts = [
        make_file([make_tokens([8], sizes, seed=s) for s in seeds], sizes) for seeds in ([], [1], [1, 2], [1, 2, 3])
    ]
    head = len(parts[0]) - 17
    while parts[0][:head] != parts[3][:head]:
        head -= 1
    size = len(parts[2]) - len(parts[1])  # of one record
    data, body = parts[3], head
    parts = [data[body + i * size : body + (i + 1) * size] for i in range(3)]
    assert b"".join([data[:body], *parts, data[body + 3 * size :]]) == data
    for order in ([0, 2], [0, 1, 1, 2], [1, 0, 2]):
        with pytest.raises(bitstream.DamagedFile):
            read_file(b"".join([data[:body], *(parts[i] for i in order), data[body + 3 * size :]]))


def test_foreign_and_newer_files():
    data = make_file([make_tokens([4], (10,))], (10,))
    for foreign in (b"", b"RIFF....AVI LIST", b"\x89PNG\r\n\x1a\n0000", b"\0" * 100):
        with pytest.raises(bitstream.ForeignFile, match="x.vtok is not a .vtok file"):
            Reader(io.BytesIO(foreign), name="x.vtok")
    newer = bytearray(data)
    for version, error in ((5, bitstream.NewerVersion), (3, bitstream.OlderVersion), (1, bitstream.OlderVersion)):
        newer[8] = version
        with pytest.raises(error, match=f"version {version}, this vtok reads version 4"):
            Reader(io.BytesIO(bytes(newer)))
    newer[8:12] = b"\x04\xff\xff\x7f"
    with pytest.raises(bitstream.DamagedFile, match="its header claims 2097151 bytes"):
        Reader(io.BytesIO(bytes(newer)))


def test_the_wrong_model_is_refused_naming_both():
    model = fitted((10,))
    data = make_file([make_tokens([4], (10,))], (10,), model=model)
    with pytest.raises(bitstream.WrongModel, match="flexible-0123456789ab.*but this is other-ffff"):
        Reader(io.BytesIO(data)).expect("other-ffff", b"\xff" * 32, entropy=model)
    with pytest.raises(bitstream.WrongModel, match="entropy.safetensors"):
        Reader(io.BytesIO(data)).expect("flexible-0123456789ab", SHA)
    with pytest.raises(bitstream.WrongModel, match="but this is flexible-ba9876543210"):
        Reader(io.BytesIO(data)).expect("flexible-ba9876543210", SHA, entropy=model)
    with pytest.raises(bitstream.WrongModel, match="another flexible-0123456789ab: the static entropy model or the w"):
        Reader(io.BytesIO(data)).expect("flexible-0123456789ab", SHA, entropy=fitted((10,), seed=6))
    with pytest.raises(bitstream.WrongModel, match="another flexible-0123456789ab: the static entropy model or the w"):
        Reader(io.BytesIO(data)).expect("flexible-0123456789ab", b"\xff" * 32, entropy=model)
    plain = make_file([make_tokens([4], (10,))], (10,))
    with pytest.raises(bitstream.WrongModel, match="another flexible-0123456789ab: the weights differ"):
        Reader(io.BytesIO(plain)).expect("flexible-0123456789ab", b"\xff" * 32)
    Reader(io.BytesIO(plain)).expect("flexible-0123456789ab", SHA, entropy=model)  # which packed files do not need
    with pytest.raises(bitstream.WrongModel):
        list(Reader(io.BytesIO(data)))


def test_records_are_small_beside_their_ids():
    chunks = [make_tokens([64], (64000,), seed=i, frames=16) for i in range(100)]
    data = make_file(chunks, (64000,))
    ids = math.ceil(entropy.packed_bits((64000,), 6400) / 8)
    assert len(data) < ids * 1.01 + 200


def test_a_record_is_written_once_it_is_full():
    out = io.BytesIO()
    head = Header("m", SHA[:8], (8, 8), Fraction(25), (256,))
    writer = Writer(out, head)
    sizes = []
    for i in range(300):
        writer.write(make_tokens([16], (256,), seed=i, frames=16))
        sizes.append(out.tell())
    assert max(b - a for a, b in zip(sizes, sizes[1:])) <= 1100  # 1024 tokens of one byte, and the frame around them
    assert len(set(sizes)) > 3


def test_streams_may_number_their_groups_from_their_start():
    tokens = make_tokens([2, 3], (9,), first_group=17)
    chunk = Chunk.from_tokens(tokens, first_group=17)
    assert chunk.counts == (2, 3)
    back = chunk.to_tokens(lambda ids: ids.float(), (9,), first_group=17)
    assert torch.equal(back.group, tokens.group) and torch.equal(back.rank, tokens.rank)
    assert torch.equal(back.indices, tokens.indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": torch.tensor([[0, 2, 1]])}, "ranks inside a group"),
        ({"group": torch.tensor([[1, 0, 0]])}, "not in time order"),
        ({"indices": None, "codebook_sizes": ()}, "no indices"),
        ({"indices": torch.tensor([[[0], [9], [1]]])}, r"\[0, 9\], but codebook 0 has 9 entries"),
    ],
)
def test_tokens_that_cannot_be_written(change, message):
    tokens = replace(make_tokens([3], (9,)), times=None, **change)
    with pytest.raises(ValueError, match=message):
        make_file([tokens], (9,))


def test_more_tokens_than_the_budget_are_refused():
    with pytest.raises(ValueError, match="more than the budget of 2"):
        make_file([make_tokens([3], (9,))], (9,), budget=2)


# --- the static model ---


def test_static_bits_match_the_coded_size_and_beat_uniform():
    factors = [LEVELS]
    train = make_tokens([64] * 30, (64000,), seed=1, skew=True)
    test = make_tokens([64] * 8, (64000,), seed=2, skew=True)
    model = StaticModel.fit([train], index_factors=factors, max_rank=64)
    ideal = float(model.bits(test))
    indices, ranks = entropy.real_ids(test)
    coded = entropy.encode_static(indices, ranks, model)
    assert -8 < len(coded) * 8 - ideal <= 8  # whole bytes; trailing zeros are left out
    assert ideal < float(test.bits) * 0.97
    assert np.array_equal(entropy.decode_static(coded, ranks, model), indices)


def test_static_bits_are_the_entropy_of_a_known_source():
    """Ids drawn from probabilities 1/2, 1/4, 1/8, 1/8 cost 1.75 bits each."""
    rng = np.random.default_rng(0)

    def draw(n):
        ids = torch.from_numpy(rng.choice(4, size=n, p=[0.5, 0.25, 0.125, 0.125]))[None, :, None]
        return replace(make_tokens([n], (4,)), indices=ids)

    model = StaticModel.fit([draw(50_000)], index_factors=[(4,)], max_rank=1)
    assert float(model.bits(draw(50_000))) / 50_000 == pytest.approx(1.75, abs=0.02)


def test_tables_follow_the_rank():
    tokens = make_tokens([2] * 500, (4,))
    ids = torch.where(tokens.rank == 0, 3, torch.randint(0, 4, tokens.rank.shape, generator=torch.manual_seed(0)))
    tokens = replace(tokens, indices=ids[..., None])
    by_rank = StaticModel.fit([tokens], index_factors=[(4,)], max_rank=2)
    shared = StaticModel.fit([tokens], index_factors=[(4,)], max_rank=1)
    assert float(by_rank.bits(tokens)) == pytest.approx(1000, rel=0.03)  # rank 0 is free, rank 1 costs 2 bits
    assert float(shared.bits(tokens)) > 1400


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 10**9), min_size=1, max_size=50), smoothing=st.sampled_from([0.01, 0.5, 1.0, 10.0])
)
def test_frequencies_are_whole_and_complete(counts, smoothing):
    table = np.array([counts], np.int64)
    pseudo = Fraction(smoothing).limit_denominator(1024)
    out = entropy._integer_frequencies(table, pseudo)
    assert out.sum() == 1 << entropy.PRECISION and out.min() >= 1
    share = (table + smoothing) / (table + smoothing).sum()
    assert np.allclose(out / out.sum(), share, atol=len(counts) / (1 << entropy.PRECISION) + 1e-3 * share.max())


def test_padding_is_neither_counted_nor_charged():
    tokens = make_tokens([5], (16,))
    padded = replace(tokens, lengths=torch.tensor([3]))
    model = fitted((16,))
    cut = tokens.truncate(3)
    assert float(model.bits(padded)) == float(model.bits(cut))
    again = [StaticModel.fit([t], index_factors=[(16,)], max_rank=4).frequencies for t in (padded, cut)]
    assert torch.equal(*again)


def test_static_model_survives_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    model = fitted((64000, 10), index_factors=[LEVELS, (10,)])
    save_file(model.tensors(), tmp_path / "entropy.safetensors")
    back = StaticModel.from_tensors(load_file(tmp_path / "entropy.safetensors"))
    assert back.sha256 == model.sha256 and back.index_factors == model.index_factors
    tensors = model.tensors()
    tensors["frequencies"][0, 0] += 1
    with pytest.raises(ValueError, match="sum to"):
        StaticModel.from_tensors(tensors)
    with pytest.raises(ValueError, match="missing"):
        StaticModel.from_tensors({"frequencies": tensors["frequencies"]})


def test_oversized_tables_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="give index_factors .* or max_rank <= 65"):
        StaticModel.fit([], index_factors=[(64000,)], max_rank=256)
    assert StaticModel.affordable_ranks([LEVELS], 256) == 256
    assert StaticModel.affordable_ranks([(1 << 23,)], 256) == 0


def test_factors_come_from_the_model_and_must_multiply():
    class Model:
        codebook_sizes = (64000,)

    assert entropy.factors_of(Model()) == ((64000,),)
    Model.index_factors = (LEVELS,)
    assert entropy.factors_of(Model()) == (LEVELS,)
    Model.index_factors = ((8, 8),)
    with pytest.raises(ValueError, match="do not multiply"):
        entropy.factors_of(Model())


@settings(max_examples=60, deadline=None)
@given(
    factors=st.lists(st.lists(st.sampled_from([1, 2, 3, 8, 255]), min_size=1, max_size=4), min_size=1, max_size=2),
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_static_coding_costs_its_information(factors, counts, seed):
    sizes = [math.prod(each) for each in factors]
    model = fitted(sizes, index_factors=factors)
    tokens = make_tokens(counts, sizes, seed=seed, skew=seed % 2 == 0)
    indices, ranks = entropy.real_ids(tokens)
    coded = entropy.encode_static(indices, ranks, model)
    assert len(coded) <= math.ceil(float(model.bits(tokens)) / 8 + 1e-6)
    assert np.array_equal(entropy.decode_static(coded, ranks, model), indices)
    with pytest.raises(ValueError, match="too many"):
        entropy.decode_static(coded + b"\0", ranks, model)
    with pytest.raises(ValueError, match="coded ids"):
        entropy.decode_static(coded + bytes(8) + b"\1", ranks, model)


def test_carries_run_through_bytes_that_are_out():
    """The likeliest digits, at the upper end of the interval, fill the state with ones; then the interval ends."""
    coder = entropy.RangeEncoder()
    digits = [((1 << 22) - 1 - (1 << k % 3), 1 << k % 3) for k in range(40)] + [((1 << 22) - 1, 1)] * 3
    low, size = Fraction(0), Fraction(1)
    for start, frequency in digits:
        coder.put(start, frequency)
        low, size = low + size * Fraction(start, 1 << 22), size * Fraction(frequency, 1 << 22)
    data = coder.finish()
    value = Fraction(int.from_bytes(data, "big"), 1 << 8 * len(data))
    assert low <= value + Fraction(1, 1 << 900) and abs(value - low) < size * 2
    decoder = entropy.RangeDecoder(data)
    for start, frequency in digits:
        assert start <= decoder.slot() < start + frequency
        decoder.take(start, frequency)


@pytest.mark.parametrize("counts", [(0,), (1,), (2,), (1, 1, 1), (7, 9)])
def test_a_static_file_is_never_larger_than_a_packed_one(counts):
    """Ids that the static model thinks unlikely are packed, record by record, and the reader is told by the tag."""
    model = fitted((300,))
    tokens = make_tokens(counts, (300,))
    table = model.frequencies[tokens.rank.clamp(max=model.max_rank - 1)]
    for ids, likely in ((table.argmin(-1), False), (table.argmax(-1), True)):
        tokens = replace(tokens, indices=ids[..., None])
        plain, coded = make_file([tokens], (300,)), make_file([tokens], (300,), model=model)
        assert len(coded) < len(plain) or (len(coded) == len(plain) and not (likely and sum(counts)))
        assert (coded[10 + coded[9] + 4] == ord("P")) == (not likely and sum(counts) > 3)
        _, chunks = read_file(coded, model=model)
        assert np.array_equal(chunks[0].indices, tokens.indices[0].numpy())


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(1, 2)), max_size=40),
    st.integers(0, 20),
)
@settings(max_examples=40, deadline=None)
def test_the_most_a_file_can_take_is_what_packed_ids_take(steps, before):
    facts = dict(model_id="m", key=bytes(8), size=(16, 16), fps=Fraction(8))
    writer = Writer(io.BytesIO(), Header(**facts, codebook_sizes=(1000, 7)))
    chunks = [Chunk(np.zeros((sum(counts), 2), np.int64), tuple(counts), frames) for counts, frames in steps]
    for chunk in chunks[:before]:
        writer.write(chunk)
    most = writer.most_with(steps[before:], frames=99)
    for chunk in chunks[before:]:
        writer.write(chunk)
    writer.close(frames=99)
    assert writer._file.tell() == most


def test_what_a_file_costs_beside_its_ids():
    """73 bytes: 45 of header, 10 a record, 18 at the end."""
    header = dict(model_id="flexible-0123456789ab", frames=16)
    one = make_file([Chunk(np.zeros((1, 1), np.int64), (1,), 16)], (64000,), **header)
    ids = math.ceil(math.log2(64000) / 8)
    assert len(one) - ids == 73 + 3  # the frame rate, 30000/1001, takes 5 bytes where 25 takes 2
    none = make_file([], (64000,), **header)
    assert len(one) - len(none) == 10 + ids
    budget = make_file([], (64000,), **header, budget=16)
    assert len(budget) - len(none) == 3


# --- lengths that were chosen group by group ---


@pytest.mark.parametrize("model", [None, StaticModel.uniform(index_factors=((7,), (300,)))], ids=["packed", "static"])
@pytest.mark.parametrize("counts", [(2, 9, 1), (0, 300, 1, 1), (4, 4, 4), (70, 2, 700, 5)])
def test_what_was_asked_and_lengths_that_differ_come_back(model, counts):
    tokens = make_tokens(counts, (7, 300))
    chosen = dict(asked="psnr_db", asked_value=Fraction(65, 2), look_ahead=None)
    data = make_file([tokens, tokens], (7, 300), model=model, **chosen)
    reader = Reader(io.BytesIO(data))
    if model is not None:
        reader.expect(reader.header.model_id, SHA, entropy=model)
    got = list(reader)
    assert [c.counts for c in got] == [counts] * 2
    assert all(np.array_equal(c.indices, tokens.indices[0].numpy()) for c in got)
    assert (reader.header.asked, reader.header.asked_value, reader.header.look_ahead) == tuple(chosen.values())
    for at in range(0, len(data), 7):
        broken = bytearray(data)
        broken[at] ^= 16
        with pytest.raises(bitstream.VtokFileError):
            reader = Reader(io.BytesIO(bytes(broken)))
            reader.expect(reader.header.model_id, SHA, entropy=model)
            list(reader)
    with pytest.raises(ValueError, match="asked='quality'"):
        make_file([tokens], (7, 300), asked="quality")


def test_lengths_take_the_bits_of_their_range():
    counts = tuple(16 + i % 8 for i in range(400))  # 3 bits each
    differ, alike = (make_tokens(each, (7,)) for each in (counts, (sum(counts) // 400,) * 400))
    spare = packed_bytes((7,), sum(counts)) - packed_bytes((7,), sum(counts) // 400 * 400)
    more = len(make_file([differ], (7,))) - len(make_file([alike], (7,))) - spare
    assert more == pytest.approx(400 * 3 / 8, abs=3)


# --- the documented bytes (docs/formats.md) ---


def test_the_documented_bytes():
    """An independent reader, written from docs/formats.md, gives back ids 5, 299 | 6, 0 and 1, 2 | 3, 4."""
    rows = [[[5, 299], [6, 0]], [[1, 2], [3, 4]]]
    chunks = [Chunk(np.array(r), (2,), 16) for r in rows]
    data = make_file(chunks, (7, 300), model_id="toy-abcdef", budget=3, frames=31)
    at = 0

    def take(n):
        nonlocal at
        at += n
        return data[at - n : at]

    def number():
        value = shift = 0
        while True:
            byte = take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def little(n):
        return int.from_bytes(take(n), "little")

    assert take(8).hex() == "8956544f4b0d0a1a" and take(1) == b"\4"
    end = number() + at
    assert take(1) == b"\4" and take(number()) == b"toy-abcdef" and take(8) == hashlib.sha256(SHA).digest()[:8]
    assert [number() for _ in range(9)] == [48, 64, 30000, 1001, 3, 0, 1, 7, 300] and at == end
    crc = zlib.crc32(data[:at])
    assert little(4) == crc
    start = at
    assert take(1) == b"R" and number() == 10
    assert [number() for _ in range(4)] == [2, 1, 17, 3]  # chunks, groups, frames + 1, tokens + 1
    assert (2100**4 - 1).bit_length() == 45
    x, ids = little(6), []
    for radix in (7, 300) * 4:
        x, digit = divmod(x, radix)
        ids.append(digit)
    assert ids == [5, 299, 6, 0, 1, 2, 3, 4] and x == 0
    crc = zlib.crc32(data[start:at], crc)
    assert little(4) == crc
    start = at
    assert take(1) == b"F" and [number() for _ in range(4)] == [31, 2, 4, 1]
    totals = data[start:at]
    words = b"".join(each.to_bytes(8, "little") for each in ids)
    assert take(8) == hashlib.sha256(data[:start] + words + totals).digest()[:8]
    assert take(1) == bytes([len(totals)]) and take(4) == b"VTKE" and at == len(data)


def test_the_documented_header_of_a_model_id_with_a_hash():
    data = make_file([], (300,), asked="bytes", asked_value=Fraction(5), look_ahead=2)
    start = 10 + 1 + 1 + 8
    assert data[10] == 8 + 16 and data[11:20] == b"\x08flexible" and data[20:26].hex() == "0123456789ab"
    assert data[start + 6 : start + 14] == hashlib.sha256(SHA).digest()[:8]
    numbers = data[start + 14 : 10 + data[9]]
    assert numbers == bytes([48, 64, 0xB0, 0xEA, 1, 0xE9, 7, 1 + 8 * 3, 5, 1, 0xAC, 2])
