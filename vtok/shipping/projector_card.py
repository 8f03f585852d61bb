"""The card of a projector's export (README.md): what it reads and makes, and what its tokens are worth to the LLM."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from vtok.config import RunConfig
from vtok.reducers import REDUCERS
from vtok.shipping.card import cell, measured_before, training_section

FULL_TABLE = {  # column of eval.json: (heading, per cent)
    "method": ("method", False),
    "budget": ("budget", False),
    "tokens_mean": ("tokens", False),
    "accuracy": ("accuracy %", True),
    "accuracy_ci": ("95 %", True),
    "retained": ("kept %", True),
    "positions_mean": ("positions", False),
    "prefill_flops": ("prefill FLOPs", False),
    "kv_bytes": ("KV bytes", False),
    "compress_flops": ("FLOPs to compress", False),
}


def projector_card(
    model: nn.Module,
    config: RunConfig,
    facts: dict[str, Any],
    *,
    run_dir: Path | None = None,
    step: int | None = None,
    licence: str = "apache-2.0",
) -> str:
    """README.md of an export, with the front matter that the Hub reads.

    Args:
        facts: its config.json. run_dir: where environment.json and eval/eval.json lie; None leaves both out.
        step: of the checkpoint that the weights are of.
    """
    family, found = facts["family"], measured_before(run_dir, facts)
    small = getattr(config.model, "lm", None)  # the small language model that reads, of the family `language`
    audio = getattr(config.model, "audio", None)
    names = (
        config.objective.llm.name,
        config.model.tower.name,
        small.name if small else "",
        audio.name if audio else "",
    )
    llm, tower, reader, ears = (hub_id(name) for name in names)
    vlm = facts.get("vlm") or {}
    joined = vlm["name"] if vlm.get("revision") else None  # a folder is nothing to others
    front = ["library_name: transformers", f"license: {licence}", "pipeline_tag: feature-extraction"]
    if bases := [name for name in (joined, llm, reader, tower, ears) if name]:
        front += ["base_model:", *(f"- {name}" for name in bases)]
    if joined or llm:
        front.append("base_model_relation: adapter")
    tags = ("vtok", "video", "video-text-to-text", "projector", "token-compression", "custom_code")
    front += ["tags:", *(f"- {tag}" for tag in (*tags, family.rpartition(".")[2]))]
    parameters = sum(p.numel() for p in model.parameters())
    lines = [
        "---", *front, "---", "",
        f"# {facts['model_id']}", "",
        f"A projector of vtok's `{family}` family, {parameters / 1e6:.2f} M parameters: it makes tokens of "
        + ("a text" if _of_texts(config) else "what a frozen vision tower saw of a video")
        + (" and what a frozen audio tower heard meanwhile" if audio and audio.name else "")
        + ", and a frozen language model reads them in its place.", "",
        *_references(config, found),
        *_tokens(model, config),
        *_use(model, config, vlm),
        *training_section(config, run_dir, step=step)[:-1], *_objective(config), "",
        *_measured(found, family.rpartition(".")[2]),
        "## Files and licence", "",
        f"Weights: `{licence}`, as stated by whoever exported them; they may carry conditions of the training videos, "
        "and were trained against the tower and the language model above, whose licences are their own. Code "
        "(`modeling_vtok.py`): Apache-2.0. `training.yaml` is the resolved configuration of the run, `config.json` "
        "what loading needs.", "",
        f"Weights sha256 (names, types, shapes and bytes of the tensors): `{facts['weights_sha256']}`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def hub_id(name: str) -> str | None:
    """The Hub's name of a tower or a language model, as the configuration calls it; None for a folder.

    timm's own models have repositories by name and tag; a name without its tag means whatever timm's version chooses.
    """
    kind, _, rest = name.partition(":")
    if kind in ("hf", "timm", "vlm") and re.fullmatch(r"[\w.-]+/[\w.-]+", rest) and not rest.startswith("."):
        return rest
    return f"timm/{rest}" if kind == "timm" and re.fullmatch(r"\w+\.\w+", rest) else None


def _of_texts(config: RunConfig) -> bool:
    return getattr(config.model, "source", "video") == "text"


def _references(config: RunConfig, found: dict[str, Any]) -> list[str]:
    """What is read from elsewhere, as far as the configuration pins it or the evaluation loaded it."""
    rank = config.objective.lora.rank
    out = ["## What it stands between", "", "Tower and language model are frozen, and not in this repository.", ""]
    if rank:
        out[-2:] = [
            f"The language model was trained too: it reads these tokens through adapters of rank {rank}, which are in "
            "`adapters.safetensors` (`vtok eval`, `vtok.llm.load_adapted`).",
            "",
        ]
    out += ["| | name | revision | sha256 of its weights | read as |", "|---|---|---|---|---|"]
    tower, llm, small = config.model.tower, config.objective.llm, getattr(config.model, "lm", None)
    layer = "its last output" if tower.layer == -1 else f"block {tower.layer}"
    rows = [("language model", llm, "llm", llm.dtype)]
    if tower.name:
        rows.append(("tower", tower, "tower", f"{layer}, {tower.dtype}"))
    audio: Any = getattr(config.model, "audio", None)
    if audio and audio.name:
        block = "its last output" if audio.layer == -1 else f"block {audio.layer}"
        pooled = f", {audio.pool} successive vectors averaged into one" if audio.pool > 1 else ""
        rows.append(("audio tower", audio, "audio", f"{block}, {audio.dtype}{pooled}, {audio.tokens} tokens a frame"))
    if small:
        learns = {"all": "trained from there on, its weights are here", "lora": "read through adapters that are here"}
        rows.append(("small language model", small, "", learns.get(small.learn, f"as it is, {small.dtype}")))
    for who, stated, role, how in rows:
        loaded = found.get(role) or {}
        loaded = loaded if loaded.get("name") == stated.name else {}  # measured with another one
        repository = hub_id(stated.name)
        folder = f"`{Path(stated.name.partition(':')[2] or stated.name).name}`"
        name = f"[{repository}](https://huggingface.co/{repository})" if repository else folder
        name += "" if repository or stated.name.startswith("timm:") else ", a folder of the exporter's"
        revision, sha256 = (stated.revision or loaded.get("revision"), stated.sha256 or loaded.get("sha256"))
        known = [f"`{value}`" if value else "not recorded" for value in (revision, sha256)]
        out.append(f"| {who} | {name} | {' | '.join(known)} | {how} |")
    return [*out, ""]


def _tokens(model: Any, config: RunConfig) -> list[str]:
    out = ["## Tokens", ""]
    if getattr(model, "reads_prompt", False):
        out.append(
            "- **Query-aware**: `compress` reads the prompt, and its tokens are for that prompt alone. Make them again "
            "for every question; a cache of them serves no other turn."
        )
    else:
        out.append(
            "- **Query-free**: tokens depend on nothing that is asked. Make them once, and keep them for every "
            "question and every turn."
        )
    asked = "any number up to that can be asked for" if model.any_budget else "their number cannot be chosen"
    out.append(f"- At most {model.max_tokens} tokens of a clip, {config.model.embedding_dim} numbers each; {asked}.")
    if model.any_budget and model.nested:
        out.append("- Nested: a smaller budget keeps some of the tokens of a larger one.")
    elif model.any_budget:
        out.append("- Not nested: every budget has tokens of its own, so compress again rather than cut.")
    if _of_texts(config):
        out.append(f"- `length_policy: {config.model.length_policy}`: how many there are depends on the text.")
    elif config.model.length_policy == "metadata":
        out.append(
            "- `length_policy: metadata`: how many there are follows from the frames, height and width of the "
            "features (in patches) and the budget. `model.config.token_count(frames, height, width, budget=K)` says it "
            "before anything is seen; where there are no weights, `token_count(config, ...)` of `modeling_vtok.py`."
        )
    else:
        out.append(
            "- `length_policy: content`: how many there are may depend on what is seen. `model.config.token_bounds("
            "frames, height, width, budget=K)` gives the fewest and the most, of features in patches; a budget of "
            "the fewest or below is met exactly."
        )
    times = ", times written before groups of tokens" if config.objective.timestamps else ""
    out.append(
        "- What is counted: `tokens` are all vectors that stand in the place of the input, separators and whatever "
        f"else is learned included; `positions` are those of the whole prompt, words{times} and tokens."
    )
    return [*out, ""]


def _use(model: Any, config: RunConfig, vlm: dict[str, Any]) -> list[str]:
    c, frames = config.model, config.data.num_frames
    budget = min(16, model.max_tokens)
    asked = f", budget={budget}" if model.any_budget else ""
    height, width = config.data.size
    reads = getattr(model, "reads_prompt", False)
    if _of_texts(config):
        return [
            "## Use", "",
            "```python",
            "import vtok",
            "model = vtok.load(PATH_OR_REPO)  # runs no code from here; the tokenizer is fetched by its name",
            'clip = vtok.types.Clip(keys=["a"], text=["A long text."])',
            f"tokens = model.encode(clip{asked})",
            "tokens.embeddings, tokens.lengths  # [texts, tokens, width of the words], [texts]",
            "```", "",
        ]  # fmt: skip
    out = [
        "## Use", "",
        f"From a video{' with its sound' * _hears(c)}; {'towers are' if _hears(c) else 'the tower is'} fetched by "
        f"{'their names' if _hears(c) else 'its name'}:", "",
        "```python",
        "import torch, vtok  # pip install 'vtok[towers]'",
        "model = vtok.load(PATH_OR_REPO)  # runs no code from here",
        f"video = torch.zeros(1, 3, {frames}, {height}, {width}, dtype=torch.uint8)",
        *_sound(model, frames, config.data.fps),
        f'clip = vtok.types.Clip(keys=["a"], video=video{", sound=sound" * _hears(c)}{QUESTION if reads else ""})',
        f"tokens = model.encode(clip{asked})",
        "tokens.embeddings, tokens.lengths  # [clips, tokens, width of the words], [clips]",
        "```", "",
    ]  # fmt: skip
    if not _from_patches(c):
        return out
    side = next(side for side in (16, 12, 8, 4, 3, 2, 1) if _fits(c, frames, side) or side == 1)
    out += [
        "From features, without vtok (torch, einops, transformers and safetensors are enough):", "",
        "```python",
        "import torch",
        "from transformers import AutoModel",
        "model = AutoModel.from_pretrained(PATH_OR_REPO, trust_remote_code=True)",
        f"patches = torch.zeros(1, {frames}, {side * side}, {c.in_dim})  # [clips, frames, patches of a frame, width]",
        f"tokens = model.compress(patches, grid=({side}, {side}){asked}{QUESTION if reads else ''})",
        "```", "",
    ]  # fmt: skip
    ask = f"{asked}{QUESTION if reads else ''}, max_new_tokens=64"
    if vlm:
        at = f" at revision `{vlm['revision']}`" if vlm["revision"] else ", a folder of the exporter's"
        name = vlm["name"] if vlm["revision"] else Path(vlm["name"]).name
        return [
            *out, f"Before `{name}`{at}, fetched by that name; its processor lays out the prompt:", "",
            "```python",
            "from transformers import AutoModelForImageTextToText",
            "joined = AutoModelForImageTextToText.from_pretrained(PATH_OR_REPO, trust_remote_code=True)",
            f"ids = joined.generate(**inputs{ask})",
            "```", "",
        ]  # fmt: skip
    return [
        *out, "Before a VLM of transformers whose own vision tower and language model are those above; its processor "
        "lays out the prompt:", "",
        "```python",
        "joined = model.attach(vlm)",
        f"ids = joined.generate(**inputs{ask})",
        "```", "",
    ]  # fmt: skip


QUESTION = ', prompt=["What happens?"]'


def _hears(c: Any) -> bool:
    return bool(getattr(getattr(c, "audio", None), "name", ""))


def _sound(model: Any, frames: int, fps: float | None) -> list[str]:
    """Silence as long as the video, as lines of code, for a model that hears."""
    if not _hears(model.config):
        return []
    return [
        f"rate, seconds = model.ears.rate, {frames / (fps or 1.0):g}",
        "samples = torch.zeros(1, round(seconds * rate), dtype=torch.int16)  # mono, from the first frame on",
        f"edges = torch.linspace(0, samples.shape[1], {frames + 1}).long()",
        "spans = torch.stack([edges[:-1], edges[1:]], -1)[None]  # of each frame, in samples",
        "sound = vtok.types.Sound(samples, torch.tensor([samples.shape[1]]), spans, rate)",
    ]


def _from_patches(c: Any) -> bool:
    """Whether patches are all that `compress` needs of a video."""
    method = REDUCERS.get(getattr(c, "method", ""))
    if method and (method.layers or method.keys or method.frame):
        return False
    return getattr(c, "method", "") != "downsample" and not _hears(c)


def _fits(c: Any, frames: int, side: int) -> bool:
    try:
        return c.token_bounds(frames, side, side)[1] > 0
    except ValueError:
        return False


def _objective(config: RunConfig) -> list[str]:
    """Lines on what the language model was to say."""
    c = config.objective
    shares = {name: getattr(c.tasks, name) for name in ("caption", "qa", "reconstruction")}
    tasks = ", ".join(f"{name} {share:g}" for name, share in shares.items() if share)
    laws = {"full": "all tokens"}
    budgets = ", ".join("all" if v == 0 else str(v) for v in c.budgets.values) or laws.get(c.budgets.law, c.budgets.law)
    out = [f"- the language model's loss on answers (tasks: {tasks}), with budgets: {budgets}"]
    if c.logits or c.hidden:
        out.append(f"- distilled from all tokens (weights: logits {c.logits:g}, hidden states {c.hidden:g})")
    return out


def _measured(found: dict[str, Any], family: str) -> list[str]:
    out = ["## Measured", ""]
    rows: list[dict[str, Any]] = found.get("rows", [])
    if not rows:
        return [*out, "Not evaluated before the export: `vtok eval` writes the table of budgets.", ""]
    own = [row for row in rows if row["method"] in ("blind", "full", family)]
    controls = [row for row in rows if row["method"] not in ("blind", "full", family)]
    guess = next((row["chance"] for row in rows if row.get("chance") is not None), None)
    out += [
        f"{found.get('clips')} clips of `{found.get('shards')}`, questions with choices, the likeliest one taken. "
        "`blind`: the language model with nothing to read. `full`: all tokens of the stage-0 projector. Kept: of what "
        f"these gain over chance{'' if guess is None else f' ({100 * guess:.1f} %)'}. Intervals: bootstrap over "
        "videos. FLOPs and bytes: of a prompt of so many positions, and of a clip.", "",
        *_table(own), "",
    ]  # fmt: skip
    if not any(row["method"] == "full" for row in own):
        out += ["There is no row of all tokens (`vtok eval --full`): what is kept cannot be said.", ""]
    if controls:
        budgets = sorted({row["budget"] for row in controls if row["budget"]})
        found_at = {(row["method"], row["budget"]): row.get("accuracy") for row in controls}
        tuned = found.get("tuned")
        base = f"the projector of `{tuned}`, trained as long" if tuned else "the projector of all tokens"
        out += [f"Accuracy (%) of training-free reducers on {base}, by tokens:", ""]
        out += ["| | " + " | ".join(map(str, budgets)) + " |", "|---" * (len(budgets) + 1) + "|"]
        for method in dict.fromkeys(row["method"] for row in controls):
            values = [_per_cent(found_at.get((method, budget))) for budget in budgets]
            out.append(f"| {method} | " + " | ".join(values) + " |")
        out.append("")
    if kinds := sorted({kind for row in own for kind in row.get("by_type") or {}}):
        heads = [f"{row['method']} {row['budget']}" if row["budget"] else row["method"] for row in own]
        out += ["Accuracy (%) by what a question is about:", ""]
        out += ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for kind in kinds:
            values = [_per_cent((row.get("by_type") or {}).get(kind)) for row in own]
            out.append(f"| {kind} | " + " | ".join(values) + " |")
        out.append("")
    return out


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = [name for name in FULL_TABLE if any(row.get(name) is not None for row in rows)]
    heads = [FULL_TABLE[name][0] for name in columns]
    show = {name: _per_cent if FULL_TABLE[name][1] else cell for name in columns}
    body = ["| " + " | ".join(show[name](row.get(name)) for name in columns) + " |" for row in rows]
    return ["| " + " | ".join(heads) + " |", "|" + "---|" * len(columns), *body]


def _per_cent(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "-".join(f"{100 * bound:.1f}" for bound in value)
    return "" if value is None else f"{100 * value:.1f}"
