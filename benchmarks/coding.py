"""Held-out clips as `.vtok` bytes under every coding, beside their ideal bits, and how fast.

    python benchmarks/coding.py EXPORT TOKENS/val [--clips N] [--budgets 1,4,16,64] [--fit TOKENS/train]

EXPORT has a static model and a prior (`vtok export`, `vtok prior`), TOKENS is what `vtok tokenize` made with it. Every
clip becomes one file a coding and budget (tokens kept of a group), is read back, and must give its ids. Whole files are
counted: header, lengths, checksums and end. `--fit` fits the static model on the clips that the prior was trained on,
where the export's own was fitted on others.
"""

from __future__ import annotations

import argparse
import io
import time
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

import numpy as np
from rich.console import Console
from rich.table import Table

import vtok
from vtok.coding.bitstream import Chunk, Header, Reader, Writer, file_key
from vtok.coding.entropy import StaticModel
from vtok.coding.prior_coding import PriorModel, PriorStream
from vtok.coding.prior_data import scan
from vtok.coding.sample import kept
from vtok.coding.spending import PackedCoder, StaticCoder
from vtok.data.token_reader import TokenSample, iter_token_samples
from vtok.loading import Identity


@dataclass
class Sizes:
    """Of one clip under one coding: bytes of its file, ideal bits of its ids, CPU seconds of writing and reading."""

    bytes: int
    ideal: float
    writing: float
    reading: float


def measure(sample: TokenSample, who: Identity, coding: str, budget: int) -> Sizes:
    ids, groups = kept(sample.ids, sample.tokens.groups, budget)
    ids = ids.astype(np.int64)
    entropy, facts = who.coder(coding), sample.tokens
    header = Header(
        model_id=who.model_id,
        key=file_key(who.weights_sha256, entropy),
        size=(facts.size[0], facts.size[1]),
        fps=Fraction(facts.fps or 1).limit_denominator(1001),
        codebook_sizes=tuple(facts.codebook_sizes),
        coding=coding,
        budget=budget,
    )
    out, began = io.BytesIO(), time.process_time()
    writer = Writer(out, header, entropy=entropy)
    writer.write(Chunk(ids, tuple(groups), facts.frames))
    writer.close(frames=facts.frames)
    written = time.process_time()
    reader = Reader(io.BytesIO(out.getvalue()))
    reader.expect(who.model_id, who.weights_sha256, entropy=entropy)
    back = np.concatenate([chunk.indices for chunk in reader])
    done = time.process_time()
    assert np.array_equal(back, ids), f"{sample.key}: {coding} gave other ids back"
    return Sizes(len(out.getvalue()), ideal_bits(ids, groups, header, entropy), written - began, done - written)


def ideal_bits(ids: np.ndarray, groups: list[int], header: Header, entropy: StaticModel | PriorModel | None) -> float:
    """What the ids [K, Q] are worth: log2 of the codebooks, or -log2 of their probabilities."""
    if isinstance(entropy, PriorModel):
        return float(PriorStream(entropy).bits(ids, groups).sum())
    coder = PackedCoder(header.codebook_sizes) if entropy is None else StaticCoder(entropy)
    blocks = np.split(ids, np.cumsum(groups)[:-1])
    return float(sum(coder.bits(block, chosen=True).sum() for block in blocks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export")
    parser.add_argument("tokens")
    parser.add_argument("--clips", type=int)
    parser.add_argument("--budgets", default="1,4,16,64")
    parser.add_argument("--fit", metavar="TOKENS", help="fit the static model here (default: the export's own)")
    args = parser.parse_args()
    who = vtok.load(args.export).shipped
    if args.fit:
        assert who.prior is not None, f"{args.export} has no prior"
        factors, ranks = who.prior.config.index_factors, who.prior.config.max_rank
        train = iter_token_samples(args.fit, model_id=who.model_id)
        static = scan(train, index_factors=factors, ranks=ranks, condition="none").static
        who = Identity(who.model_id, who.weights_sha256, static, who.prior)
    samples = list(islice(iter_token_samples(args.tokens, model_id=who.model_id), args.clips))
    table = Table("kept", "tokens", "coding", "ids, bytes", "file", "below packed", "larger", "encode tok/s", "decode")
    for budget in map(int, args.budgets.split(",")):
        tokens = sum(sum(min(n, budget) for n in sample.tokens.groups) for sample in samples)
        packed: list[Sizes] = []
        for coding in ("packed", "static", "ar"):
            if coding != "packed" and who.coder(coding) is None:
                continue
            files = [measure(sample, who, coding, budget) for sample in samples]
            packed = packed or files
            total, plain = (sum(each.bytes for each in some) for some in (files, packed))
            ideal = sum(each.ideal for each in files) / 8
            larger = sum(a.bytes > b.bytes for a, b in zip(files, packed)) / len(files)
            seconds = sum(each.writing for each in files), sum(each.reading for each in files)
            table.add_row(
                str(budget),
                f"{tokens / len(samples):.1f}",
                coding,
                f"{ideal / len(samples):.1f}",
                f"{total / len(samples):.1f}",
                f"{1 - total / plain:.1%}",
                f"{larger:.0%}",
                *(f"{tokens / max(1e-9, each):,.0f}" for each in seconds),
            )
    Console(width=120).print(table)
    print(f"{len(samples)} clips; means a clip; larger: share of files with more bytes than packed")


if __name__ == "__main__":
    main()
