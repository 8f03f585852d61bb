"""Encoder masks as truth tables, written by hand: rows ask, columns are seen."""

from __future__ import annotations

import pytest
import torch

from vtok.layers.masks import CrossTime, encoder_mask

# two time blocks of two patches and two registers: p0 p0 p1 p1 | r0 r0 r1 r1
BLOCK_CAUSAL = """
1100 1100
1100 1100
1111 1111
1111 1111
1100 1100
1100 1100
1111 1111
1111 1111
"""
BLOCK_CAUSAL_LAST = """
1100 0000
1100 0000
1111 1100
1111 1100
1100 1000
1100 1100
1111 1110
1111 1111
"""
APART = """
1100 0000
1100 0000
0011 0000
0011 0000
1100 1000
1100 1100
0011 0010
0011 0011
"""
PATCHES_SEE_PATCHES = """
1100 0000
1100 0000
1111 0000
1111 0000
1100 1000
1100 1100
0011 0010
0011 0011
"""
PATCHES_SEE_REGISTERS = """
1100 0000
1100 0000
0011 1100
0011 1100
1100 1000
1100 1100
0011 0010
0011 0011
"""
REGISTERS_SEE_PATCHES = """
1100 0000
1100 0000
0011 0000
0011 0000
1100 1000
1100 1100
1111 0010
1111 0011
"""
REGISTERS_CAUSAL = """
1100 0000
1100 0000
0011 0000
0011 0000
1100 1000
1100 1100
0011 1010
0011 1111
"""
NOTHING = dict(p_p="none", p_r="none", r_p="none", r_r="none")
TABLES = [
    ("time_block_causal", None, BLOCK_CAUSAL),
    ("time_block_causal_last", None, BLOCK_CAUSAL_LAST),
    ("flexible", {}, BLOCK_CAUSAL_LAST),
    ("flexible", NOTHING, APART),
    ("flexible", NOTHING | dict(p_p="full"), PATCHES_SEE_PATCHES),
    ("flexible", NOTHING | dict(p_r="full"), PATCHES_SEE_REGISTERS),
    ("flexible", NOTHING | dict(r_p="full"), REGISTERS_SEE_PATCHES),
    ("flexible", NOTHING | dict(r_r="causal"), REGISTERS_CAUSAL),
]


@pytest.mark.parametrize("kind, switches, table", TABLES)
def test_encoder_masks_are_these_tables(kind, switches, table):
    cross = None if switches is None else CrossTime(**switches)
    mask = encoder_mask(kind, patches=4, registers=4, blocks=2, cross=cross)
    assert mask is not None
    wanted = [[cell == "1" for cell in row.replace(" ", "")] for row in table.split("\n") if row]
    assert mask.tolist() == wanted


def test_one_block_is_causal_last():
    one = encoder_mask("causal_last", patches=3, registers=2)
    for kind in ("time_block_causal_last", "flexible"):
        other = encoder_mask(kind, patches=3, registers=2)
        assert one is not None and other is not None and torch.equal(one, other)
    assert encoder_mask("full", patches=3, registers=2) is None


def test_unknown_masks_and_switches_say_what_there_is():
    with pytest.raises(ValueError, match=r"mask='causal' is unknown; choose one of .*flexible"):
        encoder_mask("causal", patches=2, registers=2)
    with pytest.raises(ValueError, match=r"cross_time.p_r='causal' is unknown; choose full, none"):
        CrossTime(p_r="causal")
