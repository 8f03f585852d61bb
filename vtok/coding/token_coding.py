"""Whole videos of a shard into token ids, short ones in batches of like length, long ones as a stream; and back.

    sample -> frames at a rate, fitted to a size --+-- ends within a batch's frames --> batch --> encode --+--> ids
                                                   +-- goes on ------------> stream_tokens ----------------+

What is held of pixels is bounded by the batch, whatever the length of the videos. Which samples share a batch depends
on the shard and the settings alone, so that the same shard gives the same ids again, to the bit.

Letters: B clips, C channels, T frames, H height, W width, K tokens, Q ids a token, G groups.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtok.coding.codec import stream_tokens
from vtok.data.decode import VideoReader
from vtok.data.maps import EPSILON_S, HEAD_BYTES, MapError, read_header, window_of_map
from vtok.data.sample import read_facts
from vtok.data.shard_work import Rejected
from vtok.data.sources import BrokenSample, Sample, ShardReader
from vtok.data.strict import DecodeError
from vtok.data.token_reader import SampleFacts, TokenSample, TokenShardError, id_dtype
from vtok.data.view import View, fit
from vtok.data.workers import Notify
from vtok.types import Clip, Streaming, Tokens, to_uint8


@dataclass(frozen=True)
class Settings:
    """What is encoded of a video, and how much of it is kept.

    fps: frames per second; None: the source's. size: (height, width). crop: center, or none (aspect not kept).
    clip_frames: cut into samples of so many frames, the last one shorter; None: whole videos.
    budget: tokens kept of each group; None: all.
    batch_size: clips of the model's length at once: what is held of pixels and activations.
    map: extension of the member that holds a dense map, as data.map; "": the video or image.
    """

    fps: float | None
    size: tuple[int, int]
    crop: str = "center"
    clip_frames: int | None = None
    budget: int | None = None
    batch_size: int = 8
    map: str = ""

    def __post_init__(self) -> None:
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps={self.fps} must be above 0, or the source's own")
        if min(self.size) < 1:
            raise ValueError(f"size={list(self.size)} must be (height, width) in pixels, 1 or more each")
        if self.clip_frames is not None and self.clip_frames < 1:
            raise ValueError(f"clip_frames={self.clip_frames} must be 1 or more; leave it out for whole videos")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be 1 or more")


class _Coded(NamedTuple):
    ids: np.ndarray  # [K, Q]
    groups: list[int]
    frames: int


@dataclass
class _Pending:
    """A sample whose pieces are coded, or wait in a batch."""

    key: str
    facts: dict[str, Any] = field(default_factory=dict)
    fps: float | None = None
    slots: list[int] = field(default_factory=list)
    rejected: Rejected | None = None


class Encoder:
    """A model and settings. dtype: of the stored ids. Raises ValueError for what the model cannot do."""

    def __init__(self, model: Any, settings: Settings) -> None:
        if not getattr(model, "codebook_sizes", ()):
            raise ValueError(
                f"{model.config.name} makes continuous tokens (no codebook): there are no ids to store. Train it with "
                "a discrete quantizer, or quantize it first"
            )
        self.model: Any = model
        if not isinstance(model, Streaming) or not hasattr(model, "tokens_from_indices"):
            raise ValueError(f"{type(model).__module__} cannot stream, and videos may have any length")
        if self.model.channels != 3 and not settings.map:
            raise ValueError(f"model.channels={self.model.channels}, and data.map='' (RGB video) is to be read")
        self.settings = settings
        self.view = View(num_frames=1, size=settings.size, crop=settings.crop, map=settings.map)
        self.dtype = id_dtype(self.model.codebook_sizes)
        self.device = next(iter(self.model.parameters())).device
        self.span = int(self.model.num_frames)
        self._check_budget()

    def _check_budget(self) -> None:
        budget, model = self.settings.budget, self.model
        if budget is None:
            return
        if hasattr(model, "token_counts"):  # a grid: whole levels only
            choices = model.token_counts(1, self.settings.size)[:-1]
            if budget not in choices:
                raise ValueError(
                    f"budget={budget}: the tokens of this model are a grid, of which whole levels can be left out: "
                    + (f"ask for {', '.join(map(str, choices))} of each group" if choices else "it has one level only")
                )
        elif not 1 <= budget <= model.num_tokens:
            raise ValueError(f"budget={budget}: a group of this model has 1 to {model.num_tokens} tokens")

    def shard(
        self, reader: ShardReader, index: int, *, lost: dict[str, str], notify: Notify
    ) -> Iterator[tuple[str, list[TokenSample] | Rejected]]:
        """(key, its samples or why there are none) of every sample of a shard, in order.

        lost: {key: reason} of samples not to touch. notify: called with each key before it is touched.
        Raises: OSError where the shard cannot be read.
        """
        batches = _Batches(self)
        waiting: list[_Pending] = []
        for sample in reader.samples(index):
            if sample.passing:
                raise OSError(f"{reader.shards[index].url}: {sample.problem}")
            notify(sample.key)
            waiting.append(self._begin(reader, sample, batches, lost=lost))
            while waiting and (waiting[0].rejected or all(slot in batches.done for slot in waiting[0].slots)):
                yield self._finish(waiting.pop(0), batches)
        batches.flush()
        for pending in waiting:
            yield self._finish(pending, batches)

    def _begin(self, reader: ShardReader, sample: Sample, batches: _Batches, *, lost: dict[str, str]) -> _Pending:
        pending = _Pending(sample.key)
        reason = sample.problem or lost.get(sample.key)
        if reason is not None:
            pending.rejected = Rejected(reason, sample.lost)
            return pending
        try:
            pending.facts = read_facts(reader, sample)
            suffix = next(suffix for suffix in self.view.media if suffix in sample.members)
            if self.view.map:
                pending.fps, frames = self._frames_of_map(reader, sample, suffix, pending.facts.get("fps"))
                self._take(frames, pending, batches)
            else:
                with VideoReader(reader.read(sample, suffix)) as video:
                    pending.fps = None if video.is_image else (self.settings.fps or video.fps)
                    self._take(self._frames(video), pending, batches)
        except (DecodeError, BrokenSample) as error:
            pending.rejected = Rejected(str(error))
        return pending

    def _take(self, frames: Iterator[np.ndarray], pending: _Pending, batches: _Batches) -> None:
        while (slot := self._piece(frames, batches)) is not None:
            pending.slots.append(slot)

    def _frames(self, video: VideoReader) -> Iterator[np.ndarray]:
        """Every frame at the rate, fitted: uint8 [H, W, 3] of settings.size."""
        plain = video.is_image or self.settings.fps is None
        shown = (frame for frame, _ in video.frames()) if plain else video.at_rate(self.settings.fps or 0)
        last = out = None
        for frame in shown:
            if frame is not last or out is None:
                if last is not None and frame.shape != last.shape:
                    raise DecodeError(f"the frame size changes from {last.shape[:2]} to {frame.shape[:2]}")
                pixels = torch.from_numpy(np.ascontiguousarray(frame))[None]
                last, out = frame, fit(pixels, self.view, None)[:, 0].permute(1, 2, 0).numpy()
            yield out

    def _frames_of_map(
        self, reader: ShardReader, sample: Sample, suffix: str, fps: Any
    ) -> tuple[float | None, Iterator[np.ndarray]]:
        """(frames per second, None for a single frame; frames float32 [H, W, C] in [-1, 1]) of a dense map."""

        def read(first: int, num_bytes: int) -> bytes:
            return reader.read(sample, suffix, first=first, num_bytes=num_bytes)

        header = read_header(read(0, HEAD_BYTES), sample.members[suffix][1])
        single = header.shape[0] == 1
        if header.shape[3] != self.model.channels:
            raise MapError(f"the map has {header.shape[3]} channels, the model takes {self.model.channels}")
        if not single and not (type(fps) in (int, float) and math.isfinite(fps) and fps > 0):
            raise MapError(f"fps is {str(fps)[:40]!r} in .json, not a number above 0")
        source = 1.0 if single else float(fps)
        rate = source if single else self.settings.fps or source

        def frames() -> Iterator[np.ndarray]:
            first = 0
            while first / rate < header.shape[0] / source - EPSILON_S:
                asked: dict[str, Any] = {"start_s": first / rate, "num_frames": self.span, "source_fps": source}
                part, _ = window_of_map(read, header, fps=rate, **asked)
                part = part if part.is_floating_point() else part.float().div_(127.5).sub_(1.0)
                yield from fit(part, self.view, None).permute(1, 2, 3, 0).numpy()
                first += len(part)

        return None if single else rate, frames()

    def _piece(self, frames: Iterator[np.ndarray], batches: _Batches) -> int | None:
        """Take the next piece of a video (all of it, or `clip_frames`); the slot of its tokens, None at the end."""
        most = self.settings.batch_size * self.span
        rest = frames if self.settings.clip_frames is None else itertools.islice(frames, self.settings.clip_frames)
        head = list(itertools.islice(rest, most))
        if not head:
            return None
        if len(head) < most:
            return batches.add(np.stack(head))
        following = next(rest, None)
        if following is None:
            return batches.add(np.stack(head))
        return batches.put(self._stream(itertools.chain(head, [following], rest)))

    def _stream(self, frames: Iterable[np.ndarray]) -> _Coded:
        count = 0

        def counted() -> Iterator[np.ndarray]:
            nonlocal count
            for frame in frames:
                count += 1
                yield frame

        parts = [self._coded(tokens, 0) for tokens in stream_tokens(self.model, counted())]
        return _Coded(np.concatenate([p.ids for p in parts]), [n for p in parts for n in p.groups], count)

    @torch.inference_mode()
    def encode(self, videos: list[np.ndarray]) -> list[_Coded]:
        """Videos [T, H, W, C] of any lengths, at once: uint8 levels, or floats in [-1, 1]."""
        lengths = [len(video) for video in videos]
        pixels = np.empty((len(videos), max(lengths), *videos[0].shape[1:]), videos[0].dtype)
        for row, video in enumerate(videos):
            pixels[row, : len(video)] = video
            pixels[row, len(video) :] = video[-1]
        clip = Clip(
            keys=[str(row) for row in range(len(videos))],
            video=torch.from_numpy(pixels).permute(0, 4, 1, 2, 3),
            lengths=None if min(lengths) == max(lengths) else torch.tensor(lengths),
        )
        tokens = self.model.encode(clip.to(self.device))
        return [self._coded(tokens, row)._replace(frames=lengths[row]) for row in range(len(videos))]

    def _coded(self, tokens: Tokens, row: int) -> _Coded:
        """Ids of one clip, within the budget of every group."""
        assert tokens.indices is not None
        length = int(tokens.lengths[row])
        ids, group, rank = (v[row, :length].cpu().numpy() for v in (tokens.indices, tokens.group, tokens.rank))
        if self.settings.budget is not None:
            keep = rank < self.settings.budget
            ids, group, rank = ids[keep], group[keep], rank[keep]
        counts = np.bincount(group)
        ordered = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
        if not (np.array_equal(rank, ordered) and np.array_equal(group, np.repeat(np.arange(len(counts)), counts))):
            raise ValueError(
                f"{self.model.config.name} leaves out tokens inside a group: there is no way to store that"
            )
        return _Coded(
            ids.astype(self.dtype), counts.tolist(), int(tokens.frames[row]) if tokens.frames is not None else 0
        )

    def _finish(self, pending: _Pending, batches: _Batches) -> tuple[str, list[TokenSample] | Rejected]:
        coded = [batches.done.pop(slot) for slot in pending.slots if slot in batches.done]
        if pending.rejected:
            batches.forget(pending.slots)
            return pending.key, pending.rejected
        if not coded:
            return pending.key, Rejected("0 frames")
        out, first = [], 0
        for number, each in enumerate(coded):
            cut = self.settings.clip_frames is not None
            start_s, duration_s = (
                (0.0, None) if pending.fps is None else (first / pending.fps, each.frames / pending.fps)
            )
            facts = piece_facts(pending.facts, start_s, duration_s) if cut and duration_s else pending.facts
            key = f"{pending.key}__{number:04d}" if cut else pending.key
            out.append(TokenSample(key, each.ids, facts, self._facts(each, pending.fps, start_s)))
            first += each.frames
        return pending.key, out

    def _facts(self, coded: _Coded, fps: float | None, start_s: float) -> SampleFacts:
        grids: list[list[int]] = []
        if hasattr(self.model, "layout"):
            layout = self.model.layout(len(coded.groups), self.settings.size, begins=True, device=torch.device("cpu"))
            left = len(coded.ids)
            for shape in layout.shapes:
                if left > 0:
                    grids.append(list(shape))
                    left -= int(np.prod(shape))
        return SampleFacts(
            groups=coded.groups,
            frames=coded.frames,
            fps=fps,
            size=list(self.settings.size),
            grids=grids,
            codebook_sizes=list(self.model.codebook_sizes),
            start_s=round(start_s, 6),
            budget=self.settings.budget,
        )


class _Batches:
    """Pieces that wait for others of like length. done: ids by slot."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.batch_size, self.span = encoder, encoder.settings.batch_size, encoder.span
        self.done: dict[int, _Coded] = {}
        self.waiting: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)  # by number of spans
        self.slots = 0

    def put(self, coded: _Coded) -> int:
        self.slots += 1
        self.done[self.slots - 1] = coded
        return self.slots - 1

    def add(self, video: np.ndarray) -> int:
        """The slot where the ids of a video [T, H, W, C] will be; T at most batch_size * span."""
        slot, spans = self.slots, -(-len(video) // self.span)
        self.slots += 1
        self.waiting[spans].append((slot, video))
        if (len(self.waiting[spans]) + 1) * spans > self.batch_size:
            self._encode(spans)
        while sum(spans * len(held) for spans, held in self.waiting.items()) > 2 * self.batch_size:
            self._encode(max(self.waiting, key=lambda spans: spans * len(self.waiting[spans])))
        return slot

    def flush(self) -> None:
        for spans in sorted(self.waiting):
            if self.waiting[spans]:
                self._encode(spans)

    def forget(self, slots: list[int]) -> None:
        """Leave out pieces of a video that broke further on. They stay in their batch, or others' would change."""
        for slot in slots:
            self.done.pop(slot, None)

    def _encode(self, spans: int) -> None:
        held = self.waiting.pop(spans)
        for (slot, _), coded in zip(held, self.encoder.encode([video for _, video in held])):
            self.done[slot] = coded


def piece_facts(facts: dict[str, Any], start_s: float, duration_s: float) -> dict[str, Any]:
    """The json of a piece of a clip: the captions on show in it, the questions that it can answer."""
    end_s = start_s + duration_s
    captions = []
    for caption in facts.get("captions") or []:
        first, last = max(caption["start_s"], start_s), min(caption["end_s"], end_s)
        if first < last:
            span = {"start_s": round(first - start_s, 6), "end_s": round(last - start_s, 6)}
            captions.append({**caption, **span})
    questions = []
    for question in facts.get("qa") or []:
        if "start_s" in question:
            if question["start_s"] < start_s or question["end_s"] > end_s:
                continue
            span = {name: round(question[name] - start_s, 6) for name in ("start_s", "end_s")}
            question = {**question, **span}
        questions.append(question)
    out = {**facts, "start_s": round(facts.get("start_s", 0.0) + start_s, 6), "duration_s": round(duration_s, 6)}
    return out | ({"captions": captions} if "captions" in facts else {}) | ({"qa": questions} if "qa" in facts else {})


def tokens_of(model: Any, ids: np.ndarray | Tensor, *, groups: list[int], frames: int) -> Tokens:
    """Ids [K] or [K, Q] with their tokens a group and their frames, as `Tokens` (of one clip) that `model` decodes.

    Raises: ValueError for ids that are not those of so many tokens, or lie outside the codebooks.
    """
    sizes = torch.tensor(model.codebook_sizes)
    rows = torch.as_tensor(ids, dtype=torch.int64).reshape(-1, len(sizes))
    if len(rows) != sum(groups):
        raise ValueError(f"{len(rows)} tokens for groups of {sum(groups)}: ids must fill the groups")
    if bool((rows < 0).any()) or bool((rows >= sizes).any()):
        raise ValueError(
            f"ids lie in [{int(rows.min())}, {int(rows.max())}], the codebooks have {sizes.tolist()} entries"
        )
    device = next(iter(model.parameters())).device
    counts = torch.tensor(groups)
    group = torch.repeat_interleave(torch.arange(len(groups)), counts)
    rank = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[group]
    return model.tokens_from_indices(
        rows[None].to(device),
        lengths=torch.tensor([len(rows)], device=device),
        group=group[None].to(device),
        rank=rank[None].to(device),
        frames=torch.tensor([frames], device=device),
    )


@torch.inference_mode()
def decode_ids(
    model: Any, ids: np.ndarray | Tensor, *, groups: list[int], frames: int, size: tuple[int, int]
) -> np.ndarray:
    """The frames uint8 [T, H, W, C] that ids stand for."""
    video = model.decode(tokens_of(model, ids, groups=groups, frames=frames), size=size)
    return to_uint8(video)[0].permute(1, 2, 3, 0).cpu().numpy()


def decode_sample(model: Any, sample: TokenSample) -> np.ndarray:
    """The frames uint8 [T, H, W, C] of one sample of token shards that were opened for this model."""
    facts: SampleFacts = sample.tokens
    if list(model.codebook_sizes) != list(facts.codebook_sizes):
        raise TokenShardError(
            f"{sample.key} has ids of codebooks {facts.codebook_sizes}, the model has {list(model.codebook_sizes)}"
        )
    height, width = facts.size
    return decode_ids(model, sample.ids, groups=facts.groups, frames=facts.frames, size=(height, width))
