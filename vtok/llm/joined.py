"""A trained projector in the place of a VLM's own: any VLM of transformers reads its tokens, nothing is patched.

    pixels --the VLM's tower--> features --compressor--> tokens --.
    input_ids, a placeholder for each video ----------------------+--> ids with a placeholder for every token, padded on
                                                                       the left, positions, `mm_encoder_outputs`
                                                                       --> the VLM's forward or generate

    joined = attach(compressor, vlm)
    joined.generate(input_ids, attention_mask, pixel_values_videos=pixels, budget=16, max_new_tokens=32)

Letters: B texts, L positions, n videos or images, T frames, N patches of a frame, D width, K tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtok.layers.seams import (
    Item,
    as_videos,
    check_adapters,
    check_tower,
    deepstack_of,
    layout,
    seam_of,
    see_frames,
    see_grids,
    square_grid,
    time_step,
)
from vtok.llm.places import Place, Span, expand, find_places, grid_positions, pad_rows
from vtok.llm.splice import IGNORED
from vtok.types import Budget, Features, Tokens

# what processors return beside what is read here; it speaks of the VLM's own tokens
UNREAD = ("image_sizes", "image_sizes_videos", "batch_num_images", "mm_token_type_ids", "token_type_ids")
POSITIONS = ("sequence", "grid")


def attach(compressor: Any, vlm: Any, *, positions: str = "sequence", freeze: bool = True, frames_per_call: int = 64):
    """A VLM that reads the tokens of a compressor; see `Joined`.

    Args:
        compressor: has `compress(features, budget=, prompt=) -> Tokens` as wide as the VLM's words.
        vlm: a model of transformers with language head; its architecture is one of `SEAMS`.
        positions: of the visual tokens in models with M-RoPE: "sequence", one after another like words, or "grid", the
            place of each on the tower's grid (tokens without one count on like words).
        freeze: no gradients for the VLM, and eval mode. False leaves it as it is: its LLM may learn as well (its
            tower never does).
        frames_per_call: frames that go through the tower at once.
    Raises: ValueError for an architecture that is not known, and for tokens of another width than the words'.
    """
    return Joined(compressor, vlm, positions=positions, freeze=freeze, frames_per_call=frames_per_call)


@dataclass
class VideoTokens:
    """The tokens of one video or image.

    embeddings: [K, D]. sizes: tokens of each group. positions: [K, 3]. source: [T * N] or None, as in Tokens. span: the
    grid they lie on. deepstack: by layer, [K, D].
    """

    embeddings: Tensor
    sizes: list[int]
    positions: Tensor
    source: Tensor | None = None
    span: Span | None = None
    deepstack: list[Tensor] = field(default_factory=list)


class Joined(nn.Module):
    """A compressor and the VLM that reads it. The only child is the compressor: parameters, state_dict, device moves
    and train mode are the compressor's; the VLM is held by reference.

    prepare(...) gives what the VLM's forward and generate take; joined(...) and joined.generate(...) are these in one.
    """

    def __init__(self, compressor: Any, vlm: Any, *, positions: str, freeze: bool, frames_per_call: int):
        super().__init__()
        self.seam = seam_of(vlm)
        check_adapters(compressor, vlm)
        check_tower(getattr(compressor, "config", None), vlm.config, self.seam)
        if positions not in POSITIONS:
            raise ValueError(f"positions={positions!r} is unknown; choose one of {', '.join(POSITIONS)}")
        if positions == "grid" and not self.seam.grids:
            raise ValueError(
                f"positions='grid' is for models with M-RoPE, {vlm.config.model_type!r} counts words and visual tokens "
                "alike: positions='sequence'"
            )
        if frames_per_call < 1:
            raise ValueError(f"frames_per_call={frames_per_call} must be at least 1")
        self.compressor, self.positions, self.frames_per_call = compressor, positions, frames_per_call
        self._vlm = (vlm,)  # in a tuple: no child module
        self._fits(getattr(compressor, "embedding_dim", None))
        if freeze:
            vlm.requires_grad_(False).eval()

    @property
    def vlm(self) -> Any:
        return self._vlm[0]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        """The VLM's output for `prepare(...)`, with its loss where labels are given; what `prepare` does not know goes
        to the VLM. Gradients reach the compressor."""
        own, rest = _apart(inputs)
        return self.vlm(**self.prepare(input_ids, attention_mask, **own), **rest)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        """What `vlm.generate` returns, its sequences without the prompt: [B, new ids]. What `prepare` does not know
        goes to `vlm.generate`. Beam search is right for ragged tokens too."""
        own, rest = _apart(inputs)
        prepared = self.prepare(input_ids, attention_mask, **own)
        made, prompt = self.vlm.generate(**prepared, **rest), prepared["input_ids"].shape[1]
        if isinstance(made, Tensor):
            return made[:, prompt:]
        made.sequences = made.sequences[:, prompt:]
        return made

    def prepare(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        pixel_values_videos: Tensor | Sequence[Tensor] | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        video_grid_thw: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        second_per_grid_ts: Sequence[float] | Tensor | None = None,
        times: Sequence[Tensor] | Tensor | None = None,
        features: Features | Tokens | Tensor | None = None,
        modality: str = "video",
        budget: Budget | None = None,
        prompt: list[str] | None = None,
        pad: str = "left",
        **unread: Any,
    ) -> dict[str, Any]:
        """What the VLM's forward and generate take: ids, mask, positions, labels, and tokens as `mm_encoder_outputs`.

        Texts have one placeholder of the VLM for each video and image, in the order in which these are given (a run of
        them, as processors write it, counts as one; one run for each group of tokens is taken as well). Texts without
        any may be among them. Prepare anew for every call: beam search changes what it is given.

        Args:
            input_ids, attention_mask: [B, L], padded on either side; what is masked is left out.
            labels: [B, L]; placeholders are never learned.
            pixel_values_videos: [n, T, C, H, W], or n of [T, C, H, W]; Qwen-VL: rows, with `video_grid_thw` [n, 3] and
                the seconds between two feature frames, `second_per_grid_ts` [n].
            pixel_values: images, as clips of one frame: [n, C, H, W]; of images cut into views, [n, views, C, H, W],
                the whole one. Qwen-VL: rows, with `image_grid_thw`.
            times: seconds of every frame of every video.
            features: in the place of pixels: Features of a tower (or patches [n, T, N, D] of square frames), or Tokens.
                modality: "video" | "image", whose placeholders they fill.
            budget: tokens of each video, or int64 [n, G] of each group (with images: theirs as well, images first).
            prompt: a question for each, for compressors that read it (images first).
            pad: "left", or "right" to train.
        Raises: ValueError where placeholders and videos do not fit, where a video has no tokens, for tokens of another
            width than the words', and for inputs that are not known.
        """
        strange = sorted(set(unread) - set(UNREAD))
        if strange:
            raise ValueError(f"prepare does not know {', '.join(strange)}")
        if pad not in ("left", "right"):
            raise ValueError(f"pad={pad!r} is unknown; choose left (generation) or right")
        if features is not None and (pixel_values is not None or pixel_values_videos is not None):
            raise ValueError("features and pixels were given: one of them is what the compressor reads")
        if modality not in ("video", "image"):
            raise ValueError(f"modality={modality!r} is unknown; choose video or image")
        read: dict[str, list[VideoTokens]] = {}
        if features is not None:
            kind = self.seam.kind(modality)
            read[kind] = self._given(features, budget, prompt)
        else:
            seen = self._seen(pixel_values, pixel_values_videos, image_grid_thw, video_grid_thw, second_per_grid_ts)
            if times is not None:
                _timed(seen, times)
            items = [item for kind in seen.values() for item in kind]
            every = iter(self._compress(items, budget, prompt))
            for name, some in seen.items():
                kind = self.seam.kind(name)
                if kind in read:
                    raise ValueError(
                        f"{self.vlm.config.model_type!r} has one placeholder for images and videos: give all as "
                        "pixel_values_videos, an image as a video of one frame, in the order of the texts"
                    )
                read[kind] = [next(every) for _ in some]
        return self._placed(input_ids, attention_mask, labels, read, left=pad == "left")

    # Features of the VLM's own tower, and tokens of features.

    def features(self, **pixels: Any) -> list[Item]:
        """What the compressor is given of images and videos: the arguments of `prepare` that speak of pixels."""
        wanted = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        strange = sorted(set(pixels) - set(wanted))
        if strange:
            raise ValueError(f"features does not know {', '.join(strange)}; it takes {', '.join(wanted)}")
        seen = self._seen(*(pixels.get(name) for name in wanted))
        return [item for kind in seen.values() for item in kind]

    def _seen(
        self, images: Any, videos: Any, image_grids: Any, video_grids: Any, seconds: Any
    ) -> dict[str, list[Item]]:
        out: dict[str, list[Item]] = {}
        for name, pixels, grids in (("image", images, image_grids), ("video", videos, video_grids)):
            if pixels is None:
                continue
            if not self.seam.grids:
                out[name] = see_frames(
                    self.vlm, self.seam, name, as_videos(pixels, name), frames_per_call=self.frames_per_call
                )
            elif grids is None:
                raise ValueError(f"{self.vlm.config.model_type!r} needs {name}_grid_thw beside its pixels")
            else:
                out[name] = see_grids(self.vlm, self.seam, name, pixels, grids, seconds if name == "video" else None)
        return out

    def _compress(self, items: list[Item], budget: Budget | None, prompt: list[str] | None) -> list[VideoTokens]:
        """The tokens of every item: one call of the compressor for all that have one grid."""
        if prompt is not None and len(prompt) != len(items):
            raise ValueError(f"{len(prompt)} prompts for {len(items)} videos and images")
        if isinstance(budget, Tensor) and len(budget) != len(items):
            raise ValueError(f"a budget of shape {list(budget.shape)} for {len(items)} videos and images")
        alike: dict[Any, list[int]] = {}
        for index, item in enumerate(items):
            alike.setdefault((item.grid, item.times is None), []).append(index)
        out: dict[int, VideoTokens] = {}
        for rows in alike.values():
            some = [items[i] for i in rows]
            features = _together(some, self._device())
            asked = budget[rows].to(self._device()) if isinstance(budget, Tensor) else budget
            asking = None if prompt is None else [prompt[i] for i in rows]
            tokens = self.compressor.compress(features, budget=asked, prompt=asking)
            for index, item, made in zip(rows, some, self._split(tokens)):
                (h, w), m = item.grid, item.merge
                made.span = Span((len(item.patches), h // m, w // m), made.positions, item.step)
                made.deepstack = deepstack_of(item, made.source, len(made.embeddings))
                out[index] = made
        return [out[i] for i in range(len(items))]

    def _given(self, features: Any, budget: Budget | None, prompt: list[str] | None) -> list[VideoTokens]:
        """The tokens of features, or tokens themselves, that were made elsewhere."""
        if isinstance(features, Tokens):
            if budget is not None or prompt is not None:
                raise ValueError(
                    "features are Tokens already: a budget or a prompt has no part in them (truncate them)"
                )
            return self._split(features)
        if isinstance(features, Tensor):
            features = Features(features, square_grid(features))
        reads = self._split(self.compressor.compress(features, budget=budget, prompt=prompt))
        m = self.vlm.config.vision_config.spatial_merge_size if self.seam.grids else 1
        (h, w), times = features.grid, features.times
        for index, (made, frames) in enumerate(zip(reads, features.count().tolist())):
            gap = 1.0
            if times is not None and frames > 1:
                gap = float(times[index, frames - 1] - times[index, 0]) / (frames - 1)
            made.span = Span((frames, h // m, w // m), made.positions, time_step(self.vlm, gap))
        return reads

    def _split(self, tokens: Tokens) -> list[VideoTokens]:
        """The tokens of each video. Raises: ValueError for a video without any, for another width than the words'."""
        self._fits(tokens.embeddings.shape[-1])
        out = []
        for index, count in enumerate(tokens.lengths.tolist()):
            if count < 1:
                raise ValueError(
                    f"video {index} of the batch has no tokens: a VLM needs one at least for each placeholder; ask for "
                    "a budget of 1 or more"
                )
            sizes = torch.bincount(tokens.group[index, :count])
            source = None if tokens.source is None else tokens.source[index]
            out.append(
                VideoTokens(tokens.embeddings[index, :count], sizes.tolist(), tokens.positions[index, :count], source)
            )
        return out

    def _fits(self, width: int | None) -> None:
        words = self.vlm.get_input_embeddings().weight.shape[1]
        if width is not None and width != words:
            raise ValueError(
                f"the compressor's tokens are {width} wide, the words of {self.vlm.config.model_type!r} {words}: train "
                f"it with model.embedding_dim={words}"
            )

    def _device(self) -> torch.device:
        some = next(iter(self.parameters()), None)
        return self.vlm.get_input_embeddings().weight.device if some is None else some.device

    # Texts around the tokens.

    def _placed(
        self, ids: Tensor, mask: Tensor | None, labels: Tensor | None, read: dict[str, list[VideoTokens]], *, left: bool
    ) -> dict[str, Any]:
        for name, value in (("attention_mask", mask), ("labels", labels)):
            if value is not None and value.shape != ids.shape:
                raise ValueError(f"{name} has shape {list(value.shape)}, input_ids {list(ids.shape)}")
        kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        rows = [row[keep].tolist() for row, keep in zip(ids, kept)]
        if not all(rows):
            raise ValueError(f"text {[bool(row) for row in rows].index(False)} is empty: all of it is masked")
        config, words = self.vlm.config, self.vlm.get_input_embeddings().weight
        placeholders = {kind: getattr(config, f"{kind}_token_id") for kind in self.seam.towers}
        places: list[list[Place]] = [[] for _ in rows]
        reads: list[VideoTokens] = []
        for kind, token in placeholders.items():
            found = find_places(rows, token, [r.sizes for r in read.get(kind, [])], kind)
            for row, more in zip(places, found):
                row += [replace(place, item=place.item + len(reads)) for place in more]
            reads += read.get(kind, [])
        for row in places:
            row.sort(key=lambda place: place.start)
        made = [expand(row, some) for row, some in zip(rows, places)]
        text = config.get_text_config()
        pads = [text.pad_token_id, 0, 1, 2]  # masked: only that it is no placeholder matters
        fill = next(pad for pad in pads if isinstance(pad, int) and pad not in placeholders.values())
        new, new_mask = pad_rows(made, fill, left=left)
        out: dict[str, Any] = {"input_ids": new.to(words.device), "attention_mask": new_mask.to(words.device)}
        out["position_ids"] = self._counted(rows, places, reads, new_mask, left=left).to(words.device)
        if labels is not None:
            # nothing comes before a text's first word: padding on the left would be made to foretell it
            learned = [[IGNORED, *row[keep].tolist()[1:]] for row, keep in zip(labels, kept)]
            learned = [expand(row, some, IGNORED) for row, some in zip(learned, places)]
            out["labels"] = pad_rows(learned, IGNORED, left=left)[0].to(words.device)
        given = {kind: some for kind, some in read.items() if some}
        if given:
            out["mm_encoder_outputs"] = {
                kind: layout(self.seam, kind, [r.embeddings.to(words) for r in some], [r.deepstack for r in some])
                for kind, some in given.items()
            }
        return out

    def _counted(
        self, rows: list[list[int]], places: list[list[Place]], reads: list[VideoTokens], mask: Tensor, *, left: bool
    ) -> Tensor:
        """[B, L] int64 positions, or [4, B, L] for M-RoPE: of the sequence, then time, row and column."""
        count = (mask.cumsum(1) - 1).clamp(min=0)
        if not self.seam.grids:
            return count
        spans = [r.span if self.positions == "grid" else None for r in reads]
        axes = torch.zeros(3, *mask.shape, dtype=torch.int64)
        for index, (row, some) in enumerate(zip(rows, places)):
            where = grid_positions(len(row), some, spans)
            here = slice(mask.shape[1] - where.shape[1], None) if left else slice(where.shape[1])
            axes[:, index, here] = where
        return torch.cat([count[None], axes])


