"""How many tokens: whoever decides lengths, in training or at inference.

nested.py  nested dropout: a random number of leading tokens for each clip
levels.py  by distortion and rate: the best levels for a total, the fewest tokens for a quality
ata.py     by how much each segment matters: scores into tokens, whole clips or streams
"""

from vtok.budget.ata import (
    AtaConfig,
    StreamAllocator,
    allocate_scores,
    allocate_segments,
    feasible_total,
    segment_bounds,
)
from vtok.budget.levels import (
    Found,
    allocate_ahead,
    allocate_lagrange,
    allocate_levels,
    interpolate_lengths,
    search_length,
    spread_lengths,
)
from vtok.budget.nested import MODES, NestedConfig, nested_keep

__all__ = ["MODES", "AtaConfig", "Found", "NestedConfig", "StreamAllocator", "allocate_ahead", "allocate_lagrange"]
__all__ += ["allocate_levels", "allocate_scores", "feasible_total", "interpolate_lengths", "nested_keep"]
__all__ += ["allocate_segments", "search_length", "segment_bounds", "spread_lengths"]
