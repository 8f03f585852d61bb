"""A flow decoder's draws: Euler steps, guidance and temperature swept, time of a clip, and drift over a long video.

    python benchmarks/sampling.py EXPORT --videos DIR [--tokens 1,4,16,64] [--steps 5,10,20,40] [--guidance 1,3,7.5]
        [--temperature 1,0] [--chunks 10] [--fps F] [--limit N]

Videos are resized to the size the model was trained at. `error` is what tokens tell: the squared error of the velocity
at each number of tokens a latent frame (0: withheld, as for guidance), the same noise in all, mean over five levels and
over one chunk of each video. Where it does not fall, the decoder does not read them. A table then has, by setting,
the PSNR, SSIM and temporal-difference PSNR of draws at each number of tokens a latent frame, over one chunk of each
video, and the seconds that decoding a clip of one chunk takes (side by side, median over clips). A second one has the
PSNR of each chunk of videos of `--chunks` chunks (joined from the given ones): each chunk begins with the frame drawn
last, so errors may add up; `alone` is the same chunk decoded as if it began a video, from tokens of its own.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from vtok.coding import codec
from vtok.data.inputs import collect
from vtok.families import flow
from vtok.loading import load_any
from vtok.metrics.distortion import clip_psnr, clip_ssim, clip_tdiff_psnr
from vtok.types import Clip, to_uint8

LEVELS = (0.3, 0.5, 0.7, 0.9, 0.99)  # of noise


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def tensor(frames: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] -> [1, 3, T, H, W]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None]


@torch.inference_mode()
def sweep(model, clips: list[Tensor], lengths: list[int], settings: list[tuple[int, float, float]]) -> None:
    print(f"{'steps':>5} {'guid.':>6} {'temp.':>6} {'tokens':>6} {'PSNR':>7} {'SSIM':>7} {'tdiff':>7} {'s/clip':>7}")
    coded = [model.encode(Clip(["clip"], clip).as_float()) for clip in clips]
    size = (clips[0].shape[3], clips[0].shape[4])
    for steps, guidance, temperature in settings:
        sampler = model.config.sampler
        sampler.steps, sampler.guidance, sampler.temperature = steps, guidance, temperature
        for k in lengths:
            scores, seconds = [], []
            for clip, tokens in zip(clips, coded):
                cut = tokens.truncate(torch.full((1, int(tokens.num_groups[0])), k))
                began = time.perf_counter()
                drawn = to_uint8(model.decode(cut, size=size))
                seconds.append(time.perf_counter() - began)
                scores.append([float(f(drawn, clip)) for f in (clip_psnr, clip_ssim, clip_tdiff_psnr)])
            psnr, ssim, tdiff = np.mean(scores, 0)
            print(
                f"{steps:>5} {guidance:>6g} {temperature:>6g} {k:>6} {psnr:>7.2f} {ssim:>7.3f} {tdiff:>7.2f} "
                f"{statistics.median(seconds):>7.2f}",
                flush=True,
            )


@torch.inference_mode()
def told(model, clips: list[Tensor], lengths: list[int]) -> None:
    """Prints the error of the velocity at each number of tokens, and without any."""
    video, count = torch.cat(clips).float() / 127.5 - 1, len(clips)
    frames = torch.full((count,), video.shape[2])
    for k in [0, *lengths]:
        errors = []
        for level in LEVELS:
            torch.manual_seed(0)
            nothing = torch.zeros(count, dtype=torch.int64)
            draw = flow.Draw(torch.full((count,), level), nothing, nothing.float(), torch.full((count,), k == 0))
            keep = torch.full((count, model.chunk_groups), max(k, 1))
            errors.append(float(model(video, frames, keep, draw).error.mean()))
        each = ", ".join(f"{level:g}: {error:.3f}" for level, error in zip(LEVELS, errors))
        print(f"{k:>5} tokens  error {statistics.mean(errors):.3f}   by level {each}", flush=True)


@torch.inference_mode()
def drift(model, frames: np.ndarray, k: int) -> None:
    """Prints the PSNR of every chunk of one long video, drawn in a row and drawn alone."""
    span = model.num_frames
    video, size = tensor(frames), (frames.shape[1], frames.shape[2])
    tokens = model.encode(Clip(["long"], video).as_float())
    drawn = model.decode(tokens.truncate(torch.full((1, int(tokens.num_groups[0])), k)), size=size)
    print(f"{'chunk':>5} {'in a row':>9} {'alone':>7}   PSNR, dB, {k} tokens a latent frame")
    for number, start in enumerate(range(0, video.shape[2] - 1, span - 1)):
        wanted = video[:, :, start : start + span]
        alone = model.encode(Clip(["alone"], wanted).as_float())
        alone = model.decode(alone.truncate(torch.full((1, int(alone.num_groups[0])), k)), size=size)
        row = [float(clip_psnr(to_uint8(v), wanted)) for v in (drawn[:, :, start : start + span], alone)]
        print(f"{number:>5} {row[0]:>9.2f} {row[1]:>7.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="export folder or run directory of a flow-decoded tokenizer")
    parser.add_argument("--videos", required=True, help="folder of videos")
    parser.add_argument("--tokens", type=numbers, default=[1, 4, 16, 64], help="tokens a latent frame")
    parser.add_argument("--steps", type=numbers, default=[5, 10, 20, 40])
    parser.add_argument("--guidance", type=numbers, default=[1, 3, 7.5])
    parser.add_argument("--temperature", type=numbers, default=[1.0])
    parser.add_argument("--chunks", type=int, default=10, help="of the long video; 0 leaves it out")
    parser.add_argument("--fps", type=Fraction, help="frames per second to keep (default: every frame)")
    parser.add_argument("--limit", type=int, default=16, help="videos looked at")
    args = parser.parse_args()
    model = load_any(args.model).eval()
    if not hasattr(model.config, "sampler"):
        parser.error(f"{args.model} is a {model.config.name} model: it draws nothing")
    size, span = (int(model.config.size[0]), int(model.config.size[1])), model.num_frames
    paths = [row.path for row in collect([args.videos]).rows]
    paths = paths[:: max(1, len(paths) // args.limit)][: args.limit]
    videos = [codec.read_frames(path, size=size, fps=args.fps) for path in paths]
    videos = [np.stack(list(video)) for video in videos]
    clips = [tensor(video[:span]) for video in videos if len(video) >= span]
    lengths = [int(k) for k in args.tokens if k <= model.num_tokens]
    print(f"{len(clips)} clips of {span} frames of {size[0]}x{size[1]}; {torch.get_num_threads()} threads")
    told(model, clips, lengths)
    settings = [(int(s), g, t) for s, g, t in itertools.product(args.steps, args.guidance, args.temperature)]
    before = dict(vars(model.config.sampler))
    sweep(model, clips, lengths, settings)
    vars(model.config.sampler).update(before)
    if args.chunks and span > 1:
        whole = np.concatenate(videos)
        need = 1 + args.chunks * (span - 1)
        drift(model, np.concatenate([whole] * -(-need // len(whole)))[:need], lengths[-1])


if __name__ == "__main__":
    main()
