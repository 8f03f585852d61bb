"""Operations of a step as it is trained, MFU, memory: counted numbers, and none where they are not known."""

import json
import math
import mmap

import pytest
import test_train
import torch
import torch.utils.checkpoint
from torch import nn

from vtok import train as training
from vtok.training.telemetry import PEAKS, FlopCount, Telemetry, host_memory_gib, kind_of, peak_tflops
from vtok.types import Clip

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, precision, expected",
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4),
        ("NVIDIA H100 PCIe", "bf16-true", 756.0),
        ("NVIDIA H100 NVL", "32-true", 60.0),
        ("NVIDIA H200", "16-mixed", 989.4),
        ("NVIDIA GH200 480GB", "bf16-mixed", 989.4),
        ("NVIDIA A100-SXM4-80GB", "32-true", 19.5),
        ("NVIDIA A10", "bf16-mixed", 125.0),
        ("NVIDIA A10G", "bf16-mixed", None),  # another device
        ("NVIDIA L4", "bf16-mixed", 121.0),
        ("NVIDIA L40S", "bf16-mixed", 362.1),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16-mixed", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "bf16-mixed", None),
        ("Tesla V100-SXM2-16GB", "bf16-mixed", None),  # no matrix units for bfloat16
        ("Tesla V100-SXM2-16GB", "16-mixed", 125.0),
        ("NVIDIA B200", "32-true", None),
        ("some other device", "32-true", None),
        ("", "32-true", None),
    ],
)
def test_peaks_are_found_by_the_name_of_the_device(name, precision, expected):
    assert peak_tflops(name, precision) == expected


def test_every_peak_has_a_source_and_none_is_zero():
    assert all(source for _, _, source in PEAKS)
    assert all(value is None or value > 0 for _, peak, _ in PEAKS for value in peak)


def run(count: FlopCount, model: nn.Module, x: torch.Tensor, kind: str = "a") -> float:
    count.begin(kind)
    loss = model(x).square().sum()
    count.before_backward()
    loss.backward()
    return count.after_backward()


def linear_flops(rows: int, inside: int, outside: int) -> int:
    return 2 * rows * inside * outside


def test_a_step_of_linear_layers_takes_what_arithmetic_says():
    model, x = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False)), torch.randn(5, 8)
    first, second = linear_flops(5, 8, 16), linear_flops(5, 16, 4)
    # backward: gradients of both weights, and of the second layer's input alone
    assert run(FlopCount(), model, x) == first + second + first + 2 * second


class Recomputed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def test_what_activation_checkpointing_computes_again_is_not_counted():
    model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), torch.randn(5, 8)
    plain = run(FlopCount(), model, x)
    assert run(FlopCount(), Recomputed(model), x) == plain > 0


def test_batches_are_counted_at_powers_of_two_and_the_mean_of_a_kind_stands_for_its_others():
    count, model = FlopCount(), nn.Linear(4, 4, bias=False)
    one = 2 * linear_flops(1, 4, 4)
    found = [run(count, model, torch.randn(1 if i < 3 else 7, 4)) for i in range(7)]
    assert found[:3] == [one] * 3 and found[3:] == [3 * one] * 4  # the fourth takes seven times as much
    assert count.state() == {"batches": 7, "known": {"a": [3, 9 * one]}}
    again = FlopCount()
    again.restore(json.loads(json.dumps(count.state())))
    assert run(again, model, torch.randn(7, 4), "b") == 7 * one  # the eighth
    assert run(again, model, torch.randn(5, 4), "a") == 3 * one
    assert again.of("never met") == 4 * one and again.batches == 9
    again.restore({})
    assert again.batches == 0 and math.isnan(again.of("a"))


def test_counting_leaves_gradients_as_they_are_and_block_sparse_attention_as_it_was():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(3, 8)
    model[0].flex = True
    seen = []
    model[0].register_forward_hook(lambda module, *_: seen.append(module.flex))
    run(FlopCount(enabled=False), model, x)
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    run(FlopCount(model), model, x)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain))
    assert seen == [True, False] and model[0].flex is True


