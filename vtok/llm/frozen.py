"""A causal language model of transformers, frozen: word vectors in, logits and states of the positions asked out.

Letters: B texts, L positions, D width of the word embeddings, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vtok.layers.pretrained import commit_of, fetch, weight_files, weights_sha256
from vtok.layers.seams import KIND, load_vlm, words_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TEXT = ("*.json", "*.model", "*.txt", "*.jinja")  # configuration and every kind of tokenizer


@dataclass
class LLMConfig:
    """Which language model, and how its prompts are written."""

    # hf:USER/REPO, or a folder that save_pretrained wrote, the tokenizer in it; vlm:USER/REPO or vlm:FOLDER: the
    # language model of a VLM
    name: str = ""
    revision: str = ""  # branch, tag or commit of a repository; "" = its default branch
    sha256: str = ""  # expected hash of the weights; "" = any, what was loaded is in FrozenLLM.sha256
    dtype: str = "float32"  # float32 | bfloat16 | float16: of the weights and of what is computed
    chat: bool | None = None  # prompts as a user's turn in the tokenizer's chat template; None = where it has one
    max_length: int = 0  # positions of a text, visual tokens included; 0 = as many as the model was made for
    checkpoint: bool = False  # keep the layers' inputs only and compute the rest again in the backward pass

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"llm.dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if self.max_length < 0:
            raise ValueError(f"llm.max_length={self.max_length} must be above 0, or 0 for the model's own")


class FrozenLLM:
    """A frozen language model and its tokenizer. `load_llm` makes one.

    No nn.Module: whoever holds one holds a reference, so it adds nothing to a state_dict, to an optimizer or to an
    engine, a deep copy shares it, and a pickle holds its name and hash alone.

    embedding_dim: D. embedding_rms: root mean square of one number of the word embeddings, the scale at which a
    projector has to speak. max_length: positions of a text. chat: whether prompts go through the chat template.
    end_ids: ids that end an answer, the one that training teaches first. sha256, revision: of the weights.
    """

    def __init__(self, config: LLMConfig, model: Any, tokenizer: Any, *, sha256: str, revision: str = ""):
        self.config, self.name, self.sha256, self.revision = config, config.name, sha256, revision
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer
        self.adapted = False  # set by whoever puts adapters into it
        self.adapters_sha256 = ""  # of those that have learned, by whoever reads them
        self._takes = set(inspect.signature(model.forward).parameters)
        self.end_ids = _end_ids(model, tokenizer, config.name)
        self.chat = bool(tokenizer.chat_template) if config.chat is None else config.chat
        if self.chat and not tokenizer.chat_template:
            raise ValueError(f"llm.chat=true: the tokenizer of {config.name} has no chat template; set it to false")
        own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if config.max_length and own and config.max_length > own:
            raise ValueError(f"llm.max_length={config.max_length}: {config.name} was made for {own} positions")
        self.max_length: int = config.max_length or own or 1 << 30
        with torch.no_grad():
            known = torch.arange(min(len(tokenizer), model.get_input_embeddings().num_embeddings))
            squares = [float(self.embed(part).double().square().sum()) for part in known.split(4096)]
            self.embedding_dim: int = self.embed(known[:1]).shape[-1]
        self.embedding_rms: float = (sum(squares) / (len(known) * self.embedding_dim)) ** 0.5
        if config.checkpoint:
            self._checkpoint_layers()

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def to(self, device: torch.device | str) -> FrozenLLM:
        if self.device != torch.device(device):
            self.model.to(device)
        return self

    def identity(self) -> dict[str, Any]:
        """What its answers depend on, as plain values."""
        facts = {name: getattr(self.config, name) for name in ("name", "dtype")}
        facts |= {"revision": self.revision, "sha256": self.sha256, "chat": self.chat}
        return facts | ({"adapters_sha256": self.adapters_sha256} if self.adapters_sha256 else {})

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenLLM:
        return self  # frozen: an averaged copy of its holder shares it

    def __reduce__(self) -> tuple[Any, ...]:
        if self.adapted:
            raise ValueError(f"{self.name} holds trained adapters and cannot be pickled: save those (Adapters.save)")
        return load_llm, (replace(self.config, sha256=self.sha256, revision=self.revision or self.config.revision),)

    def embed(self, ids: Tensor) -> Tensor:
        """[...] ids -> [..., D] word embeddings, as the model's own first step gives them."""
        return self.model.get_input_embeddings()(ids)

    def forward(
        self,
        embeds: Tensor,
        mask: Tensor,
        positions: Tensor,
        *,
        keep: int = 0,
        hidden: Sequence[int] = (),
        past: Any = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, keep, V] of the last `keep` positions (0 = all), and the hidden states of layers there.

        Runs in the LLM's own dtype, whatever the trainer's precision; gradients flow to `embeds` alone (and to
        adapters).

        Args:
            embeds: [B, L, D]. mask: [B, L] bool, False on padding. positions: [B, L] int64.
            hidden: layers whose output [B, keep, D] is asked: 0 = the embeddings, -1 = the last, after its norm.
            past: what `prefill` kept of the positions before these; it grows. mask covers those, too.
        """
        length = embeds.shape[1]
        keep = keep or length
        arguments: dict[str, Any] = dict(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=past is not None)
        if past is not None:
            arguments["past_key_values"] = past
        if "position_ids" in self._takes:  # models with relative biases (ALiBi, state spaces) take none
            arguments["position_ids"] = positions
        if "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = keep
        with self._own_precision(embeds.device):
            out = self.model(**arguments, output_hidden_states=bool(hidden), return_dict=True)
        return out.logits[:, -keep:], [out.hidden_states[layer][:, -keep:] for layer in hidden]

    @torch.no_grad()
    def prefill(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> Any:
        """Keys and values of texts that go on differently, as transformers keeps them (a `Cache` whose rows can be
        selected and repeated); None where the model keeps none of that kind. Arguments as in `forward`, padded on the
        left."""
        if not {"past_key_values", "position_ids"} <= self._takes:
            return None
        arguments: dict[str, Any] = dict(inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions)
        if "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = 1
        with self._own_precision(embeds.device):
            cache = self.model(**arguments, use_cache=True, return_dict=True).past_key_values
        layers = getattr(cache, "layers", [])
        rows = bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)
        return cache if rows and cache.get_seq_length() == embeds.shape[1] else None

    @torch.no_grad()
    def generate(self, embeds: Tensor, mask: Tensor, *, max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations, ids of each text up to its first end id, which is left out. Padding is on the left."""
        room = self.max_length - embeds.shape[1]
        if max_new_tokens > room:
            raise ValueError(
                f"prompts of {embeds.shape[1]} positions leave room for {max(room, 0)} of {self.max_length}, and "
                f"max_new_tokens={max_new_tokens}: ask for fewer, or lower the budget"
            )
        with self._own_precision(embeds.device):
            out = self.model.generate(
                inputs_embeds=embeds, attention_mask=mask.long(), max_new_tokens=max_new_tokens
            )  # new ids only, since no input ids were given
        ends = set(self.end_ids)
        return [row[: next((i for i, x in enumerate(row) if x in ends), len(row))] for row in out.tolist()]

    def _own_precision(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, enabled=False)

    def _checkpoint_layers(self) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [part for part in self.model.modules() if isinstance(part, GradientCheckpointingLayer)]
        if not layers:
            raise ValueError(f"llm.checkpoint=true: {type(self.model).__name__} has no layers that can be checkpointed")
        for layer in layers:  # not transformers' own switch: it needs layers in train mode, and theirs then drop
            layer.forward = functools.partial(_recomputed, layer.forward)


