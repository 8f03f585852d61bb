"""`vtok info CONFIG`: what is said of a run before it starts is what its step then takes.

Steps are taken for real, with torch's own counter of operations and hooks on what is saved for the backward pass; the
estimate, made without numbers, has to say the same.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from vtok import train
from vtok.cli import main
from vtok.config import load
from vtok.info.dry_run import DryRun, measure
from vtok.info.estimate import ANSWER_WORDS, Estimate, _memory, estimate, table
from vtok.info.skeletons import Skeletons, published
from vtok.metrics.operations import Operations
from vtok.types import Clip

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

from tiny_tower import write_tower  # noqa: E402

TOLERANCE = 0.1
NO_PERCEPTUAL = "objective.perceptual=0"
SMALL = ["data.batch_size=2", "trainer.max_steps=30"]
CASES = {
    "flexible/debug": [],
    "flexible/adaptok_scorer_tiny": [NO_PERCEPTUAL, "objective.scorer_metric=mse"],
    "flexible/halting_tiny": [NO_PERCEPTUAL],
    "flexible/larp_tiny": [NO_PERCEPTUAL, "objective.adversarial.start=2"],
    "discrete/debug": [],
    "discrete/vidtok_fsq_488_tiny": [NO_PERCEPTUAL, "objective.adversarial.start=2"],
    "discrete/omnitokenizer_vq_tiny": [NO_PERCEPTUAL, "objective.adversarial.start=2"],
    "reducer/tiny": [],
    "reducer/tiny_pooling": [],
    "temporal/tdc_tiny": [],
    "vqtoken/tiny": ["model.num_tokens=16"],  # seeds are found one after the other
}
QUICK = ("flexible/debug", "reducer/tiny")
LONG = ("flexible/halting_tiny", "discrete/vidtok_fsq_488_tiny", "reducer/tiny_pooling")  # of the same kinds as others


def marked(case: str):
    marks = [] if case in QUICK else [pytest.mark.long] if case in LONG else [pytest.mark.slow]
    return pytest.param(case, marks=marks)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> list[str]:
    """Settings that name a small tower and a small language model."""
    folder = tmp_path_factory.mktemp("frozen")
    write_tower(folder / "tower", size=32, patch=8, width=32)
    made = Tokenizer(WordLevel({"<word>": 0, "<end>": 1}, unk_token="<word>"))
    made.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    settings = transformers.Qwen2Config(**shape, num_key_value_heads=2, max_position_embeddings=2048)
    transformers.Qwen2ForCausalLM(settings).save_pretrained(folder / "llm")
    words.save_pretrained(folder / "llm")
    return [f"model.tower.name={folder / 'tower'}", f"objective.llm.name={folder / 'llm'}"]


def settings(case: str, frozen: list[str]):
    given = [*SMALL, *CASES[case]]
    if case.partition("/")[0] in ("reducer", "temporal", "vqtoken"):
        given += [*frozen, "objective.budgets.law=full"]
    config = load(ROOT / "configs" / f"{case}.yaml", given)
    if getattr(config.objective, "nested", None) is not None:
        config.objective.nested.mode = "full"
    return config


def take_step(config) -> dict[str, int]:
    """One step as the trainer takes it: its parameters, operations, bytes saved for the backward pass, tokens."""
    lit = train.build(config)
    data, channels = config.data, getattr(config.model, "channels", 3)
    frames, batch = data.num_frames, data.batch_size
    if data.part_frames and data.part_batch_sizes:  # the heaviest batch that comes
        frames, batch = max(zip(data.part_frames, data.part_batch_sizes), key=lambda part: part[0] * part[1])
    shape = (batch, channels, frames, *data.size)
    words = data.text_words or ANSWER_WORDS
    clip = Clip(
        keys=[str(row) for row in range(batch)],
        video=torch.randint(0, 256, shape, dtype=torch.uint8),
        lengths=torch.full((batch,), frames),
        times=(torch.arange(frames) / (data.fps or 8.0)).expand(batch, -1),
        text=[" ".join(["word"] * words)] * batch if hasattr(lit.model, "compress") else None,
        prompt=[""] * batch if getattr(lit.model, "reads_prompt", False) else None,
    )
    if data.texts:
        clip = Clip(clip.keys, text=clip.text)
    owned = {t.untyped_storage()._cdata for t in (*lit.parameters(), *lit.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            saved[storage._cdata] = storage
        return tensor

    torch.manual_seed(config.seed)
    counter = Operations()
    with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = lit.objective(lit.model, clip.as_float(), config.trainer.max_steps - 1).total
        forward = counter.get_total_flops()
        frozen_parts = [lit.objective.llm.model] if hasattr(lit.model, "compress") else []
        towers = [lit.model.tower.model] if frozen_parts and not data.texts else []
        frozen_parts += towers
        owned |= {p.untyped_storage()._cdata for part in frozen_parts for p in part.parameters()}
        bytes_saved = sum(s.nbytes() for key, s in saved.items() if key not in owned)
        loss.backward()
    with torch.no_grad():
        tokens = lit.model.encode(clip.as_float())
    return {
        "parameters": sum(p.numel() for p in lit.model.parameters()),
        "parameters_trained": sum(p.numel() for p in lit.parameters() if p.requires_grad),
        "parameters_tower": sum(p.numel() for tower in towers for p in tower.parameters()),
        "parameters_llm": sum(p.numel() for p in frozen_parts[0].parameters()) if frozen_parts else 0,
        "forward_flops": forward,
        "backward_flops": counter.get_total_flops() - forward,
        "activation_bytes": bytes_saved,
        "tokens_per_clip": float(tokens.lengths.double().mean()),
    }


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_the_estimate_is_what_a_step_takes(case, frozen):
    config = settings(case, frozen)
    said, taken = estimate(config), take_step(config)
    for name in ("parameters", "parameters_trained", "parameters_tower", "parameters_llm"):
        assert getattr(said, name) == taken[name], name
    for name in ("forward_flops", "backward_flops", "activation_bytes", "tokens_per_clip"):
        assert getattr(said, name) == pytest.approx(taken[name], rel=TOLERANCE), name
    assert said.peak_bytes >= said.activation_bytes
    assert said.optimizer_bytes == 8 * taken["parameters_trained"]
    if said.parameters_tower:
        assert 0 < said.tower_flops and 0 < said.llm_flops and said.tower_flops + said.llm_flops <= said.forward_flops


def test_a_dry_step_is_the_real_one():
    """Operations and bytes of a step with masks, ragged lengths, checkpoints and attention are the same to the bit."""
    net = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    lengths = torch.tensor([5, 3])

    def step(x, net):
        real = torch.arange(x.shape[1]) < lengths[:, None]
        y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
        y = y[real]  # [8, 16]
        out = torch.zeros_like(x)
        out[real] = y
        chosen = out.norm(dim=-1).argmax(1)
        return out[torch.arange(2), chosen].square().sum() / int(lengths.sum())

    x = torch.randn(2, 5, 16)
    real = measure(lambda: step(x, net), held=[*net.parameters(), x])
    with DryRun() as run:
        x = run.empty(2, 5, 16)
        run.empty_module(net)
        dry = measure(lambda: step(x, net), held=[*net.parameters(), x])
    assert dry == real and real.forward_flops > 0 and real.peak_bytes > real.held_bytes > 0


def test_large_modules_are_moved_in_place():
    """As peft moves its adapters: the parameter stays the one that others hold, also where it is tied."""
    move = torch.nn.Module._apply
    with DryRun():
        layer, tied = torch.nn.Linear(1024, 2048, bias=False), torch.nn.Linear(1024, 2048)
        own = tied.weight = layer.weight
        layer.to("cpu", dtype=torch.float32)
        both = torch.nn.ModuleList([layer, tied]).to(torch.bfloat16)
        assert layer.weight is tied.weight is own and own.dtype == tied.bias.dtype == torch.bfloat16
        assert {name for name, _ in both.named_parameters()} == {"0.weight", "1.bias"}
        layer(torch.zeros(2, 1024, dtype=torch.bfloat16)).sum().backward()
        assert own.grad is not None and own.grad.dtype == torch.bfloat16
        assert layer.float().weight.dtype == layer.weight.grad.dtype == torch.float32
    assert torch.nn.Module._apply is move


def test_what_hangs_on_large_numbers_is_refused():
    with DryRun() as run:
        large = run.empty(1 << 21)
        with pytest.raises(ValueError, match="hangs on 2097152 numbers"):
            large[large > 0]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen/Qwen2-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen/Qwen2-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen3-4B", 4_022_468_096),
    ],
)
def test_published_shapes_have_the_published_parameters(name, count):
    config = published(name)
    config.num_hidden_layers, layers = 1, config.num_hidden_layers
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    of_layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert sum(p.numel() for p in model.parameters()) + (layers - 1) * of_layer == count


def test_other_names_are_not_guessed():
    assert published("Qwen/Qwen2-57B-A14B") is None and published("someone/Qwen2-7B") is None


def test_memory_follows_the_strategy():
    base = dict(
        name="x", family="y", parameters=10, parameters_objective=0, parameters_trained=10, parameters_tower=0,
        parameters_llm=0, batch_size=2, accumulate=3, world_size=4, tokens_per_clip=8.0, bits_per_clip=None,
        forward_flops=100, tower_flops=0, llm_flops=0, backward_flops=200, weights_bytes=40, gradient_bytes=40,
        optimizer_bytes=80, averaged_bytes=40, activation_bytes=1000, peak_bytes=1100, max_steps=5,
    )  # fmt: skip
    made = Estimate(**base)
    assert made.flops_per_step == 900 and made.run_flops == 900 * 4 * 5 and made.memory_bytes == 40 + 80 + 40 + 1100
    lit = train.build(load(ROOT / "configs" / "flexible" / "debug.yaml"))
    learned, nothing = list(lit.parameters()), Skeletons(empty=lambda x: x, watch=lambda _, f: f)
    split = {}
    for strategy in ("ddp", "fsdp", *(f"deepspeed_{x}" for x in ("1", "2", "3", "2_offload", "3_offload"))):
        changes = [f"trainer.strategy={strategy}", "trainer.devices=4", "trainer.precision=bf16-mixed"]
        config = load(ROOT / "configs" / "flexible" / "debug.yaml", changes)
        split[strategy] = SimpleNamespace(**_memory(config, lit, nothing, learned))
    count = sum(p.numel() for p in learned)
    assert split["ddp"].weights_bytes == split["ddp"].gradient_bytes == 4 * count
    assert split["ddp"].optimizer_bytes == 8 * count
    for stage in (1, 2, 3):
        found = split[f"deepspeed_{stage}"]
        assert found.optimizer_bytes == -(-12 * count // 4)
        assert found.gradient_bytes == (-(-2 * count // 4) if stage > 1 else 2 * count)
        assert found.weights_bytes == (-(-2 * count // 4) if stage > 2 else 2 * count)
    assert split["fsdp"].weights_bytes == -(-4 * count // 4) + 4 * count  # its part, and the whole for a step
    assert split["fsdp"].optimizer_bytes == -(-8 * count // 4)
    for stage in (2, 3):  # what left the device is in the host's memory, nothing is lost on the way
        found, kept = split[f"deepspeed_{stage}_offload"], split[f"deepspeed_{stage}"]
        assert found.optimizer_bytes == found.gradient_bytes == 0 and kept.host_bytes == 0
        assert found.weights_bytes == (0 if stage == 3 else kept.weights_bytes)
        moved = kept.optimizer_bytes + kept.gradient_bytes + kept.weights_bytes - found.weights_bytes
        assert found.host_bytes == moved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "llm"),
    [
        ("vqtoken/paper", 494_032_768),
        pytest.param("vqtoken/vqtoken", 494_032_768, marks=pytest.mark.long),  # 256 seeds, one after the other
        pytest.param("temporal/tdc", 7_615_616_512, marks=pytest.mark.long),
    ],
)
def test_full_presets_are_judged_without_their_weights(preset, llm):
    path = ROOT / "configs" / f"{preset}.yaml"
    found = estimate(load(path, ["data.batch_size=1"]))
    stated = re.search(r"Parameters: ([\d.]+) M", path.read_text())
    assert stated and found.parameters / 1e6 == pytest.approx(float(stated[1]), abs=0.051)
    assert found.parameters_llm == llm and found.parameters_tower > 4e8
    assert any("shapes as published" in note for note in found.notes)
    # two operations a weight and position, and attention: what is counted lies between simple bounds
    frames = load(path).data.num_frames
    assert (
        2 * found.parameters_tower * 0.9 * 729 * frames < found.tower_flops < 3 * found.parameters_tower * 729 * frames
    )
    assert found.llm_flops < found.backward_flops


def test_the_command(capsys, tmp_path):
    path = ROOT / "configs" / "flexible" / "debug.yaml"
    assert main(["info", str(path), *SMALL, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["family"] == "flexible" and said["batch_size"] == 2
    assert said["flops_per_step"] == said["forward_flops"] + said["backward_flops"]
    shown = table(
        Estimate(**{k: v for k, v in said.items() if k not in ("flops_per_step", "run_flops", "memory_bytes")})
    )
    assert "trained" in shown and "a step and device (1 device(s) x 2 clips)" in shown
    assert main(["info", str(path), "--yaml"]) == 0
    assert "num_tokens:" in capsys.readouterr().out
    other = tmp_path / "video.vtok"
    other.write_bytes(b"VTOK")
    assert main(["info", str(other), "--json"]) == 1
    assert "is no config (.yaml)" in capsys.readouterr().err
    preset = ROOT / "configs" / "reducer" / "tiny.yaml"
    assert main(["info", str(preset), "model.tower.name=hf:someone/tower"]) == 1
    assert "neither its FLOPs nor the size of its features" in capsys.readouterr().err
