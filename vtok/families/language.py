"""A small language model reads a text, or a video, and hands a frozen large one a few tokens.

    segments of words, or windows of visual features (and the question) --.
    learned queries after them, or words that it writes --small language model--> states there --head--> Tokens

latent_lm: C3 (Context Cascade Compression, https://arxiv.org/abs/2511.15244) for texts, and the compressor of Tempo
(https://arxiv.org/abs/2604.08120) for videos. One pass, nothing is generated. A group of tokens is a segment: a stretch
of the text, or a window of frames, all of which go through the small model in one packed call, however many there are
and whatever they hold, so that sharded training (ZeRO-3) never waits for a rank with shorter clips. Queries see those
before them alone, so the first k tokens of a segment are what k queries would have given: any budget is met exactly,
and one model trained with random budgets serves them all. With `queries=pooled` (of neither paper) each query begins
from a run of its segment, which another number of queries cuts elsewhere: budgets are met by tokens of their own.
`ata` shares a budget by what matters (vtok/budget/ata.py): segments have scores, by the question or without one, and a
higher score is given more tokens.

caption_lm: LangDC (https://arxiv.org/abs/2509.00969) for videos. The small model describes each segment, and its states
at the words of the description are the tokens (vtok/llm/soft_captions.py): as many as there is to tell. A budget is
never exceeded. Base tokens, of what a segment looks like, may stand before its words (vtok/layers/base_tokens.py).

The small model is any causal language model of transformers: all of it learns and ships, or adapters in it do, or
nothing but queries and head; what does not learn is held by reference, outside of checkpoints and engines.

Letters: B clips, G segments of a clip, M segments of a batch, S inputs of a segment, n queries, K tokens per clip, T
frames, N patches of a frame, L positions, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.budget import AtaConfig, allocate_segments, segment_bounds
from vtok.layers.base_tokens import BaseConfig
from vtok.layers.frames import pool_patches, thin
from vtok.layers.judge import (
    JUDGED,
    Judge,
    JudgeConfig,
    WordMatch,
    first_ids,
    segment_scores,
)
from vtok.layers.latent_queries import LatentQueries, WordHead
from vtok.layers.projector import ProjectorConfig, ProjectorModel
from vtok.layers.relevance import novelty, word_similarity
from vtok.layers.unread import refuse_unread
from vtok.llm.beginnings import begin_at_words, warm_start
from vtok.llm.caption_objective import CaptionObjective, CaptionObjectiveConfig
from vtok.llm.captioner import Captioner, Segments, limits
from vtok.llm.latent_reader import LatentReader, padded_ids
from vtok.llm.small import SmallLM, fill_in
from vtok.llm.soft_captions import CaptionConfig
from vtok.types import Budget, Clip, Features, Tokens
from vtok.vision import TowerConfig

Objective = CaptionObjective
ObjectiveConfig = CaptionObjectiveConfig
__all__ = ["Config", "Model", "Objective", "ObjectiveConfig", "SmallLM", "build"]

MODES, SOURCES, HEADS = ("latent_lm", "caption_lm"), ("text", "video"), ("linear", "mlp")
QUERIES = ("learned", "pooled")


@dataclass
class Config(ProjectorConfig):
    name: str = "language"
    mode: str = "latent_lm"
    source: str = "text"  # what is compressed: text (of the clips, data.texts=true) | video
    lm: SmallLM = field(default_factory=SmallLM)
    num_tokens: int = 64  # queries, or words of a caption: tokens of a segment at most
    max_tokens: int = 1024  # of a clip; longer ones share them evenly over their segments
    # learned | pooled: each begins from the sum of a run of the segment's inputs, which is handed to the head as well
    queries: str = "learned"
    head: str = "linear"  # linear | mlp
    segment_words: int = 0  # text: ids of a segment; 0 = the whole text is one
    opening: str = ""  # what the small model is told before each segment
    # of videos
    tower: TowerConfig = field(default_factory=TowerConfig)
    window: int = 8  # frames of a segment
    patches: int = 0  # of a frame, averaged over a grid; 0 = all
    max_frames: int = 1024  # feature frames looked at; longer clips are thinned out evenly
    question: bool = False  # the small model is told the question: tokens are then for that question alone
    # which segments are given more of a clip's tokens; score="": none, all are given as many. novelty asks nothing,
    # similarity compares the question's words, by learned weights, with the patches, yes_no and learned are what the
    # small model makes of a segment (and of the question where it is told it)
    ata: AtaConfig = field(default_factory=AtaConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    # of caption_lm
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("mode", self.mode, MODES),
            ("source", self.source, SOURCES),
            ("head", self.head, HEADS),
            ("queries", self.queries, QUERIES),
        ):
            if value not in choices:
                raise ValueError(f"model.{name}={value!r} is unknown; choose one of {', '.join(choices)}")
        for name, least in (("num_tokens", 1), ("max_tokens", 1), ("segment_words", 0), ("window", 1), ("patches", 0),
                            ("max_frames", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least {least}")
        if self.source == "text" and self.question:
            raise ValueError("model.question=true is for videos: a text is compressed before anything is asked of it")
        if self.mode == "caption_lm" and self.source != "video":
            raise ValueError(f"model.mode=caption_lm tells of videos: set model.source=video, not {self.source!r}")
        if self.mode != "caption_lm" and self.base.kind:
            raise ValueError(f"model.base.kind={self.base.kind!r} stands beside captions: set model.mode=caption_lm")
        score = self.ata.score
        if self.queries == "pooled" and self.mode != "latent_lm":
            raise ValueError(
                f"model.queries=pooled is for mode=latent_lm, whose queries they are, not model.mode={self.mode}: set "
                "model.queries=learned"
            )
        if score in (*JUDGED, "similarity") and self.ata.weights == "linear":
            raise ValueError(
                f"model.ata.weights=linear takes scores of 0 or above, those of model.ata.score={score} can lie below: "
                "choose softmax or minmax"
            )
        if score and (self.source == "text" or self.mode != "latent_lm"):
            raise ValueError(f"model.ata.score={score!r} is for mode=latent_lm and source=video")
        if score == "yes_no" and not (self.question and self.lm.layer == -1):
            raise ValueError(
                f"model.ata.score=yes_no asks the small model about the question, and reads its last layer: it needs "
                f"model.question=true ({self.question}) and model.lm.layer=-1 ({self.lm.layer})"
            )
        of_text, of_video = ["segment_words"], ["window", "patches", "max_frames"]
        unread = [(key, "model.source=text") for key in of_text if self.source != "text"]
        unread += [(key, "model.source=video") for key in of_video if self.source != "video"]
        unread += [("captions", "model.mode=caption_lm")] * (self.mode != "caption_lm")
        unread += [("base", "model.base.kind=pool or former")] * (not self.base.kind)
        refuse_unread(self, unread)
        if self.base.kind == "pool":
            sizes = [(key, "model.base.kind=former") for key in ("width", "depth", "num_heads")]
            refuse_unread(self.base, sizes, where="model.base")

    @property
    def reads_prompt(self) -> bool:
        """Whether tokens are for one question: the small model is told it, or they are shared out by it."""
        return self.question or self.ata.score == "similarity"

    @property
    def most_of_segment(self) -> int:
        """Tokens that a segment is given at most."""
        if self.mode == "caption_lm":
            return self.base.tokens + self.num_tokens
        return min(self.num_tokens, self.ata.maximum) if self.ata.score else self.num_tokens

    @property
    def length_policy(self) -> str:
        return "metadata" if self.source == "video" and self.mode == "latent_lm" else "content"

    def _bounds(self, frames: int, grid: tuple[int, int], budget: int) -> tuple[int, int]:
        if self.source == "text":
            return super()._bounds(frames, grid, budget)
        segments = -(-min(frames, self.max_frames) // self.window)
        if self.mode == "caption_lm":
            least, most = (segments * (self.base.tokens + words) for words in (1, self.num_tokens))
            return min(budget, least), min(budget, most)
        count = min(budget, segments * self.most_of_segment)
        return count, count


class Model(LatentReader):
    """max_tokens: the largest budget. nested: a smaller budget keeps some of the tokens of a larger one. reads_prompt:
    whether tokens are for one question; if not, they can be kept for all that are asked later. captioner: of
    caption_lm; a clip then has as many tokens as there is to tell of it, and lengths of its own can be imposed."""

    any_budget = True
    from_files: tuple[str, ...] = ()  # parts that `build` filled with weights

    def __init__(self, config: Config):
        super().__init__(config, speaks=config.mode == "caption_lm")
        c, width, scale = config, self.small_width, self.small_rms
        for name in ("embedding_dim", "embedding_rms"):
            if not getattr(c, name) > 0:
                raise ValueError(f"model.{name}={getattr(c, name)} must be above 0: it is the LLM's")
        self.embedding_dim, self.max_tokens, self.reads_prompt = c.embedding_dim, c.max_tokens, c.reads_prompt
        self.queries = LatentQueries(c.num_tokens, width, rms=scale) if c.mode == "latent_lm" else None
        skip = c.queries == "pooled"
        self.head = WordHead(width, c.embedding_dim, kind=c.head, rms=c.embedding_rms, skip=skip)
        self.judge: Judge | None = None
        if c.ata.score in JUDGED:
            self.judge = Judge(width, kind=c.ata.score, yes=c.judge.yes or [], no=c.judge.no or [])
        self.match = WordMatch(width, in_dim=c.in_dim) if c.ata.score == "similarity" else None
        # what allocations leave out of the prompt they leave out of the tokens: all of a model's read the same
        self._asks = c.judge.ask if c.ata.score == "yes_no" else ""
        self.eye = None
        if c.source == "video":
            sizes: dict[str, Any] = dict(in_dim=c.in_dim, embedding_dim=width, embedding_rms=scale)
            self.eye = ProjectorModel(_EyeConfig(**sizes, tower=c.tower))
        self.head_taken = False  # whether the head is another model's: it then begins at no words
        self.captioner: Captioner | None = None
        if c.mode == "caption_lm":
            sizes = dict(words=c.num_tokens, width=width, rms=scale, opening=c.opening)
            out = dict(in_dim=c.in_dim, dim=c.embedding_dim, rms=c.embedding_rms)
            self.captioner = Captioner(c.captions, c.base, **sizes, out=out)

    @property
    def nested(self) -> bool:
        return self.config.queries == "learned" and not (self.config.ata.score and self.config.ata.stream)

    def allocating(self, **changes: Any) -> Model:
        """This model, weights shared, with other settings of `ata`: even shares with score="".

        Raises: ValueError for scores that it has no weights for.
        """
        other = copy.copy(self)
        other.config = replace(self.config, ata=replace(self.config.ata, **changes))
        asked = other.config.ata.score
        if asked in JUDGED and asked != self.config.ata.score:
            raise ValueError(
                f"ata.score={asked!r} needs a model that was trained with it, not {self.config.ata.score!r}"
            )
        other.reads_prompt = other.config.reads_prompt
        return other

    @property
    def tower(self) -> Any:
        """The frozen tower of videos (`vtok.vision.Tower`)."""
        assert self.eye is not None
        return self.eye.tower

    def features(self, clip: Clip, **asked: Any) -> Features | None:
        """The clip's features of the tower; None for texts, which need none."""
        return None if self.eye is None else self.eye.features(clip, **asked)

    def segments(self, clip: Clip) -> Tensor:
        """[B] int64: segments of each of these videos, told by their lengths alone."""
        found = (clip.features or {}).get(self.config.tower.name)
        frames = found.count() if found is not None else self.tower.feature_frames(clip.frames())
        return -(-frames.clamp(max=self.config.max_frames) // self.config.window)

    # tokens

    def encode(self, clip: Clip, *, budget: Budget | None = None) -> Tokens:
        """Tokens of a batch of clips, segment after segment.

        Args:
            budget: tokens of each clip, 1 to `max_tokens`, shared over its segments as `ata` says, or evenly, the
                remainder to the earliest; clips with fewer give all they have. int64 [B]: of each clip; [B, G]: of each
                segment. None: all, up to `max_tokens`. Of captions it is the most: what short ones leave, long ones
                are given.
        Raises: ValueError for budgets out of range, clips without a text, and segments longer than the small model.
        """
        if self.eye is not None:
            timed, texts = clip.captions or [[]] * len(clip), clip.text or [""] * len(clip)
            told = [own or [text] * bool(text) for own, text in zip(timed, texts)]
            return self.compress(self.eye.features(clip), budget=budget, prompt=clip.prompt, captions=told)
        if clip.text is None:
            raise ValueError(
                f"the clips {clip.keys[:4]} have no text, and model.source=text: set data.texts=true for shards of "
                "texts (`vtok shards --texts`)"
            )
        size = self.config.segment_words
        ids = [self.word_ids(text) for text in clip.text]
        parts = [[row[i : i + size] for i in range(0, len(row), size)] or [[]] if size else [row] for row in ids]
        groups = torch.tensor([len(row) for row in parts], device=self.head_device)
        return self.latent_tokens([(row, part) for row, rows in enumerate(parts) for part in rows], groups, budget)

    def compress(
        self,
        features: Features | None,
        *,
        budget: Budget | None = None,
        prompt: list[str] | None = None,
        captions: list[Any] | None = None,
        exact: Tensor | None = None,
    ) -> Tokens:
        """The same of a video's features; prompt: questions, read where `reads_prompt` is on. Where segments have
        scores, the tokens have them too (`vtok.layers.judge.Scored`).

        Args:
            captions: what is on show when, of each clip, as `Clip.captions`: targets of caption_lm in training.
            exact: [B, G] int64, caption_lm: words of each segment, before the budget, past the model's own stop where
                it is earlier; 0 past a clip's own segments.
        Raises: ValueError where tokens are for one question and there is none, and for words beyond a caption's most.
        """
        c = self.config
        if self.eye is None or features is None:
            raise ValueError("model.source=text compresses texts: give `encode` clips that have one")
        if prompt is None and self.reads_prompt:
            raise ValueError(
                f"model.question={c.question}, model.ata.score={c.ata.score!r}: tokens are for one question, and "
                "none was given: set Clip.prompt (or prompt=), one for each clip"
            )
        if exact is not None and self.captioner is None:
            raise ValueError(f"exact imposes lengths of captions: model.mode={c.mode} writes none; use budget")
        if prompt is not None and len(prompt) != len(features.patches):
            raise ValueError(f"{len(prompt)} prompts for {len(features.patches)} clips")
        features, _ = thin(features, c.max_frames)
        seen = pool_patches(self.eye.project(features), c.patches)
        patches = seen.patches
        lengths, frames = seen.count(), patches.shape[1]
        patches = F.pad(patches, (0, 0, 0, 0, 0, -frames % c.window))
        windows = patches.unflatten(1, (-1, c.window))  # [B, G, window, N, D]
        first = torch.arange(windows.shape[1], device=lengths.device) * c.window
        there = first < lengths[:, None]
        inside = (lengths[:, None] - first).clamp(max=c.window)[there] * patches.shape[2]
        told: list[list[int]] = [[]] * len(lengths)
        if prompt is not None and self.reads_prompt:
            told = [self.word_ids(text) for text in prompt]
        close = self.word_ids(self._asks)
        questions = [[*ids, *close] if c.question and ids else [] for ids in told]
        clips = there.nonzero()[:, 0]
        rows = [(row, questions[row]) for row in clips.tolist()]
        times = None
        if seen.times is not None:
            last = (first[None] + c.window - 1).minimum(lengths[:, None] - 1).clamp(min=0)
            begin = first[None].minimum(lengths[:, None] - 1)
            times = torch.stack([seen.times.gather(1, begin), seen.times.gather(1, last)], -1)
        visual, scores = windows[there].flatten(1, 2), None
        if self.captioner is not None:
            raw = F.pad(features.patches, (0, 0, 0, 0, 0, -frames % c.window)).unflatten(1, (-1, c.window))[there]
            inner = (lengths[:, None] - first).clamp(max=c.window)[there]
            own = [ids for _, ids in rows]
            segments = Segments(there, visual, inside, raw, features.grid, inner, own, times)
            limit = limits(budget, most=self.max_tokens, there=there, base=c.base.tokens)
            return self.captioner(self, self.head, segments, limit=limit, captions=captions, exact=exact)
        if c.ata.score == "novelty":
            at = torch.arange(features.patches.shape[1], device=lengths.device) // c.window
            scores = novelty(features, at.expand(len(lengths), -1))
        elif c.ata.score == "similarity":
            # a model that shares by something else has learned no map of patches: as its small model sees them
            shown = seen if self.match is None else pool_patches(features, c.patches)
            scores = self._similarity(shown, told, list(range(len(told))))
        return self.latent_tokens(rows, there.sum(1), budget, visual=visual, inside=inside, times=times, scores=scores)

    def similarity(self, clip: Clip, questions: list[str], rows: list[int]) -> Tensor:
        """[Q, G] scores of `ata.score=similarity`, without a pass of the small model: of the segments of clips `rows`
        [Q] of a batch for questions about them; 0 where there is no segment."""
        found = self.features(clip)
        assert found is not None
        features, _ = thin(found, self.config.max_frames)
        return self._similarity(
            pool_patches(features, self.config.patches), [self.word_ids(text) for text in questions], rows
        )

    def _similarity(self, shown: Features, told: list[list[int]], rows: list[int]) -> Tensor:
        words = torch.tensor(padded_ids(told), device=shown.patches.device)
        match = self.match or word_similarity
        embedded = self.embed_words(words.clamp(min=0))
        return segment_scores(match, shown, embedded, real=words >= 0, rows=rows, window=self.config.window)

    def most_by_score(self, total: Tensor, groups: Tensor) -> int:
        given, low, high = segment_bounds(total, groups, most=self.config.num_tokens, config=self.config.ata)
        return int((given - (groups.cpu() - 1) * low).minimum(high).max())

    def share_by_score(self, scores: Tensor, total: Tensor, groups: Tensor) -> Tensor:
        config, most = self.config.ata, self.config.num_tokens
        return allocate_segments(scores, total=total, segments=groups, most=most, config=config).to(groups.device)

    @property
    def head_device(self) -> torch.device:
        return next(self.head.parameters()).device

    def budgets(self, features: Features | None) -> list[int | None]:
        """Budgets to measure at, where none are asked: 1, 4, 16 ... and the most a clip of this length is given; None,
        as many as there is to tell, where captions are."""
        c = self.config
        most = c.num_tokens if not c.segment_words else self.max_tokens  # of texts: nobody knows how long they are
        if features is not None:
            most = -(-int(features.count().max()) // c.window) * c.most_of_segment
        most = min(self.max_tokens, most)
        few: list[int | None] = [4**i for i in range(16) if 4**i < most]
        return [*few[2:], None] if self.captioner is not None else [*few, most]

    # what a fresh model begins from (`vtok.llm.beginnings`)

    def warm_start(self, source: nn.Module) -> str:
        """Begin with another model's weights; what was done, for the log."""
        return warm_start(self, source)

    def go_on_as(self, other: Model) -> None:
        """What `warm_start` settled for `other` holds here too (`vtok.training.init_from`)."""
        self.head_taken = other.head_taken and other.embedding_dim == self.embedding_dim

    def begin_at_words(self, llm: Any) -> str:
        """With pooled queries, where the head is not another model's: it begins at the words of `llm`
        (`vtok.llm.FrozenLLM`); what was done, for the log."""
        return begin_at_words(self, llm)


@dataclass
class _EyeConfig(ProjectorConfig):
    tower: TowerConfig = field(default_factory=TowerConfig)


def build(config: Config, *, load: Callable[[str], Any] | None = None) -> Model:
    """A fresh model: the small language model's facts are filled in in `config`, and its weights are taken."""
    found = fill_in(config.lm)
    if config.ata.score == "yes_no" and not config.judge.yes:
        config.judge.yes, config.judge.no = first_ids(
            lambda text: found.tokenizer(text, add_special_tokens=False).input_ids
        )
    model = Model(config)
    model.take_weights(found)
    known = min(len(found.tokenizer), found.model.get_input_embeddings().num_embeddings)
    if config.ata.score == "yes_no" and model.judge is not None:
        words = [*(config.judge.yes or []), *(config.judge.no or [])]
        model.judge.take_rows(found.model.get_output_embeddings().weight, words)
    asks = model.queries or (model.captioner and model.captioner.queries)
    if asks is not None:
        asks.begin_like(found.embed(torch.arange(known, device=found.device)))
    model.from_files = ("lm", "judge", "queries", "captioner.queries")
    return model
