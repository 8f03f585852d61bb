"""What a language model answers when tokens say all there is: python benchmarks/ideal_tokens.py LLM captions.jsonl.

Each patch of each frame of procedural clips becomes one vector: the sum of the words of the thing whose middle it
holds, or of the ground, at the size of a word. No tower and no projector stand between, so what is missing here is the
language model's (data/tiny_lm.py, or any other). A projector may learn vectors that it reads better than words.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok.data.synthetic import Scene, scene_of
from vtok.llm import LLMConfig, TaskConfig, ask, load_llm
from vtok.types import Clip, Tokens


def words_of(scene: Scene, t: int, side: int, *, motion: bool) -> list[str]:
    """What each of side x side patches of frame t shows, row by row."""
    shot = next(shot for shot in scene.shots if shot.start <= t < shot.stop)
    needle = next((n for n in scene.needles if n.frame <= t < n.frame + n.frames), None)
    if needle is not None:
        out, middle = [f" plain {needle.ground} ground"] * side * side, (side // 2 - 1, side // 2)
        for y in middle:
            for x in middle:
                out[y * side + x] = f" a {needle.colour} {needle.shape} flashes"
        return out
    out = [f" {shot.palette} {shot.background} background"] * side * side
    progress = (t - shot.start) / max(shot.stop - shot.start - 1, 1)
    for thing in shot.things:
        if t - shot.start >= thing.appears:
            x, y = (min(side - 1, max(0, int(v / n * side))) for v, n in zip(thing.at(progress), scene.size[::-1]))
            way = f" moves {thing.direction}" if thing.direction else " stays still"
            out[y * side + x] = f" {thing.colour} {thing.texture} {thing.shape}" + way * motion
    return out


class Ideal:
    """A projector that has nothing to learn."""

    reads_prompt = False

    def __init__(self, llm: Any, rows: list[dict[str, Any]], args: argparse.Namespace):
        self.llm, self.args = llm, args
        self.scenes = {row["file"]: scene_of(row) for row in rows}
        self.vector = lru_cache(None)(self._vector)

    def _vector(self, words: str) -> Tensor:
        ids = torch.tensor(self.llm.tokenizer(words, add_special_tokens=False).input_ids)
        return self.llm.embed(ids).sum(0) / math.sqrt(len(ids))

    def _of(self, scene: Scene) -> Tensor:
        frames, out = self.args.frames, []
        for i in range(frames):
            shown = words_of(scene, int((i + 0.5) * scene.frames / frames), self.args.side, motion=self.args.motion)
            out += [words for words in shown if self.args.ground or not words.endswith("background")]
        return torch.stack([self.vector(words) for words in out])

    def encode(self, clip: Clip, *, budget: Any = None) -> Tokens:
        made = [self._of(self.scenes[key]) for key in clip.keys]
        lengths = torch.tensor([len(each) for each in made])
        embeddings = torch.nn.utils.rnn.pad_sequence(made, batch_first=True)
        shape = embeddings.shape[:2]
        rank = torch.arange(shape[1]).expand(shape).clone()
        places = torch.full((*shape, 3), math.nan)
        return Tokens(embeddings, lengths, places, torch.zeros(shape, dtype=torch.int64), rank)


def shares(llm: Any, rows: list[dict[str, Any]], model: Any, **how: Any) -> dict[str, float]:
    """Share of the questions whose likeliest choice is right, over all and by type."""
    right, asked = Counter(), Counter()
    for i in range(0, len(rows), 8):
        part = rows[i : i + 8]
        clip = Clip([r["file"] for r in part], text=[r["caption"] for r in part], qa=[r["qa"] for r in part])
        for one in ask(llm, clip, model, template=TaskConfig().qa_prompts[0], **how):
            for kind in ("all", one.type):
                right[kind] += bool(one.right)
                asked[kind] += 1
    return {kind: right[kind] / asked[kind] for kind in asked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llm")
    parser.add_argument("manifest", type=Path, help="captions.jsonl of data/demo_corpus.py; its split val is asked")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=4, help="patches along a side of a frame")
    parser.add_argument("--motion", action="store_true", help="things say how they move, too")
    parser.add_argument("--no-ground", dest="ground", action="store_false", help="patches of the ground are left out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.manifest.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["split"] == "val"][: args.clips]
    llm = load_llm(LLMConfig(name=args.llm))
    cases = (("blind", None, {}), ("captions", None, {"captions": True}), ("ideal tokens", Ideal(llm, rows, args), {}))
    for name, model, how in cases:
        found = shares(llm, rows, model, **how)
        print(f"{name}: " + ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in found.items()), flush=True)


if __name__ == "__main__":
    main()
