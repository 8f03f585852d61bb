"""The data cursor on another number of processes and workers: the same clips, each once, or a clear error."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_pipeline import config, corpus  # noqa: F401 (a fixture)

from vtok.data.cursor import another_order, carry_over
from vtok.data.module import ClipDataModule


def module(corpus, world: int, rank: int, workers: int, **changed) -> ClipDataModule:  # noqa: F811
    """The data of one process, which reads its streams itself: the order is that of loaders with workers."""
    made = ClipDataModule(config(corpus, num_workers=workers, **changed))
    device = SimpleNamespace(root_device=torch.device("cpu"))
    made.trainer = SimpleNamespace(global_rank=rank, world_size=world, default_root_dir=str(corpus), strategy=device)
    return made


def read(made: ClipDataModule, count: int) -> list[tuple[str, ...]]:
    found = []
    for batch in made.train_dataloader():
        found.append(tuple(batch.keys))
        made.advance(batch)
        if len(found) == count:
            return found


@pytest.mark.slow  # loaders with workers
@pytest.mark.parametrize(("old", "new"), [((2, 1), (1, 2)), ((1, 2), (2, 1)), ((2, 0), (1, 2))])
def test_as_many_streams_give_the_same_clips_to_other_processes(corpus, old, new):  # noqa: F811
    """(processes, workers) before and after: the steps that follow learn from the clips of the unbroken run."""

    def steps(world, workers, count, state=None):
        ranks = [module(corpus, world, r, workers) for r in range(world)]
        for made in ranks if state else ():
            made.load_state_dict(state)
        each = [read(made, count * 2 // world) for made in ranks]
        mine = [sorted(k for one in each for batch in one[i * 2 // world : (i + 1) * 2 // world] for k in batch)
                for i in range(count)]  # fmt: skip
        return mine, ranks[0].state_dict()

    whole, _ = steps(*old, 5)
    first, state = steps(*old, 2)
    rest, _ = steps(*new, 3, state)
    assert first + rest == whole


def test_what_does_not_fit_says_what_would():
    state = {"batches": 6, "world": 4, "num_workers": 2, "batch_size": 3}
    assert carry_over(state, {**state, "world": 2, "num_workers": 4}, exact=True) == 12
    assert carry_over(state, {**state, "world": 8, "num_workers": 0}, exact=True) == 3
    assert carry_over(state, {**state, "world": 2, "num_workers": 4, "batch_size": 9}, exact=True) == 4
    for change, told in (
        ({"world": 2}, "set data.num_workers=4"),
        ({"world": 3}, "choose a number of processes that divides 8"),
        ({"world": 2, "num_workers": 4, "batch_size": 4}, "data.batch_size=4 does not divide: keep data.batch_size=3"),
    ):
        with pytest.raises(ValueError, match=told + ".*data.reorder=true"):
            carry_over(state, {**state, **change}, exact=True)
    with pytest.raises(ValueError, match=r"to a step where they have \(a multiple of 2 batches\)"):
        carry_over({**state, "batches": 5}, {**state, "world": 2, "num_workers": 4}, exact=True)
    with pytest.raises(ValueError, match="keep processes and workers"):
        carry_over(state, {**state, "world": 2, "num_workers": 4}, exact=False)


def test_a_new_order_is_asked_for_by_a_key_and_is_another_each_time(corpus, capsys):  # noqa: F811
    state = {**module(corpus, 1, 0, 0).state_dict(), "world": 2, "batches": 4}
    with pytest.raises(ValueError, match="trainer.num_nodes was 2 and is 1. To keep the order .*data.reorder=true"):
        module(corpus, 1, 0, 0).load_state_dict(state)
    made = module(corpus, 1, 0, 0, reorder=True)
    made.load_state_dict(state)
    again = made.state_dict()
    assert (again["batches"], again["order"], again["world"]) == (0, 1, 1)
    assert "begins in a new order" in capsys.readouterr().out
    assert read(made, 3) != read(module(corpus, 1, 0, 0), 3)
    same = module(corpus, 1, 0, 0)  # the key is not needed for what it began
    same.load_state_dict(made.state_dict())
    assert same._order == 1 and same.batches_consumed == 3
    assert len({another_order(7, n) for n in range(100)}) == 100 and another_order(7, 0) == 7
