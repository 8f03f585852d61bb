"""Alarms: the rules on lines of numbers, and runs that end by them, on one process and on two."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import outside.tiny
import pytest
import test_train
import torch
from waiting import PATIENCE_S

from vtok import train as training
from vtok.config import AlarmConfig, load
from vtok.losses import codebook_report
from vtok.training import alarms, lit, strategy
from vtok.training.alarms import Alarms, codebook_line, even_use
from vtok.training.optim import total_norms
from vtok.types import Loss

ROOT = Path(__file__).parent.parent
HEALTHY = {
    "train/l1": 0.1,
    "train/loss": -3.0,
    "train/grad_norm": 0.5,
    "train/discriminator": 0.9,
    "train/logits_real": 0.3,
    "train/logits_fake": 0.1,
    "train/codebook_usage": 0.6,
    "train/codebook_perplexity": 200.0,
    "train/codebook_usage_share": 0.7,
    "train/codebook_perplexity_share": 0.5,
    "train/codebook_tokens": 4000.0,
}
BAD = {
    "codebook_collapse": {"train/codebook_perplexity_share": 0.01},
    "codebook_low": {"train/codebook_usage_share": 0.08},
    "discriminator_wins": {"train/discriminator": 0.01, "train/logits_real": 2.0, "train/logits_fake": -2.0},
    "discriminator_dead": {"train/discriminator": 1.0001, "train/logits_real": 0.1, "train/logits_fake": 0.1},
    "divergence": {"train/l1": 0.5},
    "gradient_growth": {"train/grad_norm": 100.0},
}


def fast(**settings) -> Alarms:
    return Alarms(AlarmConfig(**{"warmup_steps": 0, "lines": 3, **settings}))


def look(alarms_: Alarms, lines: list[dict], first: int = 1) -> list[tuple[int, str, str]]:
    return [(i, a.rule, a.action) for i, line in enumerate(lines, first) for a in alarms_.look(i, line)]


# pure parts


@pytest.mark.parametrize("count, size", [(50, 1000), (3000, 512), (2000, 4), (100_000, 700), (90, 9)])
def test_even_use_is_what_even_draws_show(count, size):
    generator = torch.Generator().manual_seed(0)
    used, perplexity = [], []
    for _ in range(40):
        counts = torch.bincount(torch.randint(size, (count,), generator=generator), minlength=size)
        share = counts[counts > 0].double() / count
        used.append((counts > 0).sum().item())
        perplexity.append(math.exp(-(share * share.log()).sum().item()))
    found = even_use(count, size)
    assert found[0] == pytest.approx(sum(used) / 40, rel=0.02) and found[1] == pytest.approx(
        sum(perplexity) / 40, rel=0.02
    )


def test_a_line_tells_the_use_of_the_window_and_the_worst_codebook():
    even, one = torch.arange(800).remainder(8), torch.zeros(800, dtype=torch.int64)
    ids = torch.stack([even, one], -1)
    line = codebook_line(codebook_report(ids, (8, 64))["codebook_counts"], (8, 64))
    assert line["train/codebook_usage"] == pytest.approx((1 + 1 / 64) / 2)
    assert line["train/codebook_perplexity"] == pytest.approx((8 + 1) / 2)
    assert line["train/codebook_usage_share"] == line["train/codebook_perplexity_share"] == 0
    assert line["train/codebook_tokens"] == 800
    same = lit.codebook_use([ids[:, None]], (8, 64))
    assert same["codebook_perplexity"] == pytest.approx(line["train/codebook_perplexity"])
    assert same["codebook_usage"] == pytest.approx(line["train/codebook_usage"])
    drawn = torch.randint(4096, (1000, 1), generator=torch.Generator().manual_seed(0))
    line = codebook_line(codebook_report(drawn, (4096,))["codebook_counts"], (4096,))
    assert line["train/codebook_usage"] < 0.25  # few tokens, which say nothing against the codebook
    assert line["train/codebook_perplexity_share"] == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="codebook_counts.* has 4096 entries.*codebook_sizes=.64,. make 64"):
        codebook_line(torch.zeros(4096, dtype=torch.int64), (64,))
    assert codebook_line(torch.zeros(64, dtype=torch.int64), (64,)) == {}


@pytest.mark.parametrize("rule", alarms.RULES)
def test_each_rule_speaks_after_so_many_bad_lines_in_a_row(rule):
    bad = {**HEALTHY, **BAD[rule]}
    lines = [HEALTHY] * 6 + [bad] * 2 + [HEALTHY] + [bad] * 2
    assert look(fast(), lines) == []
    action = getattr(AlarmConfig(), rule)
    assert look(fast(), [*lines, bad]) == [(12, rule, action)]
    assert look(fast(**{rule: "off"}), [*lines, bad]) == []
    assert look(fast(warmup_steps=10), [*lines, bad]) == []
    assert look(fast(enabled=False), [*lines, bad]) == []
    text = [a.text for a in fast(lines=1).look(1, HEALTHY)]
    assert text == []
    told = Alarms(AlarmConfig(warmup_steps=0, lines=2))
    for step in range(4):
        told.look(step, HEALTHY)
    told.look(5, bad)
    (alarm,) = told.look(6, bad)
    assert "optim." in alarm.text or "objective." in alarm.text  # what to change
    assert f"trainer.alarms.{rule}=" in alarm.text and "2 lines in a row up to step 6" in alarm.text


def test_rules_of_absent_numbers_and_of_losses_without_a_zero_are_silent():
    assert look(fast(), [{"train/loss": 2.0}] * 9 + [{"train/loss": 2.5}] * 9) == []
    assert look(fast(), [{"train/loss": -2.0}] * 9 + [{"train/loss": 40.0}] * 9) == []  # -2 has no multiples
    assert look(fast(), [{"train/loss": 2.0}] * 9 + [{"train/loss": 7.0}] * 3) == [(12, "divergence", "stop")]
    wasserstein = {"train/discriminator": -4.0, "train/logits_real": 3.0, "train/logits_fake": -1.0}
    assert look(fast(), [wasserstein] * 9) == []
    for loss in (1.0, math.log(2)):
        pinned = {"train/discriminator": loss, "train/logits_real": 0.0, "train/logits_fake": 0.0}
        assert look(fast(), [pinned] * 3) == [(3, "discriminator_dead", "warn")]


def test_one_easy_batch_is_no_record_to_fall_back_from():
    lines = [{"train/l1": 0.1}] * 5 + [{"train/l1": 0.001}] + [{"train/l1": 0.1}] * 20
    assert look(fast(), lines) == []
    assert look(fast(), [{"train/l1": 0.1}] * 5 + [{"train/l1": math.nan}] * 3) == [(8, "divergence", "stop")]


def test_a_warning_comes_once_and_a_stop_again_after_as_many_lines():
    bad = {**HEALTHY, **BAD["divergence"]}
    lines = [HEALTHY] * 4 + [bad] * 9
    assert look(fast(divergence="warn"), lines) == [(7, "divergence", "warn")]
    assert look(fast(divergence="stop"), lines) == [(i, "divergence", "stop") for i in (7, 10, 13)]


def test_a_state_goes_on_where_it_was():
    torch.manual_seed(0)
    lines = []
    for i in range(60):
        line = {k: v * float(1 + 0.2 * torch.randn(())) for k, v in HEALTHY.items()}
        lines.append({**line, **BAD[list(BAD)[i % 6]]} if i % 7 < 4 or i > 40 else line)
        lines[-1] |= BAD["divergence"] if i > 45 else {}
    whole = look(fast(divergence="warn"), lines)
    assert whole
    for cut in range(0, 60, 7):
        before = fast(divergence="warn")
        first = look(before, lines[:cut])
        after = fast(divergence="warn")
        after.restore(json.loads(json.dumps(before.state())))
        assert first + look(after, lines[cut:], cut + 1) == whole


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(divergence="halt"), "trainer.alarms.divergence='halt'.*warn, stop, off"),
        (dict(lines=0), "lines=0 must be 1"),
        (dict(codebook_share=0.0), "codebook_share=0.0 must be above 0"),
        (dict(divergence_factor=1.0), "divergence_factor=1.0 must be above 1"),
    ],
)
def test_thresholds_that_cannot_hold_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Alarms(AlarmConfig(**settings))


def test_a_bare_off_of_yaml_is_off(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {name: outside.tiny}\ntrainer: {alarms: {divergence: off}}\n")
    both = load(path, ["trainer.alarms.codebook_collapse=off"])
    actions = Alarms(both.trainer.alarms).actions
    assert actions["divergence"] == actions["codebook_collapse"] == "off"


def test_norms_of_parts_make_the_joint_norm():
    gradients = [torch.randn(5, 3), torch.randn(7), torch.randn(2, 2), torch.randn(4)]
    joint, parts = total_norms(gradients, ["", "", "objective.adversarial", "objective.adversarial"])
    assert joint == torch.nn.utils.get_total_norm(gradients)
    assert list(parts) == ["model", "adversarial"]
    assert parts["model"] == torch.nn.utils.get_total_norm(gradients[:2])
    assert joint.item() == pytest.approx(math.hypot(*[p.item() for p in parts.values()]))
    assert total_norms(gradients, [""] * 4)[1] == {}


# whole runs


def counted(patch, *, collapse_at: int = 1 << 30, tokens: int = 8) -> None:
    """The tiny family reports its ids, of so many tokens a clip; from a step on they are all one."""
    forward = outside.tiny.Objective.forward

    def with_ids(self, model, clip, step):
        loss = forward(self, model, clip, step)
        with torch.no_grad():
            ids = (model.quantize(clip).round() + 2).long().clamp(0, 4)
        ids = torch.full_like(ids, 2) if step >= collapse_at else ids
        loss.report.pop("tokens")
        return Loss(loss.total, {**loss.report, **codebook_report(ids[:, :tokens], model.codebook_sizes)})

    patch.setattr(outside.tiny.Objective, "forward", with_ids)


EAGER = {"warmup_steps": 2, "lines": 2}


def test_a_collapse_ends_the_run_saved_with_advice_and_goes_on_if_told(tmp_path, monkeypatch, capsys):
    counted(monkeypatch, collapse_at=4)
    trainer = {"max_steps": 14, "log_every": 2, "alarms": EAGER, "val_every": 8}
    config = test_train.settings(tmp_path, trainer=trainer)
    with pytest.raises(alarms.AlarmError, match="stopped at step 8, saved as .*the codebook has collapsed.*fsq"):
        training.train(config, data=test_train.Data())
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert strategy.describe(last)["step"] == 8 and not (tmp_path / "run" / "lock").exists()
    told = [row for row in test_train.metrics(tmp_path / "run") if "alarm" in row]
    assert [(r["step"], r["alarm"], r["action"]) for r in told] == [(8, "codebook_collapse", "stop")]
    with pytest.raises(alarms.AlarmError, match="stopped at step 12"):  # two more lines, and the validation it owed
        training.train(config, data=test_train.Data())
    assert 8 in [r["step"] for r in test_train.metrics(tmp_path / "run") if "val/loss" in r]
    trainer["alarms"] = {**EAGER, "codebook_collapse": "warn"}
    trainer["progress"] = True
    capsys.readouterr()
    run = training.train(test_train.settings(tmp_path, trainer=trainer), data=test_train.Data())
    assert strategy.describe(last)["step"] == 14
    assert len([row for row in test_train.metrics(run) if "alarm" in row]) == 2  # told already
    lines = [r for r in test_train.metrics(run) if "train/loss" in r]
    assert lines[0]["train/codebook_usage"] > 0.3 and lines[-1]["train/codebook_usage"] == pytest.approx(0.2)
    assert lines[0]["train/codebook_tokens"] == 2 * test_train.BATCH * 8
    assert "val/codebook_counts" not in {k for r in test_train.metrics(run) for k in r}
    assert math.hypot(lines[-1]["train/grad_norm_model"], lines[-1]["train/grad_norm_discriminator"]) == pytest.approx(
        lines[-1]["train/grad_norm"], rel=0.05
    )  # means over two steps of what is equal in each


def test_counts_and_alarms_survive_a_resume_in_the_middle_of_a_line(tmp_path, monkeypatch, capsys):
    counted(monkeypatch, collapse_at=3, tokens=3)
    trainer = {"max_steps": 12, "log_every": 4, "progress": True, "alarms": {**EAGER, "codebook_collapse": "warn"}}
    whole = training.train(test_train.settings(tmp_path, name="whole", trainer=trainer), data=test_train.Data())
    assert capsys.readouterr().out.count("warning: the codebook has collapsed") == 1
    config = test_train.settings(tmp_path, name="cut", trainer=trainer)
    for batch in (3, 10):
        with pytest.raises(SystemExit):
            training.train(config, data=test_train.Data(signal_at={batch: signal.SIGTERM}))
    cut = training.train(config, data=test_train.Data())
    assert test_train.metrics(whole, timeless=True) == test_train.metrics(cut, timeless=True)
    assert "codebook_collapse" in [row.get("alarm") for row in test_train.metrics(cut)]
    lines = [row for run in (whole, cut) for row in test_train.metrics(run) if "train/loss" in row]
    rates = [row["train/tokens_per_s"] / row["train/clips_per_s"] for row in lines]
    assert rates == pytest.approx([3] * len(rates)), "tokens that were counted, since this process began the line"


def test_a_healthy_run_hears_nothing_at_the_most_eager(tmp_path, monkeypatch):
    counted(monkeypatch)
    trainer = {"max_steps": 40, "log_every": 1, "alarms": {"warmup_steps": 0, "lines": 2}}
    run = training.train(test_train.settings(tmp_path, trainer=trainer, optim={"lr": 3e-3}), data=test_train.Data())
    assert [row["alarm"] for row in test_train.metrics(run) if "alarm" in row] == []


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import pytest, test_alarms, test_strategy, test_train, torch
from pathlib import Path
torch.set_num_threads(1)
test_alarms.counted(pytest.MonkeyPatch(), collapse_at=2)
from vtok.train import train
from torch.utils.data import DataLoader
class Data(test_train.Data):
    def advance(self, clip):
        self.done += 1
trainer = {{"devices": 2, "strategy": sys.argv[2], "max_steps": 40, "log_every": 2, "alarms": test_alarms.EAGER}}
train(test_train.settings(Path(sys.argv[1]), name=sys.argv[2], trainer=trainer), data=Data())
"""


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["ddp", pytest.param("deepspeed_2", marks=pytest.mark.long)])
def test_two_processes_stop_together(tmp_path, chosen):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(script), str(tmp_path), chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, cwd=tmp_path)
    assert done.returncode not in (0, -6), done.stderr[-3000:]
    assert done.stderr.count("AlarmError: stopped at step 6") == 2, done.stderr[-3000:]  # each rank
    assert strategy.describe(tmp_path / chosen / "checkpoints" / "last.ckpt")["step"] == 6
    line = [r for r in test_train.metrics(tmp_path / chosen) if "train/codebook_tokens" in r][0]
    assert line["train/codebook_tokens"] == 2 * 2 * test_train.BATCH * 8  # of both ranks
