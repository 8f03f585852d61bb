"""A small language model inside a compressor: what of it learns and ships, what is held by reference.

    SmallLM (which model, what learns) --SmallReader--> word embeddings in, states of a layer out

All of it learns and ships with the compressor, or adapters in it do, or nothing: what does not learn is named, hashed
and loaded, outside of checkpoints and engines. The tokenizer always is, and another one's words are refused.

Letters: M segments, L positions, D width.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtok.llm.lora import LoraConfig

LEARNS = ("all", "lora", "none")


@dataclass
class SmallLM:
    """The small language model. What is None is read off its files when a fresh model is built."""

    name: str = ""  # hf:USER/REPO, or a folder that save_pretrained wrote, the tokenizer in it
    revision: str = ""
    learn: str = "all"  # all (the weights ship with the model) | lora (adapters ship) | none (what is around it alone)
    lora: LoraConfig = field(default_factory=LoraConfig)  # where learn=lora
    layer: int = -1  # whose states are kept: 0 = the embeddings, -1 = the last, after its norm
    dtype: str = "float32"  # of weights that do not learn
    checkpoint: bool = False  # keep the layers' inputs only and compute the rest again in the backward pass
    architecture: dict[str, Any] | None = None  # its config.json
    sha256: str | None = None  # of the weights it begins with, or keeps
    vocabulary: str | None = None  # hash of the tokenizer's words and their ids
    embedding_rms: float | None = None  # of one number of its word embeddings

    def __post_init__(self) -> None:
        if self.learn not in LEARNS:
            raise ValueError(f"model.lm.learn={self.learn!r} is unknown; choose one of {', '.join(LEARNS)}")
        if (self.learn == "lora") != bool(self.lora.rank):
            raise ValueError(
                f"model.lm.learn={self.learn!r} with model.lm.lora.rank={self.lora.rank}: adapters need a rank, and "
                "learn=lora; set both or none"
            )


class SmallReader(nn.Module):
    """Base of a `Model` with a small language model in it.

    lm: the language model where all of it learns, else None; adapters: those in it, or None.

    Args:
        config: has `lm`, a `SmallLM` whose open facts are filled in. speaks: whether the model is to predict words too,
            so that its output layer is kept.
    """

    def __init__(self, config: Any, *, speaks: bool = False):
        super().__init__()
        self.config, lm = config, config.lm
        if lm.architecture is None:
            raise ValueError(
                f"model.lm.architecture is open: it is read off model.lm.name={lm.name!r} when a run begins"
            )
        self._tokenizer: Any = None
        self._reference: Any = None  # what does not learn: no module, not in the state_dict, not in the engine
        own = _architecture(lm.architecture)
        text = own.get_text_config()
        self.small_width, self.small_rms = text.hidden_size, lm.embedding_rms or 0.02
        self.positions = getattr(text, "max_position_embeddings", None) or 1 << 30
        self.lm = _untrained(own, checkpoint=lm.checkpoint, speaks=speaks) if lm.learn == "all" else None
        self.adapters = None
        if lm.learn == "lora":
            self.adapters = _llm_room().Adapters(self.reference, lm.lora)

    @property
    def reference(self) -> Any:
        """The small language model that does not learn (`vtok.llm.FrozenLLM`), loaded at the first use."""
        if self._reference is None:
            self._reference = load_small(self.config.lm)
        return self._reference

    @property
    def tokenizer(self) -> Any:
        """Of the small language model. Raises: ValueError where its words are not those the model was trained with."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            lm = self.config.lm
            found = AutoTokenizer.from_pretrained(lm.name.removeprefix("hf:"), revision=lm.revision or "main")
            if lm.vocabulary not in (None, vocabulary(found)):
                raise ValueError(
                    f"the tokenizer of model.lm.name={lm.name!r} is not the one this model was trained with: its words "
                    "or their ids are others"
                )
            self._tokenizer = found
        return self._tokenizer

    def take_weights(self, found: Any) -> None:
        """Begin as the language model (`load_small`) that the configuration names, where all of it learns."""
        self._tokenizer = found.tokenizer
        if self.lm is not None:
            given = found.model if self.lm.get_output_embeddings() is not None else found.model.base_model
            self.lm.load_state_dict(given.state_dict(), strict=True)

    def word_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def embed_words(self, ids: Tensor) -> Tensor:
        if self.lm is not None:
            return self.lm.get_input_embeddings()(ids)
        return self.reference.to(ids.device).embed(ids)

    def _states(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """[M, L, D] states of the layer asked. Rows are padded on the right, which a causal model never looks at."""
        layer = self.config.lm.layer
        arguments: dict[str, Any] = dict(
            inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False, output_hidden_states=layer != -1
        )
        if self.lm is not None:
            out = self.lm(**arguments, return_dict=True)
        else:
            with torch.autocast(embeds.device.type, enabled=False):  # in its own precision
                out = self.reference.model.base_model(**arguments, return_dict=True)
        return out.last_hidden_state if layer == -1 else _with_all(out.hidden_states[layer], out.last_hidden_state)

    def speak(
        self, embeds: Tensor, mask: Tensor, *, states: int, logits: int, cache: Any = None, caching: bool = False
    ) -> tuple[Tensor, Tensor, Any]:
        """Logits [M, logits, V], states [M, states, D] of the layer asked, both of the last so many positions, and what
        is kept of all positions for the next call, where `caching`.

        embeds: [M, L, D] of the positions that the cache does not hold. mask: [M, all positions] bool, False on
        padding, which may lie on either side.
        """
        model: Any = self.lm if self.lm is not None else self.reference.to(embeds.device).model
        takes = inspect.signature(model.forward).parameters
        arguments: dict[str, Any] = dict(
            inputs_embeds=embeds, attention_mask=mask.long(), use_cache=caching, past_key_values=cache
        )
        if "position_ids" in takes:
            arguments["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        if "logits_to_keep" in takes:
            arguments["logits_to_keep"] = logits
        frozen = self.lm is None  # runs in its own precision
        with torch.autocast(embeds.device.type, enabled=False) if frozen else contextlib.nullcontext():
            out = model(**arguments, output_hidden_states=True, return_dict=True)
        found = _with_all(out.hidden_states[self.config.lm.layer][:, -states:], out.logits[:, -1:])
        return out.logits[:, -logits:], found, out.past_key_values if caching else None

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Without dropout and checkpoints: layers that compute again in the backward pass keep no cache."""
        model = self.lm if self.lm is not None else self.reference.model
        modes = [(part, part.training) for part in model.modules()]
        try:
            model.eval()
            yield
        finally:
            for part, training in modes:
                part.training = training


def _with_all(states: Tensor, last: Tensor) -> Tensor:
    """`states` of one layer; in training the layers above it, which make `last`, have a part in the loss, of 0: engines
    that share out gradients await those of every parameter."""
    return states + (last * 0).sum() if last.requires_grad else states


def fill_in(lm: SmallLM) -> Any:
    """The small language model that `lm` names (`vtok.llm.FrozenLLM`), its facts now in `lm`."""
    found = load_small(lm)
    drop = ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path")
    lm.architecture = {k: v for k, v in found.model.config.to_diff_dict().items() if k not in drop}
    lm.sha256, lm.vocabulary = found.sha256, vocabulary(found.tokenizer)
    lm.embedding_rms = found.embedding_rms
    return found


def vocabulary(tokenizer: Any) -> str:
    """A hash of a tokenizer's words and their ids."""
    digest = hashlib.sha256()
    for word, at in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        digest.update(f"{at} {word}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def load_small(lm: SmallLM) -> Any:
    """The `vtok.llm.FrozenLLM` of the small language model's files. Raises: ValueError for other weights than those
    that the model was trained with."""
    room = _llm_room()
    wanted = dict(name=lm.name, revision=lm.revision, sha256=lm.sha256 or "", chat=False, checkpoint=lm.checkpoint)
    config = room.LLMConfig(**wanted, dtype="float32" if lm.learn == "all" else lm.dtype)
    try:
        return room.load_llm(config, shared=lm.learn == "none")
    except ValueError as error:
        raise ValueError(str(error).replace("llm.", "model.lm.")) from error


def _architecture(values: dict[str, Any]) -> Any:
    """The configuration of transformers that its config.json stands for."""
    from transformers import AutoConfig

    kind = values.get("model_type")
    if not kind:
        raise ValueError("model.lm.architecture has no model_type: it is to be what a model's config.json holds")
    return AutoConfig.for_model(kind, **{key: value for key, value in values.items() if key != "model_type"})


def _untrained(architecture: Any, *, checkpoint: bool, speaks: bool) -> Any:
    """A language model with random weights; without its output layer where it does not speak."""
    from transformers import AutoModel, AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM if speaks else AutoModel
    model = kind.from_config(architecture, dtype=torch.float32)
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _llm_room() -> Any:
    try:
        return importlib.import_module("vtok.llm")  # by name: an export's one file does without frozen models
    except ImportError as error:
        raise ImportError(
            "a small language model that does not learn is loaded by vtok: pip install 'vtok[llm]'"
        ) from error
