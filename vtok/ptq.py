"""`vtok quantize RUN`: ids for a trained continuous tokenizer, without training (TokenBridge, Wang et al. 2025,
https://arxiv.org/abs/2503.16430).

    run (quantizer.name: identity) --latents of its training clips--> bins of each dimension --> export with ids

Encoder and decoder stay as they are; each dimension of a latent becomes one of `bins` values, so a token has as many
ids as dimensions.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok.config import RunConfig, load_family
from vtok.export import publish, training_clips
from vtok.loading import ExportError, add_which, load_run
from vtok.types import Clip


class Fitted(NamedTuple):
    """A continuous model with ids. explained: share of the latents' variance the ids tell. latents: looked at."""

    model: Any
    config: RunConfig
    explained: float
    latents: int


@torch.inference_mode()
def quantize(model: Any, config: RunConfig, clips: Any, *, bins: int = 64, method: str = "lloyd") -> Fitted:
    """The same model with the quantizer `dimwise`, fitted on the latents of `clips`.

    Args:
        model, config: of a run whose `model.quantizer.name` is identity, in eval mode. clips: batches of `Clip`.
        bins: values of each dimension. method: "lloyd" (least squared error) or "gaussian" (equally probable bins).
    Raises: ValueError for a model that has ids already, or too few latents for so many bins.
    """
    old = config.model.quantizer
    if old.name != "identity":
        raise ValueError(
            f"model.quantizer.name={old.name}: only a continuous tokenizer (identity) is quantized after training"
        )
    config = replace(config, model=replace(config.model, quantizer=replace(old, name="dimwise", bins=bins)))
    found = load_family(config.model.name).Model(config.model).eval()
    own = {k: v for k, v in found.state_dict().items() if k.startswith("quantizer.")}
    found.load_state_dict({**model.state_dict(), **own}, strict=True)
    latents = torch.cat([_latents(model, clip) for clip in clips])
    found.quantizer.fit(latents, method=method)
    padded = torch.nn.functional.pad(latents, (0, found.quantizer.latent_dim - latents.shape[1]))  # with a variance
    told = found.quantizer(padded).embeddings
    lost = (told - latents).square().mean() / (latents - latents.mean(0)).square().mean()
    return Fitted(found, config, float(1 - lost), len(latents))


def _latents(model: Any, clip: Clip) -> Tensor:
    tokens = model.encode(clip.as_float())
    return tokens.embeddings[tokens.mask].float()


def main(argv: list[str]) -> None:
    """`vtok quantize RUN --out DIR [--bins 64 --method lloyd --clips 256]`."""
    parser = argparse.ArgumentParser(
        prog="vtok quantize", description="Ids for a trained continuous tokenizer, without training: an export."
    )
    parser.add_argument("run", help="run directory of a continuous tokenizer (model.quantizer.name: identity)")
    parser.add_argument("--out", required=True, help="folder of the export; an earlier export there is replaced")
    parser.add_argument("--bins", type=int, default=64, help="values of each dimension (default: 64, 6 bits)")
    parser.add_argument("--method", choices=("lloyd", "gaussian"), default="lloyd", help="of choosing the bins")
    parser.add_argument("--clips", type=int, default=256, help="training clips whose latents are looked at")
    add_which(parser)
    parser.add_argument("--no-ema", action="store_true", help="the raw weights, not their moving average")
    args = parser.parse_args(argv)
    model, config = load_run(args.run, which=args.which, ema=not args.no_ema)
    try:
        clips = training_clips(config, limit=args.clips)
        done = quantize(model, config, clips, bins=args.bins, method=args.method)
    except OSError as error:
        raise ExportError(f"the run's training shards are needed: {error}") from error
    out = publish(done.model, done.config, args.out)  # without run_dir: eval.json there is of the continuous model
    bits = sum(torch.tensor(done.model.codebook_sizes).double().log2())
    print(
        f"{out}: {len(done.model.codebook_sizes)} ids a token, {bits:.1f} bits; fitted on {done.latents} latents of "
        f"training clips, of whose variance they tell {100 * done.explained:.2f} %. Measure it: vtok eval {out}"
    )