_LOADED: weakref.WeakValueDictionary[tuple[Any, ...], FrozenLLM] = weakref.WeakValueDictionary()


def load_llm(config: LLMConfig, *, shared: bool = True) -> FrozenLLM:
    """A frozen language model on the CPU, its weights those of the files that were hashed; no code of a repository is
    run. Asked again while one of the same config is held by someone, it is that one; shared=False reads another.

    sha256 is that of the weights' file; of several, that of their hashes one below the other, in the order of names.
    Raises: ImportError without transformers; ValueError for a name that holds no language model, for other weights
        than expected, for weights that are incomplete, and for a tokenizer that cannot end an answer.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("a language model needs transformers: pip install 'vtok[llm]'") from error
    of_vlm = config.name.startswith(f"{KIND}:")
    name, revision = config.name.removeprefix(f"{KIND}:" if of_vlm else "hf:"), ""
    if name and Path(name).is_dir():
        folder = Path(name)
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = fetch(name, config.revision, texts=_TEXT, what="llm")
        revision = commit_of(folder, config.revision)
    else:
        raise ValueError(
            f"llm.name={config.name!r} is no folder here and names no repository; give hf:USER/REPO, a folder that "
            "save_pretrained wrote, or vlm: before them for the language model of a VLM (data/tiny_lm.py "
            "makes a small one)"
        )
    sha256 = weights_sha256(weight_files(folder), config.sha256, key="llm.sha256", name=config.name)
    key = (*astuple(config), sha256)
    if shared and key in _LOADED:
        return _LOADED[key]
    try:
        if of_vlm:
            vlm = load_vlm(folder, dtype=DTYPES[config.dtype], key="llm.name", name=config.name)
            model, report = words_of(vlm), {"missing_keys": []}
        else:
            kind: Any = transformers.AutoModelForCausalLM
            model, report = kind.from_pretrained(folder, dtype=DTYPES[config.dtype], output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"llm.name={config.name!r}: transformers could not load it: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{config.name}: {len(missing)} weights of {type(model).__name__} are not in its files, such as "
            f"{missing[0]}: they would be random numbers; is this a causal language model's checkpoint?"
        )
    out = FrozenLLM(config, model, tokenizer, sha256=sha256, revision=revision)
    # Repositories ask for sampling and penalties of their own taste: answers here are greedy, and so repeatable.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else out.end_ids[0]
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=out.end_ids, pad_token_id=pad, bos_token_id=tokenizer.bos_token_id
    )
    if shared:
        _LOADED[key] = out
    return out


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a layer gives; where gradients are asked, its inputs are all that is kept for the backward pass. A layer
    that adds to a cache is computed once."""
    from transformers.cache_utils import Cache

    if not torch.is_grad_enabled() or any(isinstance(given, Cache) for given in (*args, *kwargs.values())):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _end_ids(model: Any, tokenizer: Any, name: str) -> list[int]:
    """Ids that end an answer: the tokenizer's own first, then those the checkpoint generates until."""
    asked = getattr(model.generation_config, "eos_token_id", None)
    every = [tokenizer.eos_token_id, *(asked if isinstance(asked, list) else [asked])]
    ids = list(dict.fromkeys(i for i in every if i is not None))
    if not ids:
        raise ValueError(f"the tokenizer of {name} has no eos_token: an answer could not end")
    return ids