OWN = frozenset(inspect.signature(Joined.prepare).parameters)


def _apart(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `prepare` takes, and what is the VLM's."""
    known = {name for name in inputs if name in OWN or name in UNREAD}
    return {k: inputs[k] for k in known}, {k: v for k, v in inputs.items() if k not in known}


def _together(items: list[Item], device: torch.device) -> Features:
    """Items of one grid as a batch; shorter ones are padded with zeros."""
    lengths = [len(item.patches) for item in items]
    ragged = torch.tensor(lengths, device=device) if len(set(lengths)) > 1 else None

    def batch(values: list[Any]) -> Any:
        if any(value is None for value in values):
            return None
        return nn.utils.rnn.pad_sequence(values, batch_first=True).to(device)

    return Features(
        batch([item.patches for item in items]),
        items[0].grid,
        times=batch([item.times for item in items]),
        frame=batch([item.frame for item in items]),
        lengths=ragged,
    )


def _timed(seen: dict[str, list[Item]], times: Sequence[Tensor] | Tensor) -> None:
    """The seconds of every frame of every video, as they were given, put to the items."""
    videos = seen.get("video", [])
    if len(times) != len(videos) or any(len(given) < len(item.patches) for given, item in zip(times, videos)):
        raise ValueError(
            f"times are of {[len(given) for given in times]} frames, the videos have "
            f"{[len(item.patches) for item in videos]}: give the seconds of each"
        )
    for item, given in zip(videos, times):
        item.times = torch.as_tensor(given)[: len(item.patches)].to(item.patches.device)
