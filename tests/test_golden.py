"""Ids and pixels of fixed weights and clips, kept in tests/golden: a change of what a trained model computes is seen.

When such a change is meant, write the file again and say in the commit what became different, and why:

    VTOK_WRITE_GOLDEN=1 python -m pytest tests/test_golden.py
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_contract import CASES, build_model, clip, video

from vtok.types import Tokenizer, to_uint8

GOLDEN = Path(__file__).parent / "golden"
SIZE = (14, 18)  # no multiple of a patch


def fixed(case: tuple[str, str]) -> torch.nn.Module:
    """A model whose weights depend on their names only: neither on the order nor on the kind of its initialisation."""
    model, _ = build_model(*case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            gain = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(noise * 0.1 + 1 if gain else noise * (parameter.shape[-1] ** -0.5))
        codebook = getattr(getattr(model, "quantizer", None), "codebook", None)
        if isinstance(codebook, torch.Tensor):
            noise = torch.randn(codebook.shape, generator=torch.Generator().manual_seed(0))
            codebook.copy_(torch.nn.functional.normalize(noise, dim=-1))
    return model


@torch.no_grad()
def compute(case: tuple[str, str]) -> dict[str, torch.Tensor]:
    model = fixed(case)
    clips = clip(to_uint8(video(2, 9, SIZE, seed=5)), [9, 3])
    tokens = model.encode(clips)
    out = {"lengths": tokens.lengths, "embeddings": tokens.embeddings.float()}
    if tokens.indices is not None:
        out["indices"] = tokens.indices.int()
    if isinstance(model, Tokenizer):
        groups = tokens.num_groups
        if not hasattr(model, "token_counts"):  # nested tokens: some of them
            tokens = tokens.truncate(torch.where(torch.arange(int(groups.max())) < groups[:, None], 2, 0))
        out["pixels"] = model.decode(tokens, size=SIZE)[:, :, ::4, ::3, ::3].half()
    return {f"{case[1]}.{name}": value.contiguous() for name, value in out.items()}


@pytest.mark.parametrize("family", sorted({family for family, _ in CASES}))
def test_the_numbers_are_those_of_the_golden_file(family):
    path = GOLDEN / f"{family}.safetensors"
    found: dict[str, torch.Tensor] = {}
    for case in CASES:
        if case[0] == family:
            found |= compute(case)
    if os.environ.get("VTOK_WRITE_GOLDEN"):
        save_file(found, path)
        pytest.skip(f"wrote {path.name}")
    golden = load_file(path)
    assert set(golden) == set(found), "a form came or went: write the golden file again"
    wrong = []
    for name, value in golden.items():
        if name.endswith(("lengths", "indices")):
            equal = torch.equal(value, found[name])
        else:
            equal = torch.allclose(value.float(), found[name].float(), atol=2e-3)
        wrong += [] if equal else [name]
    assert not wrong, f"{family} computes something else than {path.name} holds: {wrong}"
    assert all(len(value.unique()) > 3 for name, value in golden.items() if name.endswith(("indices", "pixels")))
