"""What a step boundary asks for, how ranks agree on it, and what is left where carrying it out fails."""

from __future__ import annotations

import itertools
import signal
from types import SimpleNamespace

import pytest
import test_train
import torch

from vtok import train as training
from vtok.config import TrainerConfig
from vtok.training import boundary, strategy
from vtok.training.boundary import Due, Heard, Meeting, due
from vtok.training.curves import Curves

QUIET = Heard(0, False, 1.0)
TOLD = Heard(int(signal.SIGUSR1), False, 1.0)


def asked(step: int, *, clock: float = 0.0, heard: Heard | None = QUIET, alarm: bool = False, **keys) -> Due:
    return due(TrainerConfig(max_steps=100, **keys), step=step, clock=clock, heard=heard, alarm=alarm)


def test_nothing_is_due_at_most_steps():
    assert not asked(7) and asked(7) == Due()
    assert not asked(7, val_every=5, sample_every=4, checkpoint_every=3)
    assert not asked(7, heard=None)


def test_validation_samples_and_checkpoints_follow_their_keys():
    keys = {"val_every": 6, "sample_every": 4, "checkpoint_every": 10}
    found = {step: asked(step, **keys) for step in range(1, 100)}
    assert [s for s, each in found.items() if each.look] == list(range(6, 100, 6))
    assert [s for s, each in found.items() if each.show] == list(range(4, 100, 4))
    assert [s for s, each in found.items() if each.save] == list(range(10, 100, 10))
    assert not any(each.ends for each in found.values())
    assert [s for s in range(1, 100) if asked(s, val_every=6).show] == list(range(6, 100, 6))  # with validation
    assert asked(7, heard=Heard(0, True, 1.0)) == Due(save=True)


def test_the_end_asks_for_all_of_it_and_outweighs_signals_and_alarms():
    for end in (asked(100), asked(7, clock=1.0), asked(100, sample_every=3)):
        assert end == Due(look=True, show=True, done=True) and end.ends and not end.hurried
    late = asked(100, heard=TOLD, alarm=True)
    assert late.done and not late.halt and not late.hurried


def test_a_signal_or_an_alarm_leaves_what_is_due_to_the_next_start():
    told = asked(6, val_every=6, heard=TOLD)
    assert told == Due(look=True, show=True, stop=signal.SIGUSR1) and told.hurried
    assert asked(7, alarm=True) == Due(halt=True) and asked(7, alarm=True).hurried
    assert not asked(7, heard=None, alarm=False).ends


class World:
    """Ranks that meet: `all_max` of each waits for what the others tell."""

    def __init__(self, monkeypatch, *, ranks: int, last: int = 100) -> None:
        self.ranks = [Meeting(step=0, last=last) for _ in range(ranks)]
        self.told: list[list[float]] = []
        self.met = 0
        monkeypatch.setattr(boundary, "all_max", self.all_max)

    def all_max(self, values, device):
        self.told.append([float(v) for v in values])
        return [max(column) for column in zip(*self.told)]

    def at(self, step: int, own: list[Heard], *, spent_s: float) -> list[Heard | None]:
        """What each rank finds agreed. The first pass collects, since here they come one after the other."""
        kept = [(m.first, m.next) for m in self.ranks]
        self.told = []
        for again in (False, True):
            found = []
            for rank, meeting in enumerate(self.ranks):
                if again:
                    meeting.first, meeting.next = kept[rank]
                trainer = SimpleNamespace(world_size=len(self.ranks), is_global_zero=rank == 0)
                found.append(meeting.agree(trainer, own[rank], step=step, spent_s=spent_s, device=torch.device("cpu")))
        self.met += found[0] is not None
        return found


def test_ranks_agree_on_any_ones_signal_and_the_first_ones_clock(monkeypatch):
    world = World(monkeypatch, ranks=3)
    own = [Heard(0, False, 60.0), Heard(0, True, 99.0), Heard(int(signal.SIGTERM), False, 12.0)]
    assert world.at(1, own, spent_s=1.0) == [Heard(signal.SIGTERM, False, 60.0)] * 3
    assert world.at(2, [Heard(0, True, 61.0), *own[:2]], spent_s=2.0) == [Heard(0, True, 61.0)] * 3


@pytest.mark.parametrize("seconds_per_step, steps", [(2.0, 1), (0.125, 4), (1e-6, 100)])
def test_ranks_meet_about_twice_a_second_and_at_the_last_step(monkeypatch, seconds_per_step, steps):
    world = World(monkeypatch, ranks=2, last=203)
    met = [s for s in range(1, 204) if world.at(s, [QUIET] * 2, spent_s=s * seconds_per_step)[0] is not None]
    assert met[0] == 1 and met[-1] == 203
    assert {b - a for a, b in itertools.pairwise(met[:-1])} == {steps}


def test_one_rank_hears_itself_at_every_step():
    meeting, alone = Meeting(step=5, last=100), SimpleNamespace(world_size=1, is_global_zero=True)
    for step in (6, 7, 8):
        assert meeting.agree(alone, TOLD, step=step, spent_s=0.1, device=torch.device("cpu")) == TOLD


@pytest.mark.parametrize("steps", [3, 6])  # at the end of the run, and before
def test_samples_that_fail_take_no_best_checkpoint_with_them(tmp_path, monkeypatch, steps):
    """The validation before them found the best weights so far: the next start owes the samples alone."""
    config = test_train.settings(tmp_path, trainer={"max_steps": steps, "val_every": 3}, optim={"lr": 0.0})

    def failing(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Curves, "samples", failing)
        with pytest.raises(OSError, match="no space left"):
            training.train(config, data=test_train.Data())
    folder = tmp_path / "run" / "checkpoints"
    assert [strategy.describe(folder / name)["step"] for name in ("last.ckpt", "best.ckpt")] == [3, 3]
    run = training.train(config, data=test_train.Data())
    validated = [row["step"] for row in test_train.metrics(run) if "val/loss" in row]
    assert validated == list(range(3, steps + 1, 3)) and (run / "samples" / "step-00000003.mp4").exists()
    assert strategy.describe(folder / "best.ckpt")["step"] == 3  # as good as any: nothing learns here
