"""Frozen networks as their configurations describe them, without weights: towers, language models, distances.

For what asks how large they are and what they compute, never what they say. Nothing is downloaded but configurations.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vtok.layers.convnext import ConvNeXt
from vtok.layers.i3d import I3DNet
from vtok.layers.perceptual import LPIPS
from vtok.layers.vgg import WIDTHS, VGG19Distance
from vtok.layers.weights import read_weights
from vtok.llm.frozen import DTYPES, FrozenLLM, LLMConfig, load_llm
from vtok.vision.bodies import TimmBody
from vtok.vision.load import load_tower
from vtok.vision.tower import Tower, TowerConfig

END = "<end>"
# (hidden, feed-forward, layers, heads, key-value heads, width of a head, vocabulary, tied) of published language models
_QWEN2 = {
    "0.5B": (896, 4864, 24, 14, 2, 64, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 128, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 128, 152064, False),
}
_QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, 8, 128, 151936, True),
    "1.7B": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "4B": (2560, 9728, 36, 32, 8, 128, 151936, True),
}


class Skeletons:
    """Loaders that give networks without weights, and `notes` on what they had to assume.

    Args:
        empty: (module, dtype or None) -> the module, its parameters costing nothing.
        watch: (name, function) -> the function, its operations counted under that name.
    """

    def __init__(
        self,
        *,
        empty: Callable[..., Any],
        watch: Callable[[str, Callable[..., Any]], Callable[..., Any]],
    ):
        self.empty, self.watch = empty, watch
        self.notes: list[str] = []
        self.towers: dict[Any, Tower] = {}
        self.llms: dict[Any, FrozenLLM] = {}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While active, whoever loads a tower, a language model or missing weights of a distance gets a skeleton."""
        with contextlib.ExitStack() as stack:
            for original, own in ((load_llm, self.llm), (load_tower, self.tower), (read_weights, self.weights)):
                stack.enter_context(_replaced(original, own))
            yield

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def llm(self, config: LLMConfig, *, shared: bool = True) -> FrozenLLM:
        """A language model that answers nothing. Raises: ValueError where its configuration cannot be read."""
        import transformers

        key = (*astuple(config), shared or len(self.llms))
        if key not in self.llms:
            facts, tokenizer = self._architecture(config)
            model = transformers.AutoModelForCausalLM.from_config(facts, dtype=DTYPES[config.dtype])
            made = FrozenLLM(config, self.empty(model), tokenizer, sha256="")
            made.forward = self.watch("llm", made.forward)
            self.llms[key] = made
        return self.llms[key]

    def _architecture(self, config: LLMConfig) -> tuple[Any, Any]:
        import transformers

        name = config.name.removeprefix("hf:")
        where: dict[str, Any] = {} if Path(name).is_dir() else {"revision": config.revision or None}
        try:
            facts = transformers.AutoConfig.from_pretrained(name, local_files_only=True, **where)
        except (OSError, ValueError) as error:
            found = published(name)
            if found is None:
                raise ValueError(
                    f"llm.name={config.name!r}: its config.json is not on this machine, so neither its FLOPs nor its "
                    f"memory can be told; give a folder that holds it ({str(error).partition(chr(10))[0]})"
                ) from error
            facts = found
            self.note(f"{name}: shapes as published; its config.json is not on this machine")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=True, **where)
        except (OSError, ValueError, KeyError):
            tokenizer = _words()
            self.note(f"{name}: no tokenizer on this machine; prompts are counted as one id a word")
        return facts, tokenizer

    def tower(self, config: TowerConfig) -> Tower:
        """A tower that sees nothing; the real one where it lies in a folder. Raises: ValueError, ImportError."""
        key = (*astuple(config)[:-1], str(config.size))
        if key not in self.towers:
            kind, _, rest = config.name.partition(":")
            if kind == "timm" and "/" not in rest:
                made = Tower(config, _timm_body(config, rest), sha256="")
            elif Path(rest if kind in ("timm", "hf") else config.name).is_dir():
                with _disable_current_modes():  # a small one, read as it is
                    made = load_tower(config)
            else:
                raise ValueError(
                    f"tower.name={config.name!r}: its configuration is not on this machine, so neither its FLOPs nor "
                    "the size of its features can be told; give timm:MODEL, or a folder with the tower"
                )
            self.empty(made.model, DTYPES[config.dtype])
            made.forward = self.watch("tower", made.forward)
            self.towers[key] = made
        return self.towers[key]

    def weights(self, path: str | Path, sha256: str, what: str) -> dict[str, Tensor]:
        """Weights of a file, or of a network made for the purpose where there is no file."""
        if Path(path).is_file():
            return read_weights(path, sha256, what)
        self.note(f"{what}: no weights here{', LPIPS on VGG-16 assumed' * (what == 'LPIPS')}; its cost is counted")
        if what == "LPIPS":
            return LPIPS("vgg").state_dict()
        if what == "I3D":
            return I3DNet().state_dict()
        if what == "ConvNeXt-S":
            return ConvNeXt().state_dict()
        if what == "VGG-19":
            # the last layer of torchvision's, by which its files are known, lies behind what the distance reads
            return VGG19Distance(WIDTHS).state_dict() | {"features.34.weight": torch.zeros(1)}
        if what == "RAFT":
            from torchvision.models.optical_flow import raft_large

            return raft_large().state_dict()
        raise FileNotFoundError(f"no {what} weights at {path}")


def published(name: str) -> Any | None:
    """The transformers configuration of some published language models (user/repo); None for others."""
    import transformers

    found = re.fullmatch(r"Qwen/Qwen(2|2\.5|3)-([\d.]+B)(-Instruct|-Base)?", name)
    table: dict[str, tuple[Any, ...]] = _QWEN3 if found and found[1] == "3" else _QWEN2
    if not found or found[2] not in table:
        return None
    hidden, wide, layers, heads, kv_heads, head_dim, vocabulary, tied = table[found[2]]
    kind: Any = transformers.Qwen3Config if found[1] == "3" else transformers.Qwen2Config
    own = {"head_dim": head_dim} if found[1] == "3" else {}
    return kind(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=32768,
        **own,
    )  # fmt: skip


def _words() -> Any:
    """A tokenizer with one id for every word, the same for all but those that answer."""
    import tokenizers
    import transformers

    words = {"<word>": 0, END: 1, "Yes": 2, "No": 3}
    made: Any = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<word>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END)


def _timm_body(config: TowerConfig, name: str) -> TimmBody:
    import timm

    size = (config.size[0], config.size[1]) if config.size else None
    try:
        try:
            model = timm.create_model(name, pretrained=False, num_classes=0, img_size=size)
        except TypeError:  # a net without positions takes any size
            model = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        raise ValueError(f"tower.name={config.name!r}: timm could not make it: {error}") from error
    return TimmBody(model, config.layer, size, config.name)


@contextlib.contextmanager
def _replaced(original: Callable[..., Any], own: Callable[..., Any]) -> Iterator[None]:
    """`own` wherever a module of vtok has `original` under its name."""
    name = original.__name__
    mine = __name__
    homes = [
        module
        for key, module in list(sys.modules.items())
        if key.partition(".")[0] == "vtok" and key != mine and getattr(module, name, None) is original
    ]
    for home in homes:
        setattr(home, name, own)
    try:
        yield
    finally:
        for home in homes:
            setattr(home, name, original)