def test_an_error_in_the_middle_leaves_no_counter_behind():
    count, model = FlopCount(), nn.Linear(4, 4)
    count.begin("a")
    count.close()
    assert math.isnan(count.of("a"))
    model(torch.randn(1, 4)).sum().backward()
    assert math.isnan(count.of("a"))
    assert run(count, model, torch.randn(1, 4), "b") > 0


def test_kinds_tell_shapes_lengths_of_texts_and_resting_parts_apart():
    video = torch.zeros(2, 3, 4, 8, 8, dtype=torch.uint8)
    clip = Clip(keys=["a", "b"], video=video)
    assert kind_of(clip) == kind_of(Clip(keys=["c", "d"], video=video.clone()))
    assert kind_of(clip) != kind_of(clip, {"objective.discriminator"})
    assert kind_of(clip) != kind_of(Clip(keys=["a"], video=video[:1]))
    short, long = (Clip(keys=["a"], text=[text]) for text in ("a few words", "many words " * 100))
    assert kind_of(short) != kind_of(long)


def test_mfu_is_null_where_the_peak_is_not_known_and_never_zero():
    model = nn.Linear(4, 4)
    for peak, expected in ((None, None), (1e-9, pytest.approx(64 / 2 / 1e3))):
        telemetry = Telemetry(model, CPU, precision="32-true", peak=peak)
        telemetry.flops.begin("a")
        loss = model(torch.randn(1, 4)).sum()
        telemetry.flops.before_backward()
        loss.backward()
        telemetry.batch_ended()
        line = telemetry.line(2.0)
        assert line["train/tflops_per_s"] == pytest.approx(64 / 2 / 1e12)
        assert math.isnan(line["train/mfu"]) if expected is None else line["train/mfu"] == expected
        assert math.isnan(line["train/device_memory_gib"]) and line["train/host_memory_gib"] > 0.05
    off = Telemetry(model, CPU, precision="32-true", peak=1.0, enabled=False).line(1.0)
    assert math.isnan(off["train/mfu"]) and math.isnan(off["train/tflops_per_s"])


def test_host_memory_is_that_of_this_process():
    before = host_memory_gib()
    with mmap.mmap(-1, 64 << 20) as held:  # a tensor may get what an earlier one gave back, which is resident already
        held.write(b"\1" * len(held))
        assert host_memory_gib() - before == pytest.approx(1 / 16, abs=0.01)


def test_a_run_is_the_same_bit_by_bit_whether_its_operations_are_counted(tmp_path):
    runs = []
    for name, count in (("counted", True), ("not", False)):
        trainer = {"ledger": True, "count_flops": count, "peak_tflops": 0.01, "accumulate": 2, "max_steps": 6}
        optim = {"lr_multipliers": {"model.inward": 0.1}}
        config = test_train.settings(tmp_path, name=name, trainer=trainer, optim=optim)
        runs.append(training.train(config, data=test_train.Data()))
    counted, plain = runs
    assert (counted / "ledger-0.txt").read_text() == (plain / "ledger-0.txt").read_text()
    rows = [[r for r in test_train.metrics(run) if "train/loss" in r] for run in runs]
    assert all(r["train/mfu"] > 0 and r["train/tflops_per_s"] > 0 for r in rows[0])
    assert all(r["train/mfu"] is None and r["train/tflops_per_s"] is None for r in rows[1])
    assert rows[0][0]["train/lr_model.inward"] == pytest.approx(0.1 * rows[0][0]["train/lr"])
    flops = test_train.checkpoint(counted)["vtok"]["flops"]
    assert flops["batches"] == 12 and [entry[0] for entry in flops["known"].values()] == [4]  # 1, 2, 4, 8


def test_a_peak_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trainer.peak_tflops=0.0 must be above 0, or null"):
        training.check(test_train.settings(tmp_path, trainer={"peak_tflops": 0.0}))
