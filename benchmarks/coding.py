"""Held-out clips as `.vtok` bytes under every coding, and how fast: whole files, headers and checks included.

    python benchmarks/coding.py EXPORT TOKENS/val [--clips N] [--budgets 1,16,64]

EXPORT has a static model and a prior (`vtok export`, `vtok prior`), TOKENS is what `vtok tokenize` made with it. Every
clip becomes one file a coding and budget (tokens kept of a group), is read back, and must give its ids.
"""

from __future__ import annotations

import argparse
import io
import time
from fractions import Fraction
from itertools import islice

import numpy as np
from rich.console import Console
from rich.table import Table

import vtok
from vtok.bitstream import Chunk, Header, Reader, Writer
from vtok.data.token_reader import TokenSample, iter_token_samples
from vtok.loading import Identity
from vtok.prior_coding import PriorModel
from vtok.sample import kept


def file_of(sample: TokenSample, who: Identity, coding: str, budget: int) -> tuple[bytes, float, float]:
    """The bytes of a clip's file, and the CPU seconds that writing and reading it took."""
    ids, groups = kept(sample.ids, sample.tokens.groups, budget)
    entropy, facts = who.coder(coding), sample.tokens
    build = {"fingerprint": entropy.fingerprint, "build": entropy.build} if isinstance(entropy, PriorModel) else {}
    header = Header(
        model_id=who.model_id,
        weights_sha256=who.weights_sha256,
        size=(facts.size[0], facts.size[1]),
        fps=Fraction(facts.fps or 1).limit_denominator(1001),
        codebook_sizes=tuple(facts.codebook_sizes),
        coding=coding,
        entropy_sha256=b"" if entropy is None else entropy.sha256,
        **build,
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
    return out.getvalue(), written - began, done - written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export")
    parser.add_argument("tokens")
    parser.add_argument("--clips", type=int)
    parser.add_argument("--budgets", default="1,16,64")
    args = parser.parse_args()
    who = vtok.load(args.export).shipped
    samples = list(islice(iter_token_samples(args.tokens, model_id=who.model_id), args.clips))
    table = Table("tokens a group", "coding", "bytes a clip", "bits a token", "below packed", "encode tok/s", "decode")
    for budget in map(int, args.budgets.split(",")):
        tokens = sum(sum(min(n, budget) for n in sample.tokens.groups) for sample in samples)
        packed = 0
        for coding in ("packed", "static", "ar"):
            if coding != "packed" and who.coder(coding) is None:
                continue
            files = [file_of(sample, who, coding, budget) for sample in samples]
            total = sum(len(data) for data, _, _ in files)
            packed = packed or total
            seconds = (sum(writing for _, writing, _ in files), sum(reading for _, _, reading in files))
            speeds = [f"{tokens / max(1e-9, each):,.0f}" for each in seconds]
            saved = f"{1 - total / packed:.1%}"
            table.add_row(
                str(budget), coding, f"{total / len(samples):.1f}", f"{8 * total / tokens:.3f}", saved, *speeds
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
