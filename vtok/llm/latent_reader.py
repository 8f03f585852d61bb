"""The queries' part of a compressor with a small language model (mode latent_lm): segments in, `Tokens` out.

    words or patches of a segment, queries after them --SmallReader--> states --head--> tokens of the segment
    scores of segments (known before, or of the state before the first query) --budget--> how many queries each has

Letters: B clips, G segments of a clip, M segments of the batch, S inputs of a segment, n queries, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.layers.judge import JUDGED, Judge, by_clip, with_scores
from vtok.layers.latent_queries import LatentQueries, WordHead, at_the_end, run_sums
from vtok.layers.segment_tokens import segment_tokens
from vtok.llm.small import SmallReader
from vtok.llm.splice import PLACEHOLDER, splice
from vtok.types import Budget, ShapeError, Tokens, resolve_budget, share


class LatentReader(SmallReader):
    """Base of a `Model` that reads segments with queries after them; how scores share a budget, the model says.

    queries: None where it has none (caption_lm). judge: of scores that the small model gives, or None. Its `config` has
    num_tokens, queries, opening and `ata`.
    """

    queries: LatentQueries | None
    head: WordHead
    judge: Judge | None
    max_tokens: int

    def most_by_score(self, total: Tensor, groups: Tensor) -> int:
        """Tokens that any segment has at most, whatever the scores. total, groups: [B] int64, tokens and segments."""
        raise NotImplementedError

    def share_by_score(self, scores: Tensor, total: Tensor, groups: Tensor) -> Tensor:
        """[B, G] int64: tokens of each segment, by its score [B, G]."""
        raise NotImplementedError

    def latent_tokens(
        self,
        rows: list[tuple[int, list[int]]],
        groups: Tensor,
        budget: Budget | None,
        *,
        visual: Tensor | None = None,
        inside: Tensor | None = None,
        times: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> Tokens:
        """Tokens of segments that are read in one packed call, as many of each as the budget says.

        Args:
            rows: (clip, ids) of each segment. groups: [B] segments of each clip. visual: [M, S, D], inside: [M] of them
            real. times: [B, G, 2]. scores: [B, G] of segments, where they are known before these are read.
        """
        ata = self.config.ata
        judge: Judge | None = self.judge if ata.score in JUDGED else None
        by_score = bool(ata.score) and not (isinstance(budget, Tensor) and budget.ndim == 2)
        wanted, most, total = None, 0, groups
        if by_score:
            total = self._asked(len(groups), budget)
            most = self.most_by_score(total, groups)
        else:
            wanted = self._shares(groups, budget)  # [B, G]
        ids, runs = [own for _, own in rows], None
        most_groups = int(groups.max()) if wanted is None else wanted.shape[1]
        there = torch.arange(most_groups, device=groups.device) < groups[:, None]
        pooled = self.config.queries == "pooled"
        if judge is not None and pooled:  # how many queries there are decides what each begins from: judged before
            scores, judge = by_clip(judge(self._read(ids, 0, visual, inside, before=True)[:, 0]), there), None
        if by_score and judge is None and scores is not None:
            wanted = self.share_by_score(scores, total, groups)
        count = max(int(wanted.max()) if wanted is not None else most, 1)
        if pooled:
            assert wanted is not None
            runs = self._runs(ids, wanted[there], visual, inside)
            runs = F.pad(runs, (0, 0, 0, count - runs.shape[1]))
        states = self._read(ids, count, visual, inside, runs=runs, before=judge is not None)
        if judge is not None:
            scores, states = by_clip(judge(states[:, 0]), there), states[:, 1:]
            if wanted is None:
                wanted = self.share_by_score(scores, total, groups)
        assert wanted is not None
        return with_scores(segment_tokens(self.head(states, runs), wanted, groups, times=times), scores, groups)

    def _asked(self, clips: int, budget: Budget | None) -> Tensor:
        """[B] int64: tokens that are asked of each clip, on the CPU."""
        asked = torch.as_tensor(self.max_tokens if budget is None else budget, device="cpu").expand(clips)
        for value in asked.tolist():
            if not 1 <= value <= self.max_tokens:
                raise ValueError(f"budget={value} is out of range: ask for 1 to {self.max_tokens} (model.max_tokens)")
        return asked

    def _shares(self, groups: Tensor, budget: Budget | None) -> Tensor:
        """[B, G] int64: tokens of each segment."""
        most = self.config.num_tokens
        if isinstance(budget, Tensor) and budget.ndim == 2:
            found = resolve_budget(budget, groups=groups, max_per_group=most)
            assert found is not None
            past = torch.arange(found.shape[1], device=found.device) >= groups[:, None]
            if bool(((found > 0) & past).any()):
                raise ShapeError("budget asks for tokens of segments that a clip does not have")
            if int(found.sum(1).min()) < 1:
                raise ValueError("budget: a clip is to have no token at all; give each clip 1 or more")
            return found
        asked = self._asked(len(groups), budget).tolist()
        out = torch.zeros(len(groups), int(groups.max()), dtype=torch.int64)
        for row, (total, count) in enumerate(zip(asked, groups.tolist())):
            out[row, :count] = torch.tensor(share(min(total, count * most), count))
        return out.to(groups.device)

    def _runs(self, ids: list[list[int]], counts: Tensor, visual: Tensor | None, inside: Tensor | None) -> Tensor:
        """[M, n, D]: sums of `counts` [M] runs of each segment's words, or of its patches (not of the question)."""
        if visual is not None and inside is not None:
            return run_sums(visual, inside, counts)
        padded = torch.tensor(padded_ids(ids), device=counts.device)
        return run_sums(self.embed_words(padded.clamp(min=0)), (padded >= 0).sum(1), counts)

    def _read(
        self,
        ids: list[list[int]],
        count: int,
        visual: Tensor | None,
        inside: Tensor | None,
        *,
        runs: Tensor | None = None,
        before: bool = False,
    ) -> Tensor:
        """States [M, count, D] of the queries after the segments' inputs, all in one call; before: [M, 1 + count, D],
        that of the position before the first query too (count may then be 0). runs: [M, count, D] that the queries
        begin from."""
        assert self.queries is not None
        queries = self.queries(count).expand(len(ids), -1, -1)
        queries = queries if runs is None else queries + runs
        opening = self.word_ids(self.config.opening)
        if visual is None or inside is None:
            tail, seen = queries, torch.zeros(len(ids), dtype=torch.int64, device=queries.device)
            prompts = [[*opening, *own, PLACEHOLDER] for own in ids]
        else:
            at = (inside[:, None] + torch.arange(count, device=inside.device))[..., None].expand_as(queries)
            tail = torch.cat([visual, visual.new_zeros(queries.shape)], 1).scatter(1, at, queries.to(visual.dtype))
            seen, after = inside, [PLACEHOLDER] * bool(count)
            prompts = [[*opening, PLACEHOLDER, *own, *after] for own in ids]
        slots = torch.arange(tail.shape[1], device=seen.device)
        second = (slots >= seen[:, None]) & (visual is not None)
        nowhere = tail.new_zeros(*tail.shape[:2], 3)
        pieces = Tokens(tail, seen + count, nowhere, second.long(), torch.zeros_like(second, dtype=torch.int64))
        made = splice(prompts, pieces, self.embed_words, max_length=self.positions)
        states = self._states(made.embeds, made.mask)
        return at_the_end(states, made.mask.sum(1), count + before)


def padded_ids(rows: list[list[int]]) -> list[list[int]]:
    """Ids of one length, filled up with -1."""
    most = max(1, *(len(row) for row in rows))
    return [[*row, *[-1] * (most - len(row))] for row in rows]
