"""Reading shards of token ids, as `vtok tokenize` writes them.

    <key>.tokens.npy   ids [K] (one id a token) or [K, Q], uint16 or uint32, in the order of `Tokens`
    <key>.json         the clip's own json, and under "tokens" what reading the ids back needs (`SampleFacts`)
    index.json         shards with their hashes, and the tokenizer: ids mean nothing without it

Token shards are made by us and can be made again, so nothing broken is left out: it is an error.

Letters: K tokens of a clip, Q ids a token, G groups, t, h, w latent frames, height and width.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vtok.data.sources import Sample, Shard, ShardReader, fetch, open_sources

IDS = "tokens.npy"  # member of a sample that holds its ids
KIND = "tokens"  # what index.json says it lists
HEADER_BYTES = 128  # of a .npy with one or two dimensions, as numpy writes it: so a tar's headers give token counts
AGAIN = "run the same `vtok tokenize` command again: it checks every shard by its hash and replaces damaged ones"


class TokenShardError(ValueError):
    """A token shard is damaged, or another tokenizer's."""


def id_dtype(codebook_sizes: Sequence[int]) -> str:
    """Of stored ids: uint16 where every codebook has at most 2^16 entries, uint32 up to 2^32.

    Raises: ValueError for a larger codebook, whose ids would wrap around.
    """
    largest = max(codebook_sizes)
    if largest > 1 << 32:
        raise ValueError(
            f"a codebook of {largest} entries has ids above 32 bits, which token shards cannot hold: train the "
            "tokenizer with several ids a token (model.quantizer.num_codebooks) of at most 2^32 entries each"
        )
    return "uint16" if largest <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer made the ids. index_factors: of each id, least significant factor first."""

    model_id: str
    weights_sha256: str
    codebook_sizes: tuple[int, ...]
    index_factors: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, facts: Any, *, where: str) -> TokenizerIdentity:
        """From the "tokenizer" node of an index.json. Raises TokenShardError."""
        try:
            return cls(
                str(facts["model_id"]),
                str(facts["weights_sha256"]),
                tuple(int(n) for n in facts["codebook_sizes"]),
                tuple(tuple(int(n) for n in factors) for factors in facts["index_factors"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TokenShardError(f"{where} does not say which tokenizer made the ids ({error!r}); {AGAIN}") from error

    @property
    def dtype(self) -> str:
        return id_dtype(self.codebook_sizes)


class SampleFacts(NamedTuple):
    """What the json of a sample says of its ids, under "tokens".

    groups: tokens of each group; ranks are 0, 1, 2 ... in every group. frames, fps (None: an image), size (height,
    width): of the pixels that were encoded, and that decode. grids: (t, h, w) of each level, coarse to fine, for models
    that have them ([] else). start_s: where in the clip the first frame is. budget: tokens kept of each group, None:
    all.
    """

    groups: list[int]
    frames: int
    fps: float | None
    size: list[int]
    grids: list[list[int]]
    codebook_sizes: list[int]
    start_s: float = 0.0
    budget: int | None = None


class TokenSample(NamedTuple):
    """One clip as ids. ids: int64 [K, Q]. facts: its own json without "tokens". tokens: see `SampleFacts`."""

    key: str
    ids: np.ndarray
    facts: dict[str, Any]
    tokens: SampleFacts


@dataclass(frozen=True)
class TokenIndex:
    """Token shards that belong together. tokens, longest: by shard: all tokens, and those of its longest clip."""

    shards: list[Shard]
    tokens: list[int]
    longest: list[int]
    tokenizer: TokenizerIdentity

    @property
    def fingerprint(self) -> str:
        """Equal for equal shards of one tokenizer, wherever they lie."""
        facts = [(shard.name, shard.samples, shard.num_bytes) for shard in self.shards]
        text = json.dumps([facts, self.tokens, self.tokenizer.model_id])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_token_shards(
    shards: str | Path | Sequence[str],
    *,
    model_id: str | None = None,
    root: str | Path = "",
    cache_dir: str | Path = "",
) -> TokenIndex:
    """The token shards of one or more folders ("::" between them), each with its index.json.

    Args:
        model_id: of the tokenizer the ids must be of (`model.shipped.model_id` of a loaded export); None takes any, but
            all folders must have the same.
        root: prefix of relative paths. cache_dir: needed for https:.
    Raises: TokenShardError for another tokenizer's ids; ValueError for folders that hold no token shards.
    """
    names = shards.split("::") if isinstance(shards, str) else [str(shards)] if isinstance(shards, Path) else shards
    parts = [part.strip() for part in names]
    found: list[tuple[Shard, int, int]] = []
    first: tuple[str, TokenizerIdentity] | None = None
    for part in parts:
        (listed,) = open_sources([part], root=root, cache_dir=cache_dir, setting="token shards")
        index = _read_index(part, root=str(root), cache_dir=cache_dir)
        who = TokenizerIdentity.read(index.get("tokenizer"), where=f"{part}/index.json")
        if first is not None and who != first[1]:
            raise TokenShardError(
                f"{part} holds ids of {who.model_id}, {first[0]} of {first[1].model_id}: equal numbers mean different "
                "things; tokenize both with one model"
            )
        first = first or (part, who)
        counts = {entry["name"]: (int(entry["tokens"]), int(entry["longest"])) for entry in index["shards"]}
        found += [(shard, *counts[shard.name]) for shard in listed]
    assert first is not None
    if model_id is not None and model_id != first[1].model_id:
        raise TokenShardError(
            f"{first[0]} holds ids of {first[1].model_id}, but {model_id} is to read them: use the export they were "
            "made with, or run `vtok tokenize` with this one"
        )
    return TokenIndex([s for s, _, _ in found], [n for _, n, _ in found], [n for _, _, n in found], first[1])


def _read_index(part: str, *, root: str, cache_dir: str | Path) -> dict[str, Any]:
    if part.startswith(("https://", "http://")):
        path = fetch(f"{part.rstrip('/')}/index.json", cache_dir)
    else:
        path = Path(root, part, "index.json")
    if not path.is_file():
        raise ValueError(f"{part!r} has no index.json: name a folder of token shards, which says whose ids they are")
    index = json.loads(path.read_text())
    if not isinstance(index, dict) or index.get("kind") != KIND:
        raise ValueError(
            f"{part!r} holds no token shards; make some with `vtok tokenize {part} --model EXPORT --out DIR`"
        )
    return index


class TokenReader(ShardReader):
    """Samples of token shards, one tar at a time; its headers give the number of tokens of each."""

    def __init__(self, index: TokenIndex, *, cache_dir: str | Path = "") -> None:
        super().__init__(index.shards, cache_dir=cache_dir, media=(IDS,))
        self.index = index
        self.tokenizer = index.tokenizer
        self.id_bytes = np.dtype(self.tokenizer.dtype).itemsize * len(self.tokenizer.codebook_sizes)
        self._last: tuple[tuple[int, str], TokenSample] | None = None

    def samples(self, index: int) -> list[Sample]:
        """Every sample of a shard. Raises TokenShardError for damage, OSError where it cannot be read now."""
        found = super().samples(index)
        for sample in found:
            name = f"token shard {self.shards[index].name}"
            if sample.passing:
                raise OSError(f"{name}: {sample.problem}")
            if sample.problem is not None:
                raise TokenShardError(f"{name}, {sample.key or 'whole'}: {sample.problem}; {AGAIN}")
        return found

    def count(self, sample: Sample) -> int:
        """Tokens of a sample, from the size of its member alone."""
        return (sample.members[IDS][1] - HEADER_BYTES) // self.id_bytes

    def load(self, sample: Sample) -> TokenSample:
        """The ids and facts of one sample. Raises TokenShardError, OSError."""
        place = (sample.shard, sample.key)
        if self._last is None or self._last[0] != place:
            self._last = place, self._load(sample)
        return self._last[1]

    def _load(self, sample: Sample) -> TokenSample:
        where = f"token shard {self.shards[sample.shard].name}, {sample.key}"
        sizes = self.tokenizer.codebook_sizes
        try:
            ids = np.load(io.BytesIO(self.read(sample, IDS)), allow_pickle=False)
            facts = json.loads(self.read(sample, "json"))
            stated = facts.pop("tokens")
            about = SampleFacts(**{name: stated[name] for name in SampleFacts._fields})
        except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise TokenShardError(f"{where}: {error!r}; {AGAIN}") from error
        rows = ids.reshape(len(ids), -1) if ids.ndim else ids
        wrong = (
            ids.dtype.name != self.tokenizer.dtype
            or rows.ndim != 2
            or rows.shape[1] != len(sizes)
            or len(rows) != self.count(sample)
            or len(rows) != sum(about.groups)
            or bool((rows >= np.array(sizes)).any())
        )
        if wrong:
            raise TokenShardError(
                f"{where}: ids {ids.dtype.name} {list(ids.shape)} do not fit codebooks {list(sizes)} and groups of "
                f"{sum(about.groups)} tokens; {AGAIN}"
            )
        return TokenSample(sample.key, rows.astype(np.int64), facts, about)


def iter_token_samples(
    shards: str | Path | Sequence[str], *, model_id: str | None = None, **where: Any
) -> Iterator[TokenSample]:
    """Every sample once, in the order of the shards; keywords as `open_token_shards`."""
    index = open_token_shards(shards, model_id=model_id, **where)
    reader = TokenReader(index, cache_dir=where.get("cache_dir", ""))
    for number in range(len(index.shards)):
        for sample in reader.samples(number):
            yield reader.load(sample)
