"""What a run will need, before it is started: parameters, operations and memory of a step, tokens of a clip.

    config --DryRun, Skeletons--> model, objective, one training step without numbers --> Estimate --> table | json

The step is the one that would be trained, op by op (dry_run.py): FLOPs and activations are counted, not modelled. No
weights are read, no device is touched; a language model of seven billion parameters takes no memory here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtok import projecting
from vtok.config import RunConfig, load_family
from vtok.info.dry_run import DryRun, Watch, measure, precision
from vtok.info.skeletons import Skeletons
from vtok.info.steps import Steps
from vtok.train import build
from vtok.training import strategy
from vtok.training.lit import LitCompressor
from vtok.types import Clip, Features

ANSWER_WORDS = 32  # of a caption or an answer that a projector learns, and of a text where data.text_words is open
WEIGHTS = ("perceptual_weights", "video_perceptual_weights", "flow_weights")


@dataclass
class Estimate:
    """Counts are exact; bytes and FLOPs are those of one device. A multiply-add is two FLOPs."""

    name: str
    family: str
    parameters: int  # of the model: what ships
    parameters_objective: int  # losses with weights of their own, frozen ones included
    parameters_trained: int
    parameters_tower: int
    parameters_llm: int
    batch_size: int  # clips a device and micro-batch
    accumulate: int
    world_size: int
    tokens_per_clip: float  # without a budget
    bits_per_clip: float | None  # nominal; None: continuous tokens
    forward_flops: int  # of a micro-batch, tower and language model included
    tower_flops: int
    llm_flops: int  # forward
    backward_flops: int
    weights_bytes: int
    gradient_bytes: int
    optimizer_bytes: int  # moments, and the float32 copy of weights where an engine keeps one
    averaged_bytes: int  # optim.ema_decay
    activation_bytes: int  # held when the backward pass begins
    peak_bytes: int  # activations, temporaries and gradients at the worst moment of a step
    max_steps: int
    host_bytes: int = 0  # of one device's share of what is kept in the host's memory (_offload)
    notes: list[str] = field(default_factory=list)

    @property
    def flops_per_step(self) -> int:
        """Of one device and one optimizer step."""
        return (self.forward_flops + self.backward_flops) * self.accumulate

    @property
    def run_flops(self) -> int:
        """Of all devices and steps."""
        return self.flops_per_step * self.world_size * self.max_steps

    @property
    def memory_bytes(self) -> int:
        """Of one device, at the worst moment; what libraries and fragmentation take comes on top."""
        return self.weights_bytes + self.optimizer_bytes + self.averaged_bytes + self.peak_bytes

    def values(self) -> dict[str, Any]:
        """As plain values."""
        own = {name: getattr(self, name) for name in ("flops_per_step", "run_flops", "memory_bytes")}
        return {**asdict(self), **own}


def estimate(config: RunConfig, *, answer_words: int | None = None, worst: bool = True, step: int = -1) -> Estimate:
    """What training by a configuration takes.

    Args:
        answer_words: of the captions that a projector learns, or of the texts that it compresses; None: 32, or, of
            texts, `data.text_words`.
        worst: with as many tokens as training ever draws; False: with those it draws at the step.
        step: whose losses are counted; -1 = the last one, when all of them are on.
    Raises: ValueError for settings that do not work together, for towers and language models whose configuration is not
        on this machine, and for a model whose course hangs on what its large tensors hold.
    """
    config = copy.deepcopy(config)
    watch, notes = Watch(), []
    config.init_from, config.init_allow = "", []
    config.trainer.compile = False
    if worst:
        notes += _every_token(config)
    for key in WEIGHTS:  # a path that is still to be filled in
        if hasattr(config.objective, key) and not getattr(config.objective, key):
            setattr(config.objective, key, "(none)")
    load_family(config.model.name)
    with DryRun() as run:
        parts = Skeletons(empty=run.empty_module, watch=watch.of)
        with parts.in_place(), Steps(watch).in_place():
            lit = build(config, fresh=False)  # what a fresh one begins from is not looked at
            kept = [getattr(lit.objective, "llm", None), getattr(lit.model, "_reference", None)]
            # the rest was read for its weights, which the model now holds
            parts.llms = {key: llm for key, llm in parts.llms.items() if any(llm is each for each in kept)}
            run.empty_module(lit, torch.bfloat16 if config.trainer.precision == "bf16-true" else None)
            for llm in parts.llms.values():  # whose adapters are the objective's
                run.empty_module(llm.model)
            clip = _clip(config, lit.model, run, _words(config, answer_words, notes))
            held = _held(lit, clip, parts)
            lit.train()
            torch.manual_seed(config.seed)
            count = config.trainer.max_steps - 1 if step < 0 else step
            run.guessed = False
            with precision(config.trainer.precision):
                cost = measure(
                    lambda: lit.objective(lit.model, lit._prepare(clip), count).total, held=held, watch=watch
                )
            if run.guessed:
                notes.append("choices that hang on what is seen (cuts, clusters) were made at random")
            lit.eval()
            with torch.no_grad():
                ready = replace(clip.as_float(), prompt=[""] * len(clip))  # for models whose tokens are for a question
                tokens: Any = lit.model.encode(ready)  # pyright: ignore[reportCallIssue]
            bits = tokens.bits.mean() if tokens.codebook_sizes else None
    if strategy.stage_of(config.trainer.strategy):
        notes.append("a step's peak is counted with whole gradients and without the engine's own buffers")
    if config.trainer.strategy == "deepspeed_3_offload":
        notes.append("layers come from the host's memory as they are needed; those on the device are not counted")
    audio = getattr(config.model, "audio", None)
    if audio is not None and audio.name:
        notes.append(f"model.audio.name={audio.name}: as from recorded features; live, the audio tower comes on top")
    trained = [p for p in lit.parameters() if p.requires_grad]
    memory = _memory(config, lit, parts, trained)
    return Estimate(
        name=config.name,
        family=config.model.name,
        parameters=_count(lit.model.parameters()),
        parameters_objective=_count(lit.objective.parameters()),
        parameters_trained=_count(trained),
        parameters_tower=sum(_count(tower.model.parameters()) for tower in parts.towers.values()),
        parameters_llm=sum(_count(llm.model.parameters()) for llm in parts.llms.values()),
        batch_size=len(clip),
        accumulate=config.trainer.accumulate,
        world_size=config.trainer.devices * config.trainer.num_nodes,
        tokens_per_clip=float(tokens.lengths.double().mean()),
        bits_per_clip=None if bits is None else float(bits),
        forward_flops=cost.forward_flops,
        tower_flops=watch.flops.get("tower", 0),
        llm_flops=watch.flops.get("llm", 0),
        backward_flops=cost.backward_flops,
        activation_bytes=cost.held_bytes,
        peak_bytes=cost.peak_bytes,
        max_steps=config.trainer.max_steps,
        notes=[*notes, *parts.notes],
        **memory,
    )


def _every_token(config: RunConfig) -> list[str]:
    """Switches off whatever draws fewer tokens in training, or cuts texts; notes on it."""
    budgets, nested = (getattr(config.objective, name, None) for name in ("budgets", "nested"))
    for name in ("prefixes", "continuation"):
        if getattr(config.objective, name, 0.0):
            setattr(config.objective, name, 0.0)
    ratios = getattr(config.objective, "ratios", [])
    if ratios:
        config.objective.ratios = [min(ratios)]
        return [f"ratios: counted at {min(ratios):g} words a token, the most tokens; a step takes less on average"]
    if budgets is not None and (budgets.law != "full" or budgets.values):
        most = 0 if 0 in budgets.values else max(budgets.values, default=budgets.max_tokens)
        budgets.law, budgets.values = "full", [most] if most else []
        return ["budgets: counted at the most tokens that training draws; a step takes less on average"]
    if nested is not None and nested.mode != "full":
        nested.mode = "full"
        return ["nested dropout: counted with every token kept"]
    return []


def _words(config: RunConfig, asked: int | None, notes: list[str]) -> int:
    """Of a caption, an answer or a text."""
    if asked is None and config.data.texts and not config.data.text_words:
        notes.append(f"texts of {ANSWER_WORDS} words are counted: set data.text_words to those that yours have")
    return asked or config.data.text_words or ANSWER_WORDS


def _clip(config: RunConfig, model: Any, run: DryRun, answer_words: int) -> Clip:
    """A batch as the loader would give it, full length, without pixels."""
    data = config.data
    if data.texts:  # repeated as a whole, which is the most that is asked
        text = [" ".join(["word"] * answer_words)] * data.batch_size
        return Clip(keys=[f"text {row}" for row in range(data.batch_size)], text=text)
    sizes = list(zip(data.part_frames or [], data.part_batch_sizes or [data.batch_size] * len(data.part_frames or [])))
    frames, batch = max(sizes or [(data.num_frames, data.batch_size)], key=math.prod)
    channels = getattr(config.model, "channels", 3)
    video = run.empty(batch, channels, frames, *data.size, dtype=torch.uint8)
    features: dict[str, Features] = {}
    audio = getattr(config.model, "audio", None)
    if audio is not None and audio.name:
        heard = run.empty(batch, frames, audio.tokens, audio.in_dim)
        features[audio.name] = Features(heard, (1, audio.tokens), lengths=torch.full((batch,), frames))
    text = [" ".join(["word"] * answer_words)] * batch if projecting.is_projector(config) else None
    qa = None
    if text is not None and not config.objective.tasks.caption:  # it learns answers alone
        qa = [[{"question": "word", "answer": text[0]}]] * batch
    return Clip(
        keys=[f"clip {row}" for row in range(batch)],
        video=video,
        lengths=torch.full((batch,), frames),
        times=(torch.arange(frames) / (data.fps or 8.0)).expand(batch, -1),
        text=text,
        qa=qa,
        features=features or None,
    )


def _held(lit: LitCompressor, clip: Clip, parts: Skeletons) -> list[Tensor]:
    modules: list[nn.Module] = [lit, *(x.model for x in parts.towers.values()), *(x.model for x in parts.llms.values())]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    inputs = [clip.video, clip.lengths, clip.times, *(x.patches for x in (clip.features or {}).values())]
    return [*tensors, *(tensor for tensor in inputs if tensor is not None)]


def _count(parameters: Iterable[Tensor]) -> int:
    return sum({id(p): p.numel() for p in parameters}.values())


def _bytes(parameters: Iterable[Tensor], each: int = 0) -> int:
    """Of some parameters, or of `each` bytes for every number of theirs."""
    return sum({id(p): p.numel() * (each or p.element_size()) for p in parameters}.values())


def _memory(config: RunConfig, lit: LitCompressor, parts: Skeletons, trained: list[nn.Parameter]) -> dict[str, int]:
    """Bytes of one device for weights, gradients, AdamW and averaged weights, as the strategy splits them."""
    stage = strategy.stage_of(config.trainer.strategy)
    world = config.trainer.devices * config.trainer.num_nodes
    engine = list(lit.parameters())
    beside = [p for part in (*parts.towers.values(), *parts.llms.values()) for p in part.model.parameters()]
    beside = [p for p in beside if not any(p is own for own in trained)]
    half = stage > 0 and config.trainer.precision != "32-true"  # the engine's weights, with a float32 copy of them
    weights, gradients = _bytes(engine, 2 * half), _bytes(trained, 2 * half)
    optimizer = _bytes(trained, 12) if half else 2 * _bytes(trained)
    sharded, offload = config.trainer.strategy == "fsdp", config.trainer.strategy.endswith("_offload")
    stage = 3 if sharded else stage
    share = [world if stage >= least else 1 for least in (3, 2, 1)]
    weights, gradients, optimizer = (-(-x // n) for x, n in zip((weights, gradients, optimizer), share))
    gathered = _bytes(engine) if sharded and world > 1 else 0  # whole for the time of a step
    away = 0
    if offload:
        copies = 0 if half else _bytes(trained) // world  # AdamW's float32 weights; with half precision in `optimizer`
        away = optimizer + gradients + copies + (weights if stage == 3 else 0)
        optimizer, gradients, weights = 0, 0, 0 if stage == 3 else weights
    return {
        "weights_bytes": weights + gathered + _bytes(beside),
        "gradient_bytes": gradients,
        "optimizer_bytes": optimizer,
        "host_bytes": away,
        "averaged_bytes": _bytes((p for p in lit.model.parameters() if p.requires_grad), 4)
        if config.optim.ema_decay
        else 0,
    }


def table(found: Estimate) -> str:
    """The estimate for people: a line each, with its unit."""
    e = found
    devices = f"{e.world_size} device(s) x {e.batch_size} clips" + f" x {e.accumulate}" * (e.accumulate > 1)
    clips = e.batch_size * e.accumulate
    bits = "" if e.bits_per_clip is None else f", {e.bits_per_clip:,.0f} bits"
    rows: list[tuple[str, str, str]] = [
        ("parameters", _si(e.parameters), "of the model, which ships"),
        ("", _si(e.parameters_trained), "trained"),
        ("", _si(e.parameters_objective), "of the losses"),
        ("", _si(e.parameters_tower), "frozen tower"),
        ("", _si(e.parameters_llm), "language model"),
        ("tokens", f"{e.tokens_per_clip:,.0f}", f"a clip at most{bits}"),
        ("FLOPs", _si(e.flops_per_step), f"a step and device ({devices})"),
        ("", _si(e.forward_flops * e.accumulate), "forward"),
        ("", _si(e.tower_flops * e.accumulate), "of it the frozen tower"),
        ("", _si(e.llm_flops * e.accumulate), "of it the language model"),
        ("", _si(e.backward_flops * e.accumulate), "backward"),
        ("", _si(e.flops_per_step / clips), "a clip"),
        ("", _si(e.run_flops), f"the run, {e.max_steps:,} steps on all devices"),
        ("memory", _gib(e.memory_bytes), "a device, at the worst moment"),
        ("", _gib(e.weights_bytes), "weights, frozen ones included"),
        ("", _gib(e.optimizer_bytes), "optimizer state"),
        ("", _gib(e.averaged_bytes), "averaged weights"),
        ("", _gib(e.peak_bytes), f"a step's peak, of it {_gib(e.gradient_bytes)} gradients"),
        ("", _gib(e.activation_bytes), "activations kept for the backward pass"),
        ("", _gib(e.host_bytes), "of a device in the host's memory"),
    ]
    shown = [row for row in rows if row[1] not in ("0", _gib(0))]
    lines = [f"{e.name} ({e.family})", *(f"  {head:<11}{value:>12}  {what}" for head, value, what in shown)]
    return "\n".join([*lines, *(f"  note: {text}" for text in e.notes)])


def _si(value: float) -> str:
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


def _gib(value: float) -> str:
    return f"{value / 2**30:.3g} GiB" if value >= 2**27 else f"{value / 2**20:.3g} MiB"
