"""Low-rank adapters on a frozen language model: an option, off unless a rank is given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from vtok.llm.frozen import FrozenLLM, LLMConfig, load_llm


@dataclass
class LoraConfig:
    rank: int = 0  # 0 = the LLM stays as it is
    alpha: float = 0.0  # what the adapters add is scaled by alpha / rank; 0 = 2 x rank
    targets: list[str] = field(default_factory=list)  # names of linear layers, such as q_proj; [] = all but the head

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha < 0:
            raise ValueError(f"lora.rank={self.rank}, lora.alpha={self.alpha}: neither may be below 0")


class Adapters(nn.Module):
    """LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) put into an LLM's layers in place; nothing changes yet.

    This module holds the adapters' parameters, in float32, and so brings them into the optimizer and the checkpoint;
    the LLM's own weights stay frozen and outside. An LLM with adapters is no longer the one others may share: load it
    with `load_llm(config, shared=False)`.
    Raises: ImportError without peft; ValueError for targets that the LLM has not.
    """

    def __init__(self, llm: FrozenLLM, config: LoraConfig):
        super().__init__()
        try:
            import peft
        except ImportError as error:
            raise ImportError("objective.lora needs peft: pip install 'vtok[llm]'") from error
        if llm.adapted:
            raise ValueError(f"{llm.name} already has adapters")
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha or 2 * config.rank,  # pyright: ignore[reportArgumentType]
            target_modules=list(config.targets) or "all-linear",
            fan_in_fan_out=any(type(part).__name__ == "Conv1D" for part in llm.model.modules()),  # GPT-2's linear
            task_type="CAUSAL_LM",
        )
        try:
            wrapped = peft.get_peft_model(llm.model, settings)
        except ValueError as error:
            names = sorted({name.rpartition(".")[2] for name, m in llm.model.named_modules() if _is_linear(m)})
            raise ValueError(f"lora.targets={list(config.targets)}: {error} It has {', '.join(names)}") from error
        llm.adapted = True
        self._wrapped = [wrapped]  # in a list: no child, its weights are the LLM's
        learned = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
        for name, parameter in learned.items():
            parameter.data = parameter.data.float()
            self.register_parameter(name.removeprefix("base_model.model.").replace(".", "/"), parameter)

    def check_strategy(self, key: str) -> None:
        """Raises ValueError under ZeRO-3, whose engine gathers the parameters of modules that it calls itself. key: the
        setting that put these adapters here."""
        if any(hasattr(parameter, "ds_id") for parameter in self.parameters()):
            raise ValueError(
                f"{key} does not work with trainer.strategy=deepspeed_3, which splits the adapters outside of "
                "the LLM's own calls: use deepspeed_2 or ddp"
            )

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The LLM as it was: for the teacher's pass. Not between a forward and its backward pass."""
        with self._wrapped[0].disable_adapter():
            yield

    def save(self, folder: str | Path) -> None:
        """The adapters as peft saves them, to be put into the same LLM with `peft.PeftModel.from_pretrained`."""
        self._wrapped[0].save_pretrained(str(folder))


def load_adapted(config: LLMConfig, lora: LoraConfig, weights: Mapping[str, Tensor]) -> FrozenLLM:
    """The language model with adapters that have learned (`vtok.loading.load_adapters`); as it is, and shared,
    where there are none.

    Raises: ValueError for adapters of another language model.
    """
    if not weights:
        return load_llm(config)
    llm = load_llm(config, shared=False)
    adapters = Adapters(llm, lora)
    try:
        adapters.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the adapters do not fit {config.name}, they were learned in another LLM: {error}") from error
    adapters.requires_grad_(False)
    return llm


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
