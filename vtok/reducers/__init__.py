"""Training-free reducers: baselines without parameters that make exactly K tokens of a clip's patches.

    Features, budget --> what to keep, what to merge --> Tokens: positions, mass and source of each

Every function has one signature, `(features, *, budget, prompt=None, generator=None, **options) -> Tokens`, and keeps
one contract:

    - exactly `budget` tokens for each clip (or a total for each, int64 [B, 1]); where a paper tunes a threshold, it is
      bisected to the lowest that leaves K tokens at least, and the rest is trimmed or merged by likeness
    - sorted in time; group = frame, frames without tokens not counted; rank = importance in it
    - positions = middle of a token's patches, in the clip's own frames
    - mass = patches that a token stands for, source = token that took each patch: -1 where a method drops it
    - the same for a clip alone as in a padded batch; decided in float32; gradients reach the patches
    - no prompt is read: what a clip became serves every question

`REDUCERS` holds them by name, `build` binds options. Patches are where a paper acts on tokens inside a tower or an LLM;
docstrings say so, and what else differs.

    selecting.py  random uniform divprune dart evs dtd dycoke vidcom2       patches.py     what they share
    merging.py    pooling tome sttm apet                                    clustering.py  kmeans dpc_knn scissor
    segments.py   prunevid holitom fastvid                                  attention.py   visionzip hiprune
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from vtok.reducers import attention, clustering, merging, segments, selecting
from vtok.reducers.patches import everything
from vtok.types import Reducer, Tokens


@dataclass(frozen=True)
class Method:
    """A reducer and what it asks for.

    drops: some patches end up in no token, else masses sum to the number of patches. layers: how many layers'
    attention it needs; keys, frame: whether it needs these of the tower. random: results depend on a seed.
    """

    reduce: Callable[..., Tokens]
    drops: bool = False
    layers: int = 0
    keys: bool = False
    frame: bool = False
    random: bool = False

    def options(self) -> dict[str, Any]:
        """Names and defaults of its own options."""
        given = inspect.signature(self.reduce).parameters.values()
        return {p.name: p.default for p in given if p.name not in ("features", "budget", "prompt", "generator")}


REDUCERS: dict[str, Method] = {
    "random": Method(selecting.random, drops=True, random=True),
    "uniform": Method(selecting.uniform, drops=True),
    "pooling": Method(merging.pooling),
    "tome": Method(merging.tome),
    "kmeans": Method(clustering.kmeans, random=True),
    "dpc_knn": Method(clustering.dpc_knn),
    "divprune": Method(selecting.divprune, drops=True),
    "dart": Method(selecting.dart, drops=True),
    "evs": Method(selecting.evs, drops=True),
    "dtd": Method(selecting.dtd, drops=True),
    "dycoke": Method(selecting.dycoke, drops=True),
    "sttm": Method(merging.sttm),
    "scissor": Method(clustering.scissor),
    "prunevid": Method(segments.prunevid),
    "apet": Method(merging.apet),
    "vidcom2": Method(selecting.vidcom2, drops=True),
    "visionzip": Method(attention.visionzip, drops=True, layers=1, keys=True),
    "hiprune": Method(attention.hiprune, drops=True, layers=2),
    "fastvid": Method(segments.fastvid, drops=True, layers=1, frame=True),
    "holitom": Method(segments.holitom, drops=True, layers=1),
}


def build(name: str, **options: Any) -> Reducer:
    """The reducer of that name with its options bound.

    Raises: ValueError naming the choices, for an unknown name or option.
    """
    if name not in REDUCERS:
        raise ValueError(f"reducer {name!r} is unknown; choose one of {', '.join(REDUCERS)}")
    known = REDUCERS[name].options()
    for option in options:
        if option not in known:
            raise ValueError(f"reducer {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}")
    return partial(REDUCERS[name].reduce, **options)


__all__ = ["REDUCERS", "Method", "build", "everything"]
