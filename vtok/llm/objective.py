"""The loss of a projector: a frozen language model reads its tokens and should say the captions and answers.

    clip --model.encode(budget)--> tokens --frozen LLM--> next-token loss on the answer
      '----teacher, all tokens---> tokens --same LLM----> logits and states to come close to

A family's `Objective` is `ProjectorObjective`, or a class derived from it that adds `terms` of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtok.llm.distill import hidden_distance, logit_divergence
from vtok.llm.frozen import FrozenLLM, LLMConfig, load_llm
from vtok.llm.lora import Adapters, LoraConfig
from vtok.llm.questions import Answered, ask
from vtok.llm.reading import Read, generate, read, with_times
from vtok.llm.tasks import TaskConfig, Told, choose, draw, first_prompt, instruction
from vtok.types import Budget, Clip, Loss, Tokens

LAWS = ("full", "uniform", "log_uniform", "pow2")


@dataclass
class BudgetConfig:
    """Tokens per clip in training (nested dropout): one draw a step, the same for all clips and on every rank."""

    values: list[int] = field(default_factory=list)  # one of these, evenly; 0 = all tokens. [] = by the law
    law: str = "full"  # full (all tokens) | uniform | log_uniform | pow2, over min_tokens to max_tokens
    min_tokens: int = 1
    max_tokens: int = 0  # 0 = the model's max_tokens

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise ValueError(f"budgets.law={self.law!r} is unknown; choose one of {', '.join(LAWS)}")
        if any(value < 0 for value in self.values):
            raise ValueError(f"budgets.values={list(self.values)}: a budget is 1 or more tokens, or 0 for all")
        if self.min_tokens < 1 or self.max_tokens < 0:
            raise ValueError(
                f"budgets.min_tokens={self.min_tokens} must be 1 or more, max_tokens={self.max_tokens} 0 or more"
            )


@dataclass
class ObjectiveConfig:
    llm: LLMConfig = field(default_factory=LLMConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    tasks: TaskConfig = field(default_factory=TaskConfig)
    budgets: BudgetConfig = field(default_factory=BudgetConfig)
    next_token: float = 1.0  # weight of the answers' negative log-likelihood
    per: str = "clip"  # clip: mean over each answer, then over clips | token: mean over all answers' tokens
    logits: float = 0.0  # weight of KL(teacher || student) over the answers' tokens
    temperature: float = 1.0  # of both distributions there
    hidden: float = 0.0  # weight of the relative distance of hidden states at the answers' tokens
    hidden_layers: list[int] = field(default_factory=lambda: [-1])  # 0 = embeddings ... -1 = the LLM's last layer
    teacher: str = ""  # export or run whose tokens, all of them, the teacher's pass reads: the stage-0 projector
    timestamps: bool = False  # the start of each group of tokens as text before it, of groups that have any
    max_answer: int = 256  # longer captions and answers are cut to so many ids, and counted in the report
    seed: int = 0  # of tasks, prompts and budgets


class ProjectorObjective(nn.Module):
    """The next-token loss of answers, and what pulls few tokens towards all of them.

    Its parameters are the adapters of `objective.lora`, none by default; LLM and teacher are held by reference.

    Args:
        config: the `objective:` node. model_config: the `model:` node, whose `embedding_dim` is the LLM's.
        load: path -> a frozen model of ours: the teacher comes in this way.
    Raises: ValueError for weights below 0, distillation without a teacher, and widths that differ.
    """

    Config = ObjectiveConfig

    def __init__(self, config: Any, model_config: Any, *, load: Callable[[str], Any] | None = None):
        super().__init__()
        self.config = c = config
        for key in ("next_token", "logits", "hidden"):
            if getattr(c, key) < 0:
                raise ValueError(f"objective.{key}={getattr(c, key)} must be 0 or above")
        if c.temperature <= 0 or c.max_answer < 1:
            raise ValueError(
                f"objective.temperature={c.temperature} must be above 0, max_answer={c.max_answer} 1 or more"
            )
        if c.per not in ("clip", "token"):
            raise ValueError(f"objective.per={c.per!r} is unknown; choose clip or token")
        distils = bool(c.logits or c.hidden)
        if distils != bool(c.teacher):
            raise ValueError(
                f"objective.teacher={c.teacher!r} with objective.logits={c.logits}, hidden={c.hidden}: distillation "
                "needs a teacher and a weight above 0; set all of them or none"
            )
        self._llm = [load_llm(c.llm, shared=not c.lora.rank)]
        self.adapters = Adapters(self.llm, c.lora) if c.lora.rank else None
        if model_config.embedding_dim not in (0, self.llm.embedding_dim):
            raise ValueError(
                f"model.embedding_dim={model_config.embedding_dim}, but the words of {c.llm.name} are "
                f"{self.llm.embedding_dim} wide"
            )
        self._teacher: list[Any] = []
        depth = int(self.llm.model.config.get_text_config().num_hidden_layers)
        if c.hidden and (wrong := [layer for layer in c.hidden_layers if not -depth - 1 <= layer <= depth]):
            raise ValueError(
                f"objective.hidden_layers={list(c.hidden_layers)}: {c.llm.name} has {depth} layers, and {wrong[0]} is "
                f"none of them: 0 (the embeddings) to {depth}, or -1 (the last) to {-depth - 1}"
            )
        if distils:
            teacher = self.load_teacher(load)
            if getattr(getattr(teacher, "shipped", None), "adapters", ""):
                raise ValueError(
                    f"objective.teacher={c.teacher!r}: its tokens are read through adapters that its LLM learned, and "
                    "the teacher's pass has none: name a teacher that was trained with objective.lora.rank=0"
                )
            if teacher.embedding_dim != self.llm.embedding_dim:
                raise ValueError(
                    f"objective.teacher={c.teacher!r} makes tokens {teacher.embedding_dim} wide, the words of "
                    f"{c.llm.name} are {self.llm.embedding_dim}: it was trained for another LLM"
                )
            self._teacher = [teacher]
        self._texts_seen = False

    @property
    def llm(self) -> FrozenLLM:
        return self._llm[0]

    def load_teacher(self, load: Callable[[str], Any] | None) -> Any:
        """What makes the tokens that the teacher's pass reads."""
        if load is None:
            raise ValueError(f"objective.teacher={self.config.teacher!r} cannot be loaded here: no loader was given")
        return load(self.config.teacher).requires_grad_(False).eval()

    def tell(self, clip: Clip, step: int) -> tuple[Clip, Told]:
        """The clips as they are to be compressed at a step, and what is asked of them."""
        return clip, choose(clip, self.config.tasks, step=step, seed=self.config.seed)

    def prepare(self, model: Any, clip: Clip) -> Clip:
        """The clip, with its features where a family reads them more than once in a step."""
        return clip

    def budget_of(self, model: Any, clip: Clip, step: int) -> Budget | None:
        """The budget of a step's clips: one number of tokens for all."""
        return self.budget(model, step)

    def terms(self, model: Any, clip: Clip, tokens: Tokens, seen: Read, step: int) -> dict[str, Tensor]:
        """Weighted losses that a family adds, by their names in the report; called once a step."""
        return {}

    def told(self, model: Any) -> dict[str, Tensor]:
        """What else a family reports of a step."""
        return {}

    def budget(self, model: Any, step: int) -> int | None:
        """Tokens per clip at a step; None = all."""
        c = self.config.budgets
        rng = draw(self.config.seed, step, "budget")
        if c.values:
            return rng.choice(list(c.values)) or None
        if c.law == "full":
            return None
        low, high = c.min_tokens, c.max_tokens or model.max_tokens
        if low > high:
            raise ValueError(f"budgets.min_tokens={low} is above the largest budget, {high}")
        if c.law == "uniform":
            return rng.randint(low, high)
        if c.law == "log_uniform":
            return min(int(low * ((high + 1) / low) ** rng.random()), high)
        powers = [1 << i for i in range(high.bit_length()) if low <= 1 << i <= high]
        if not powers:
            raise ValueError(f"budgets.law=pow2: there is no power of two in {low} to {high}")
        return rng.choice(powers)

    def forward(self, model: Any, clip: Clip, step: int) -> Loss:
        c = self.config
        own: Adapters | None = getattr(model, "adapters", None)  # in a small language model of the compressor's
        for key, adapters in (("objective.lora", self.adapters), ("model.lm.learn=lora", own)):
            if adapters is not None:
                adapters.check_strategy(key)
        clip, told = self.tell(clip, step)
        self._check_texts(clip, told)
        clip = replace(clip, prompt=told.instructions, target=None)
        if self._teacher:
            clip = self._seen_once(model, clip)
            target = self._teach(clip, told, next(model.parameters()).device)
        clip = self.prepare(model, clip)
        tokens = model.encode(clip, budget=self.budget_of(model, clip, step))
        seen = self.read(told, tokens)
        nll, answered = seen.nll(), torch.tensor([bool(answer) for answer in told.answers], device=seen.row.device)
        report = {
            "nll": self._mean(seen, nll, answered),
            "answer_accuracy": self._mean(seen, (seen.logits.argmax(-1) == seen.labels).float(), answered),
            "tokens": tokens.lengths.float().mean(),
            "llm_positions": nll.new_tensor(seen.positions / len(clip)),
            "cut_answers": nll.new_tensor(seen.cut / len(clip)),
            "without_answer": 1 - answered.float().mean(),
        }
        total = c.next_token * report["nll"]
        if self._teacher:
            if c.logits:
                gap = logit_divergence(seen.logits, target.logits, temperature=c.temperature)
                report["logit_kl"] = self._mean(seen, gap, answered)
                total = total + c.logits * report["logit_kl"]
            if c.hidden:
                report["hidden_distance"] = self._mean(seen, hidden_distance(seen.hidden, target.hidden), answered)
                total = total + c.hidden * report["hidden_distance"]
        terms = self.terms(model, clip, tokens, seen, step)
        for term in terms.values():
            total = total + term
        report |= terms | self.told(model)
        return Loss(total, {name: value.detach() for name, value in report.items()})

    def read(self, told: Told, tokens: Tokens) -> Read:
        """What the LLM predicts of the answers, given the tokens."""
        c = self.config
        prompts = with_times(told.prompts, tokens) if c.timestamps else told.prompts
        layers = list(c.hidden_layers) if c.hidden else []
        return read(self.llm, prompts, told.answers, tokens, hidden=layers, max_answer=c.max_answer)

    def ask(self, model: Any, clip: Clip, *, budget: Budget | None = None, **keywords: Any) -> list[Answered]:
        """The questions of a batch, as `vtok.llm.ask` puts them, with the first of the questions' prompts."""
        c = self.config
        return ask(
            self.llm,
            clip,
            model,
            template=first_prompt(c.tasks, "qa"),
            budget=budget,
            timestamps=c.timestamps,
            **keywords,
        )

    @torch.no_grad()
    def generate(
        self,
        model: Any,
        clip: Clip,
        *,
        budget: Budget | None = None,
        prompts: list[str] | None = None,
        max_new_tokens: int = 64,
    ) -> list[str]:
        """The LLM's greedy answer to a prompt for each clip; None: the first prompt for captions."""
        c = self.config
        prompts = prompts or [first_prompt(c.tasks, "caption")] * len(clip)
        tokens = model.encode(replace(clip, prompt=[instruction(p) for p in prompts], target=None), budget=budget)
        if c.timestamps:
            prompts = with_times(prompts, tokens)
        return generate(self.llm, prompts, tokens, max_new_tokens=max_new_tokens)

    def _mean(self, seen: Read, values: Tensor, answered: Tensor) -> Tensor:
        if self.config.per == "token":
            return values.sum() / max(len(values), 1)
        return seen.means(values).sum() / answered.sum().clamp(min=1)

    def _check_texts(self, clip: Clip, told: Told) -> None:
        """Single clips may come without a text, a whole corpus may not."""
        self._texts_seen = self._texts_seen or any(told.answers)
        if not self._texts_seen:
            c = self.config.tasks
            raise ValueError(
                f"none of the clips {clip.keys[:4]} has a text that tasks.caption={c.caption}, qa={c.qa}, "
                f"reconstruction={c.reconstruction} could teach: their json needs `caption` or `qa` (docs/formats.md)"
            )

    def _seen_once(self, model: Any, clip: Clip) -> Clip:
        """The clip with its features, where model and teacher would make the same of it."""
        teacher = self._teacher[0]
        same = getattr(teacher.config, "tower", None) == getattr(model.config, "tower", ())
        kinds = [(type(m).features, type(m).encode) for m in (model, teacher) if hasattr(type(m), "features")]
        if not same or len(kinds) < 2 or kinds[0] != kinds[1]:
            return clip
        return with_tower_features(model, clip)

    @torch.no_grad()
    def _teach(self, clip: Clip, told: Told, device: torch.device) -> Read:
        """The same LLM, without adapters, on all tokens of the teacher."""
        teacher = self._teacher[0].to(device)
        with self.adapters.off() if self.adapters is not None else contextlib.nullcontext():
            return self.read(told, teacher.encode(clip))


def with_tower_features(model: Any, clip: Clip) -> Clip:
    """The clip with what the model's tower makes of it, which is then made once."""
    return replace(clip, features={**(clip.features or {}), model.config.tower.name: model.features(clip)})
