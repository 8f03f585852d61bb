"""What people read about a tokenizer: the card of its export (README.md)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import nn

from vtok.config import RunConfig
from vtok.metric_lines import metric_lines
from vtok.shareable import shareable

COLUMNS = (
    "budget",
    "tokens_mean",
    "bits_mean",
    "entropy_bits_mean",
    "ar_bits_mean",
    "below_floor",  # share of clips for which a codec cannot write so few bits
    "bits_per_pixel",
    "bits_per_second",
    "psnr_db",
    "ssim",
)


def model_card(
    model: nn.Module,
    config: RunConfig,
    facts: dict[str, Any],
    *,
    run_dir: Path | None = None,
    step: int | None = None,
    licence: str = "apache-2.0",
    no_entropy: str = "",
) -> str:
    """README.md of an export, with the front matter that the Hub reads.

    Args:
        facts: its config.json. run_dir: where environment.json and eval/eval.json lie; None leaves both out.
        step: of the checkpoint that the weights are of.
        no_entropy: why the export has no static entropy model.
    """
    family, size = facts["family"], config.data.size
    parameters = sum(p.numel() for p in model.parameters())
    front = ["library_name: transformers", f"license: {licence}", "pipeline_tag: feature-extraction", "tags:"]
    front += [f"- {tag}" for tag in ("vtok", "video", "video-tokenizer", "custom_code", family.rpartition(".")[2])]
    rate = f"{config.data.fps:g} frames/s" if config.data.fps else "the source's frame rate"
    lines = [
        "---", *front, "---", "",
        f"# {facts['model_id']}", "",
        f"A video tokenizer of vtok's `{family}` family: {parameters / 1e6:.2f} M parameters, trained on clips of "
        f"{config.data.num_frames} frames of {size[1]}x{size[0]} pixels at {rate}.", "",
        *_accounting(model, facts, no_entropy),
        *_loading(facts, config),
        *training_section(config, run_dir, step=step),
        *_measurements(run_dir, facts),
        "## Files and licence", "",
        f"Weights: `{licence}`, as stated by whoever exported them; they may carry conditions of the training videos, "
        "which the exporter knows. Code (`modeling_vtok.py`): Apache-2.0. `training.yaml` is the resolved "
        "configuration of the run, `config.json` what loading needs.", "",
        f"Weights sha256 (names, types, shapes and bytes of the tensors): `{facts['weights_sha256']}`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _accounting(model: Any, facts: dict[str, Any], no_entropy: str) -> list[str]:
    sizes: tuple[int, ...] = tuple(getattr(model, "codebook_sizes", ()))
    out = ["## Tokens and bits", ""]
    if not sizes:
        return [*out, "Tokens are continuous: they have no bit count, and no `.vtok` form.", ""]
    bits = sum(math.log2(size) for size in sizes)
    books = ", ".join(map(str, sizes))
    out.append(
        f"At most {model.max_tokens} tokens a window of the model, {len(sizes)} id(s) a token, codebook sizes {books}: "
        f"{bits:.3f} bits (log2 of the size) is a token's nominal cost, which `.vtok` files reach to within a byte per "
        "block of ids. Tokens are ordered by importance inside their group: any prefix decodes."
    )
    if facts.get("entropy_sha256"):
        out.append(
            "`entropy.safetensors` is a static entropy model (frequencies of id digits by rank, from training clips) "
            "for `vtok encode --coding static`."
        )
    else:
        out.append(f"There is no static entropy model in this export: {no_entropy or 'none was fitted'}.")
    return [*out, ""]


def with_prior(card: str, facts: dict[str, Any]) -> str:
    """A card with the section on the prior that `vtok prior` added, in the place of an earlier one.

    facts: prior.json: held_out (rows of bits a token), training, config.
    """
    columns = ("nominal", "static", "ar", "signalling")
    lines = [
        "## Prior", "",
        "`prior.safetensors` is an autoregressive prior over the token ids, for `vtok encode --coding ar` and `vtok "
        "sample`. Bits a token of held-out token shards (the best of its checkpoints was chosen on them):", "",
        "| tokens kept of a group | nominal | static | prior | signalling of lengths |", "|---|---|---|---|---|",
        *(
            f"| {row['budget']} | " + " | ".join(f"{row[name]:.3f}" for name in columns) + " |"
            for row in facts.get("held_out") or []
        ),
        "",
    ]  # fmt: skip
    before, _, rest = card.partition("## Prior\n")
    after = rest[rest.find("\n## ") + 1 :] if "\n## " in rest else ""
    if not rest:
        head, mark, tail = card.partition("## Use\n")
        before, after = (head, mark + tail) if mark else (card.rstrip() + "\n\n", "")
    return before + "\n".join(lines) + ("\n" if after else "") + after


def _loading(facts: dict[str, Any], config: RunConfig) -> list[str]:
    height, width = config.data.size
    shape = f"1, 3, {config.data.num_frames}, {height}, {width}"
    return [
        "## Use", "",
        "```python",
        "import torch, vtok  # pip install vtok",
        "model = vtok.load(PATH_OR_REPO)  # runs no code from here",
        f"video = torch.zeros({shape}, dtype=torch.uint8)",
        'tokens = model.encode(vtok.types.Clip(keys=["a"], video=video), budget=4)',
        f"frames = model.decode(tokens, size=({height}, {width}))  # in [-1, 1]",
        "```", "",
        "Without vtok (torch, einops, transformers and safetensors are enough):", "",
        "```python",
        "from transformers import AutoModel",
        "model = AutoModel.from_pretrained(PATH_OR_REPO, trust_remote_code=True)",
        "tokens = model.encode(video, budget=4)  # the same ids",
        "```", "",
        "```",
        "vtok encode PATH_OR_REPO video.mp4 --out video.vtok --budget 4",
        "vtok decode PATH_OR_REPO video.vtok --out video.mkv",
        "```", "",
    ]  # fmt: skip


def training_section(config: RunConfig, run_dir: Path | None, *, step: int | None = None) -> list[str]:
    """Lines on what a run was trained on, by which command, on which hardware. step: of the checkpoint."""
    out = ["## Training", ""]
    starts = (read_json(run_dir / "environment.json") or {}).get("starts", []) if run_dir else []
    out.append(f"- data: `{config.data.shards or 'not stated'}`, validation: `{config.data.val_shards or 'none'}`")
    trained = max((row["step"] for row in metric_lines(run_dir / "metrics.jsonl")), default=None) if run_dir else None
    steps = trained if step is None else step
    length = f"{steps} steps" if steps else f"at most {config.trainer.max_steps} steps"
    length += f" (of a run that went on to {trained})" if trained and steps and trained > steps else ""
    if config.trainer.max_minutes is not None:
        length += f" (the run was given {config.trainer.max_minutes:g} minutes)"
    out.append(
        f"- {length} of {config.data.batch_size} clips a process, precision {config.trainer.precision}, strategy "
        f"{config.trainer.strategy}"
    )
    if config.init_from:
        out.append(f"- started from the weights of `{config.init_from}`")
    if starts:
        last = starts[-1]
        command = shareable(last.get("command", []))
        command = " ".join(Path(part).name if i < 2 else part for i, part in enumerate(command))
        hardware = ", ".join(last.get("gpus") or []) or f"{last.get('cpu_count')} CPU cores"
        packages = ", ".join(f"{k} {v}" for k, v in (last.get("packages") or {}).items() if v)
        out += [f"- command: `{command}`", f"- hardware: {hardware} x {last.get('world_size', 1)} process(es)"]
        out += [
            f"- versions: Python {last.get('python')}, {packages}",
            f"- commit: {last.get('commit') or 'not known'}",
        ]
        out += [f"- started {len(starts)} times (resumed)"] if len(starts) > 1 else []
    else:
        out.append("- command: `vtok train training.yaml`")
    return [*out, ""]


def measured_before(run_dir: Path | None, facts: dict[str, Any]) -> dict[str, Any]:
    """eval/eval.json of the run, {} where there is none, or where it is of other weights than those of the export."""
    found = read_json(run_dir / "eval" / "eval.json") if run_dir else None
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        return {}
    return shareable(found) if found.get("model_id", facts["model_id"]) == facts["model_id"] else {}


def _measurements(run_dir: Path | None, facts: dict[str, Any]) -> list[str]:
    found = measured_before(run_dir, facts)
    out, rows = ["## Measured", ""], found.get("rows")
    if not rows:
        return [*out, "Not evaluated before the export: `vtok eval` writes the table of budgets.", ""]
    columns = [c for c in ("method", *COLUMNS) if any(row.get(c) is not None for row in rows)]
    out += [f"{found.get('clips')} clips of `{found.get('shards')}`; controls and codecs on the same windows.", ""]
    out += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    out += ["| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows]
    return [*out, ""]


def cell(value: Any) -> str:
    """A value in a table: four digits, empty where it is not defined."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_json(path: Path) -> Any:
    """What a json file holds; None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
