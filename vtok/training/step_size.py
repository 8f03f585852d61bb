"""How many clips a step learns from: clips of a process's batch x processes x accumulated batches."""

from __future__ import annotations

from vtok.config import RunConfig


def processes(config: RunConfig) -> int:
    """Of the whole run, over all nodes."""
    return config.trainer.devices * config.trainer.num_nodes


def batch_sizes(config: RunConfig) -> tuple[str, list[int]]:
    """The key that says how many clips a process's batch has, and how many: of each part where parts have their own."""
    if config.data.part_batch_sizes:
        return "data.part_batch_sizes", [int(size) for size in config.data.part_batch_sizes]
    return "data.batch_size", [config.data.batch_size]


def clips_of_a_step(config: RunConfig) -> list[int]:
    """Of each part where parts have batch sizes of their own: a batch comes from one part."""
    return [size * processes(config) * config.trainer.accumulate for size in batch_sizes(config)[1]]


def words(sizes: list[int]) -> str:
    """120 or 24."""
    return " or ".join(map(str, sizes))


def check_same(before: RunConfig, now: RunConfig) -> None:
    """Raises ValueError where a step would learn from another number of clips than before, naming what would fit."""
    old, new = clips_of_a_step(before), clips_of_a_step(now)
    if old == new:
        return
    sizes, world, accumulate = batch_sizes(now)[1], processes(now), now.trainer.accumulate
    same = len(old) == len(sizes)
    times = {was // (world * size) for was, size in zip(old, sizes)}
    if same and len(times) == 1 and all(was % (world * size) == 0 for was, size in zip(old, sizes)):
        fix = f"trainer.accumulate={times.pop()}"
    elif all(was % (world * accumulate) == 0 for was in old):
        fits = [was // (world * accumulate) for was in old]
        fix = f"{batch_sizes(before)[0]}={fits if len(fits) > 1 else fits[0]}"
    else:
        fix = f"a number of processes that divides {words(old)}"
    raise ValueError(
        f"{now.run_dir} was trained by {processes(before)} process(es) and would go on with {world}: a step would "
        f"learn from {words(new)} clips ({words(sizes)} x {world} x trainer.accumulate={accumulate}) where it learned "
        f"from {words(old)}. Set {fix}, or start a new run with init_from=EXPORT"
    )
