"""The caption part of a compressor with a small language model (mode caption_lm): segments in, `Tokens` out.

    segment, question, request --SmallReader--> soft caption --head--.
    patches of the segment --base tokens (`vtok.layers.base_tokens`)--+--> tokens of the segment, cut to the budget

Letters: B clips, G segments of a clip, M segments of the batch, S visual inputs of a segment, F frames, N patches, n
words, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vtok.layers.base_tokens import BaseConfig, BaseTokens
from vtok.layers.latent_queries import LatentQueries
from vtok.layers.segment_tokens import fair_shares, segment_ends, segment_tokens
from vtok.llm.small import SmallReader
from vtok.llm.soft_captions import (
    CaptionConfig,
    Learned,
    LengthHead,
    Prompt,
    Written,
    caption_ids,
    learn,
    segment_captions,
    sketch,
    teach,
    write,
)
from vtok.llm.splice import PLACEHOLDER, splice
from vtok.types import Budget, ShapeError, Tokens


class Segments(NamedTuple):
    """Segments of a batch of videos. there: [B, G] bool, those that there are, M of them. visual: [M, S, D], as wide as
    the small model's words; inside: [M] of them real. patches: [M, F, N, D'] of the tower, on a grid, frames [M] real.
    asked: ids of the question of each of the M. times: [B, G, 2] seconds of the first and the last frame."""

    there: Tensor
    visual: Tensor
    inside: Tensor
    patches: Tensor
    grid: tuple[int, int]
    frames: Tensor
    asked: list[list[int]]
    times: Tensor | None


class Captioner(nn.Module):
    """What learns in soft captions beside the small language model and the head.

    learned: what the target captions taught in the last training step; None where there were none to learn.
    kept: [B, G] int64, words of each segment among the tokens that were made last, 0 past a clip's own.

    Args:
        captions, base: as the model's. words: of a caption at most. width, rms: of the small model's words. out:
            in_dim, dim and rms of base tokens. opening: what the small model is told before a segment.
    """

    def __init__(
        self,
        captions: CaptionConfig,
        base: BaseConfig,
        *,
        words: int,
        width: int,
        rms: float,
        out: dict[str, Any],
        opening: str = "",
    ):
        super().__init__()
        self.config, self.words, self.opening = captions, words, opening
        self.queries = LatentQueries(words, width, rms=rms) if captions.how == "parallel" else None
        self.length = LengthHead(width, most=words) if captions.length == "head" else None
        self.base = BaseTokens(base, **out) if base.kind else None
        self.learned: Learned | None = None
        self.kept: Tensor | None = None

    def forward(
        self,
        reader: SmallReader,
        head: nn.Module,
        segments: Segments,
        *,
        limit: Tensor,
        captions: list[Any] | None = None,
        exact: Tensor | None = None,
    ) -> Tokens:
        """Tokens of each segment: base tokens, then those of its words.

        Args:
            limit: [B] int64, tokens of a clip at most, or [B, G], of each segment.
            captions: of each clip, entries as `Clip.captions` has them: targets, where the model is in training.
            exact: [B, up to G] int64, words of each segment, before the limit; None: as many as there is to tell.
        Raises: ShapeError for `exact` of other segments; ValueError for words that a caption cannot have.
        """
        there, prompt = segments.there, self.prompt(reader, segments)
        targets = None
        if self.training and self.config.learn:
            targets = self.targets(reader, captions or [[]] * len(there), segments)
        if exact is not None:
            exact = pad(exact.to(there.device), (0, there.shape[1] - exact.shape[1]))
            if exact.shape != there.shape or int(exact[there].min()) < 1:
                raise ShapeError(
                    f"exact has {list(exact.shape)} lengths or one below 1, the clips {list(there.shape)} segments"
                )
            exact = exact[there]
            if int(exact.max()) > self.words:
                raise ValueError(
                    f"exact asks for {int(exact.max())} words of a segment: ask for 1 to {self.words} "
                    "(model.num_tokens)"
                )
        written = self.write(reader, prompt, targets, exact)
        made, words, beside = head(written.states), written.lengths, 0
        if self.base is not None:
            base = self.base(segments.patches, segments.grid, segments.frames)
            beside = base.shape[1]
            made, words = torch.cat([base.to(made.dtype), made], 1), words + beside
        has = torch.zeros(there.shape, dtype=torch.int64, device=made.device).masked_scatter(there, words)
        kept = torch.minimum(has, limit.to(has)) if limit.ndim == 2 else fair_shares(has, limit.to(has))
        self.kept = (kept - beside).clamp(min=0)
        return segment_tokens(made, kept, there.sum(1), times=segments.times)

    def prompt(self, reader: SmallReader, segments: Segments) -> Prompt:
        """What the small model reads before it writes: a segment, the question, the request."""
        visual = segments.visual
        before, after = reader.word_ids(self.opening), reader.word_ids(self.config.request)
        nowhere = visual.new_zeros(*visual.shape[:2], 3)
        zeros = torch.zeros_like(nowhere[..., 0], dtype=torch.int64)
        pieces = Tokens(visual, segments.inside, nowhere, zeros, zeros)
        prompts = [[*before, PLACEHOLDER, *own, *after] for own in segments.asked]
        room = reader.positions - self.words
        made = splice(prompts, pieces, reader.embed_words, pad="left", max_length=room)
        return Prompt(made.embeds, made.mask)

    def targets(self, reader: SmallReader, captions: list[Any], segments: Segments) -> list[list[int]]:
        """Ids of the caption of each segment; [] where there is none."""
        there, times, ends, told = segments.there, segments.times, None, []
        if times is not None:
            frames = torch.ones_like(there, dtype=torch.int64).masked_scatter(there, segments.frames)
            ends = segment_ends(times, there, frames=frames)
            begins = times[..., 0].double()
            ends = torch.where(ends.isfinite(), ends, begins).maximum(begins + 1e-3)  # a moment, at least
        for row, count in enumerate(there.sum(1).tolist()):
            if times is None or ends is None:  # nobody knows what is on show when
                told += [" ".join(_text(entry) for entry in captions[row])] * count
                continue
            told += segment_captions(captions[row], times[row, :count, 0].tolist(), ends[row, :count].tolist())
        return [caption_ids(reader.word_ids, self.config.request, text) for text in told]

    def write(
        self, reader: SmallReader, prompt: Prompt, targets: list[list[int]] | None, exact: Tensor | None
    ) -> Written:
        """The captions whose states are handed on; sets `learned` where there are targets.

        targets: ids of each segment's caption. exact: [M] words of each.
        """
        most, stop = self.words, reader.tokenizer.eos_token_id
        counts, self.learned = self._counts(exact), None
        if self.queries is not None:
            written = sketch(reader, prompt, self.queries(most), stop=stop, counts=counts)
            if targets is None:
                return written
            self.learned = learn(written, targets, stop=stop, most=most, head=self.length)
            own = torch.tensor([min(max(len(row), 1), most) for row in targets], device=written.lengths.device)
            return written._replace(lengths=own)
        if targets is not None:
            read = teach(reader, prompt, [row[:most] or [stop] for row in targets], logits=True)
            self.learned = learn(read, targets, stop=stop, most=most, head=self.length)
            if self.config.how == "teacher_forced":
                return read
        written = write(reader, prompt, stop=stop, most=most, counts=counts, anyone=lambda goes: _anyone(goes, reader))
        parts = [part for part in (reader.lm, reader.adapters) if part is not None]
        learns = prompt.embeds.requires_grad or any(p.requires_grad for part in parts for p in part.parameters())
        if not (torch.is_grad_enabled() and learns):
            return written
        own_words = [row[:count] for row, count in zip(written.ids.tolist(), written.lengths.tolist())]
        return teach(reader, prompt, own_words, logits=False)  # the same states, with their gradients

    def _counts(self, exact: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        """The number of words of each segment, given the state before the first; None: up to the stop."""
        head = self.length
        if exact is not None:
            return lambda before: exact
        if head is not None:
            return lambda before: head.words(head(before), most=self.words)
        return None


def _anyone(goes_on: bool, reader: nn.Module) -> bool:
    """Whether any rank writes another word, where the weights are split over ranks and all have to call at once."""
    held = next(reader.parameters())
    # how DeepSpeed marks split parameters, and torch the modules whose parameters it has split (fully_shard)
    if not hasattr(held, "ds_id") and not any(type(part).__name__.startswith("FSDP") for part in reader.modules()):
        return goes_on
    flag = torch.tensor(int(goes_on), device=held.device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)


def _text(entry: Any) -> str:
    return str(entry.get("text") or "") if isinstance(entry, dict) else str(entry)


def limits(budget: Budget | None, *, most: int, there: Tensor, base: int = 0) -> Tensor:
    """[B] int64: tokens that each clip may have, or [B, G], each segment.

    there: [B, G] bool, segments that there are. base: tokens of each beside its words.

    Raises: ValueError for budgets out of range, and for clips that without one have more segments than `most` tokens
        give their base and a word; ShapeError for those of another shape.
    """
    shape, segments = there.shape, int(there.sum(1).max())
    if budget is None and segments * (base + 1) > most:
        raise ValueError(
            f"model.max_tokens={most} cannot hold a clip of {segments} segments, each with {base} base tokens "
            f"(model.base) and a word at least: set it to {segments * (base + 1)} or more, or lower model.max_frames, "
            "or raise model.window"
        )
    if isinstance(budget, Tensor) and budget.ndim == 2:
        if budget.shape != shape or budget.is_floating_point() or int(budget.min()) < 0:
            raise ShapeError(f"budget is {budget.dtype} {list(budget.shape)}, expected int64 {list(shape)}, 0 or more")
        return budget
    asked = torch.as_tensor(most if budget is None else budget, device="cpu").expand(shape[0])
    for value in asked.tolist():
        if not 1 <= value <= most:
            raise ValueError(f"budget={value} is out of range: ask for 1 to {most} (model.max_tokens)")
    return asked
