"""Run configuration: dataclasses, one yaml, dotted overrides.

    OmegaConf.merge(structured(RunConfig), yaml, dotlist) in struct mode, then to_object

`model.name` picks the family module; its `Config` becomes the `model:` node and its `Objective.Config` the `objective:`
node. An unknown key, a wrong type, a missing value or an unknown family fails here, before a device is touched.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MappingNode, Node, SafeLoader, SequenceNode, YAMLError, compose

import vtok.families

MAX_YAML = 1 << 20  # bytes of a yaml file
MAX_NODES = 1 << 17  # keys and values of one, aliases counted as what they stand for


@dataclass
class DataConfig:
    """Where clips come from and what the model sees of them."""

    shards: str = ""  # folder with index.json, a brace pattern of tars, https: or pipe:; several joined by "::"
    weights: list[float] | None = None  # sampling weight of each "::" part (images and videos mixed); None: by size
    # With one of the next two every batch comes from one part, drawn by weights, the same on every rank: no padding.
    part_frames: list[int] | None = None  # frames a clip of each part; 1 = images, or single frames of its videos
    part_batch_sizes: list[int] | None = None  # clips per rank and step of each part; None: batch_size for all
    val_shards: str = ""  # held-out shards; split by source video, see `vtok shards`
    root: str = ""  # prefix of relative paths in shards and val_shards
    cache_dir: str = ""  # local copies of https: and pipe: shards; "" = none
    map: str = ""  # extension of the member that holds a dense map, such as npy; "" = the video or image
    texts: bool = False  # samples are texts, <key>.txt (vtok shards --texts), and frames play no role
    text_words: int = 0  # of a text, as `vtok info` counts a step; texts of any length are read. 0 = not said
    num_frames: int = 16
    size: list[int] = field(default_factory=lambda: [64, 64])  # (height, width) in pixels
    # factors on size, one drawn for each training batch, evenly and the same on every rank; None: size alone
    size_scales: list[float] | None = None
    fps: float | None = 8.0  # frames are picked at this rate; None keeps the source's
    crop: str = "random"  # random | center | none (resize only, aspect not kept); validation always crops the centre
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])  # random resized crop: share of the short side
    hflip: float = 0.0  # probability of a horizontal flip
    batch_size: int = 16  # clips per rank and step
    val_batch_size: int = 16
    num_workers: int = 2
    pin_memory: bool | None = None  # page-locked batches, copied while the device computes; null: on CUDA
    prefetch: bool = False  # CUDA: the next batch is copied to the device by a stream of its own during a step
    shuffle_buffer: int = 256  # samples; 0 keeps the order of the shards
    val_clips: int | None = None  # at most this many validation clips; None = all
    seed: int = 0  # of the order of samples, their windows and crops
    max_bad_fraction: float = 0.01  # share of samples that may be broken before the run stops
    max_pixels: int = 1 << 31  # frames x height x width a clip may decode to
    # A resume whose processes or workers cannot go on with the same order of clips begins a pass in a new one (some
    # clips of the pass come again, others later); False: it is an error that says which numbers would fit.
    reorder: bool = False


@dataclass
class OptimConfig:
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    fused: bool = True  # AdamW as one kernel over all tensors; false: tensor list by tensor list (foreach)
    weight_decay: float = 0.01  # matrices only: biases, norms, embeddings and one-dimensional tensors are not decayed
    warmup_steps: int = 100
    schedule: str = "cosine"  # cosine | constant | wsd (constant, then linear over the last fifth)
    min_lr_ratio: float = 0.01
    clip_grad_norm: float = 1.0  # joint over every parameter group; 0 = off
    lr_multipliers: dict[str, float] = field(default_factory=dict)  # parameter-name prefix -> factor on lr
    freeze: list[str] = field(default_factory=list)  # parameter-name prefixes that do not learn, such as model.encoder
    train_only: list[str] = field(default_factory=list)  # when given, every parameter under no such prefix is frozen
    ema_decay: float = 0.0  # exponential moving average of the model's weights, used to evaluate and export; 0 = off


@dataclass
class AlarmConfig:
    """Which metrics lines of training end or question a run (vtok/training/alarms.py). A rule is warn, stop or off,
    and acts once `lines` lines in a row look bad."""

    enabled: bool = True
    warmup_steps: int = 500  # no rule looks at the lines before
    lines: int = 10
    codebook_collapse: str = "stop"
    codebook_share: float = 0.02  # of the usage and perplexity that even use would have with as many tokens
    codebook_low: str = "warn"
    low_share: float = 0.1  # the same, for a codebook that is used badly but may recover
    discriminator_wins: str = "warn"
    discriminator_loss: float = 0.05  # below it, with real and fake logits further apart than `logits_gap`
    logits_gap: float = 2.0
    discriminator_dead: str = "warn"
    dead_tolerance: float = 0.002  # distance from the loss of a constant answer: 1 for hinge, log 2 for nonsaturating
    divergence: str = "stop"
    divergence_factor: float = 3.0  # reconstruction error (or loss) over its lowest median of `lines` lines so far
    gradient_growth: str = "warn"
    gradient_factor: float = 100.0  # gradient norm over its lowest such median


@dataclass
class TrainerConfig:
    max_steps: int = 1000
    max_minutes: float | None = None  # stop at a step boundary after this wall time; the schedule follows the clock
    # auto | ddp | fsdp | deepspeed_1 | deepspeed_2 | deepspeed_3 | deepspeed_2_offload | deepspeed_3_offload
    strategy: str = "auto"
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: str = "32-true"  # 32-true | bf16-mixed | bf16-true | 16-mixed
    accumulate: int = 1
    compile: bool = False  # torch.compile of the model's parts (docs/performance.md)
    channels_last: bool = False  # weights and videos of 3D convolutions with channels last in memory
    async_checkpoint: bool = False  # checkpoints are written while training goes on; auto and ddp
    log_every: int = 20  # steps
    val_every: int = 0  # steps; 0 = at the end only
    sample_every: int = 0  # steps between sample videos; 0 = with validation
    checkpoint_minutes: float = 10.0
    checkpoint_every: int = 0  # steps; 0 = by minutes only
    keep_last: int = 2  # newest checkpoints that stay: last, previous, and those before by step (docs/checkpoints.md)
    keep_every: int = 0  # steps between checkpoints that stay for good, written at these steps; 0 = none
    max_bad_steps: int = 3  # non-finite losses or gradients in a row before the run stops
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    progress: bool = True
    tensorboard: bool = True
    wandb: str = ""  # project of Weights & Biases (pip install 'vtok[wandb]'); "" = none
    statistics_clips: int = 256  # training clips for a model that begins from statistics (`fit_statistics`)
    find_unused_parameters: bool = True  # DDP: some parameters may get no gradient in a step; False is faster
    count_flops: bool = True  # operations of a few batches, for MFU; those run op by op (no compile, no flex)
    peak_tflops: float | None = None  # of a device at this precision, for MFU; None: by its name (telemetry.py)
    stall_minutes: float = 8.0  # without a batch, a checkpoint: every rank writes its stacks; 0 = never. NCCL waits 10
    ledger: bool = False  # write every step's keys and exact loss to ledger-<rank>.txt: to compare two runs
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged into the DeepSpeed config


@dataclass
class EvalConfig:
    budgets: list[int] = field(default_factory=list)  # tokens; [] = 1, 4, 16, ... up to the model's maximum
    controls: list[str] = field(default_factory=lambda: ["dct", "downsample", "mean_colour", "mean_frame"])
    codecs: list[str] = field(default_factory=lambda: ["x264", "x265", "av1"])
    lpips_weights: str = ""  # path of LPIPS weights; "" = LPIPS is null and says so
    lpips_sha256: str = ""
    fvd_weights: str = ""  # path of I3D weights (Kinetics-400); "" = rFVD is null and says so
    fvd_sha256: str = ""
    fid_weights: str = ""  # path of Inception weights (2015-12-05); "" = rFID is null and says so
    fid_sha256: str = ""


@dataclass
class RunConfig:
    name: str = "run"  # the run directory is <out>/<name>
    out: str = "runs"
    seed: int = 0  # of the weights and of everything random in a step; the data's is data.seed
    init_from: str = ""  # export folder, or Hub repository USER/REPO[@REVISION], whose weights the model starts from
    init_allow: list[str] = field(default_factory=list)  # what may differ there: resolution frames quantizer tower llm
    model: Any = None
    objective: Any = None
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.out) / self.name


def family_names() -> list[str]:
    """Names of the package's families, sorted."""
    return sorted(info.name for info in pkgutil.iter_modules(vtok.families.__path__))


def load_family(name: str, *, trusted: bool = True) -> ModuleType:
    """The module of a family: `flexible` is vtok.families.flexible, a dotted name is imported as it stands.

    Args:
        trusted: False for names read from a file that came from elsewhere (an export, a Hub repository): then only the
            package's own families are imported, so that weights never choose code.
    Raises: ValueError naming the choices, or the export a module lacks.
    """
    if "." in name and trusted and all(part.isidentifier() for part in name.split(".")):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # something that the family itself imports
            raise ValueError(
                f"model.name={name!r}: there is no module {error.name!r}; set PYTHONPATH, or choose one of "
                f"{family_names()}"
            ) from error
    elif name in family_names():
        module = importlib.import_module(f"vtok.families.{name}")
    else:
        hint = "" if trusted or "." not in name else "; files from elsewhere may name the package's families only"
        raise ValueError(f"model.name={name!r} is not a family; choose one of {family_names()}{hint}")
    missing = [part for part in ("Config", "Model", "Objective") if not hasattr(module, part)]
    if missing:
        raise ValueError(f"model.name={name!r}: {module.__name__} does not export {', '.join(missing)}")
    return module


def _explain(error: OmegaConfBaseException, where: str, base: DictConfig) -> ValueError:
    key = getattr(error, "full_key", None) or getattr(error, "key", None) or ""
    parent = OmegaConf.select(base, key.rpartition(".")[0]) if "." in key else base
    choices = sorted(str(k) for k in parent) if isinstance(parent, DictConfig) else []
    own = key.rpartition(".")[2].partition("[")[0]
    near = difflib.get_close_matches(own, choices, 1)
    message = str(error).splitlines()[0].rstrip(". ")
    advice = f"; did you mean {near[0]!r}?" if near and near[0] != own else ""
    if "not in" in message and choices:
        advice += f" Known keys here: {', '.join(choices)}"
    if "'None'" in message and own in choices:
        advice += f"; it is left empty: write {key}=VALUE" + (
            f", or {key}='' for no text" if "'str'" in message else ""
        )
    return ValueError(f"{where}: {key or 'config'}: {message}{advice}")


def _merge(base: DictConfig, node: Any, where: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(base, node)
    except OmegaConfBaseException as error:
        raise _explain(error, where, base) from error
    assert isinstance(merged, DictConfig)
    return merged


def from_dict(cls: type, values: dict[str, Any], *, where: str, trusted: bool = True) -> Any:
    """A dataclass from plain values, checked like a yaml: unknown keys and wrong types are errors naming the key.

    trusted: False for values from elsewhere: then `${...}` is an error, which would read the environment.
    """
    if not trusted:
        _refuse_interpolations(values, where)
    base = OmegaConf.structured(cls)
    try:
        return OmegaConf.to_object(_merge(base, OmegaConf.create(values), where))
    except OmegaConfBaseException as error:
        raise _explain(error, where, base) from error


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The checked configuration of a run.

    Args:
        path: a yaml file. A top-level `base: other.yaml` (relative to it) is read first and overridden by it.
        overrides: dotted `key=value`, the last word.
    Raises: ValueError naming the key, the value and the choices. FileNotFoundError for a missing yaml.
    """
    node = _read(Path(path))
    for item in overrides or []:
        if "=" not in item:
            raise ValueError(f"override {item!r} is not of the form key=value")
        try:
            OmegaConf.from_dotlist([item])
        except YAMLError as error:
            raise ValueError(f"override {item!r}: its value is not yaml: {getattr(error, 'problem', error)}") from error
    command_line = OmegaConf.from_dotlist(list(overrides or []))
    return _resolve([(str(path), node), ("command line", command_line)])


def loads(values: dict[str, Any], *, where: str = "config", trusted: bool = True) -> RunConfig:
    """The same from a plain dict."""
    return _resolve([(where, OmegaConf.create(values))], trusted=trusted)


def read_plain(path: Path) -> dict[str, Any]:
    """The values of a yaml that came from elsewhere, which can tell of settings and do nothing.

    Raises: ValueError for `base:`, which would read another file, and `${...}`, which would read the environment.
    """
    values = OmegaConf.to_container(_read_yaml(path), resolve=False)
    assert isinstance(values, dict)
    if "base" in values:
        raise ValueError(f"{path}: base={values['base']!r} would read another file; a config from elsewhere may not")
    _refuse_interpolations(values, str(path))
    return {str(key): value for key, value in values.items()}


def _refuse_interpolations(values: Any, where: str, key: str = "") -> None:
    if isinstance(values, dict):
        for name, value in values.items():
            _refuse_interpolations(name, where, f"{key}{name}")
            _refuse_interpolations(value, where, f"{key}{name}.")
    elif isinstance(values, list):
        for value in values:
            _refuse_interpolations(value, where, key)
    elif isinstance(values, str) and "${" in values:
        raise ValueError(
            f"{where}: {key.rstrip('.')}={values!r}: what came from elsewhere may not refer to other values or to the "
            "environment; write the value itself"
        )


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise FileNotFoundError(f"no such config: {path}")
    if path.stat().st_size > MAX_YAML:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, above the limit of {MAX_YAML}: no config is so long")
    try:
        text = path.read_text(encoding="utf-8")
        most = _nodes(compose(text, SafeLoader)) if "&" in text and "*" in text else 0
        node = OmegaConf.create(text) if most <= MAX_NODES else None
    except Exception as error:
        raise ValueError(f"{path}: not readable as yaml: {error}") from error
    if node is None:
        raise ValueError(f"{path}: its aliases (*name) stand for {most} values, above the limit of {MAX_NODES}")
    if not isinstance(node, DictConfig):
        raise ValueError(f"{path}: expected a mapping at the top, got {type(node).__name__}")
    return node


def _nodes(node: Node | None) -> int:
    """Keys and values below a node, aliases counted as what they stand for. Raises RecursionError for a circle."""

    @functools.cache
    def below(node: Node) -> int:
        if isinstance(node, MappingNode):
            return 1 + sum(below(key) + below(value) for key, value in node.value)
        return 1 + (sum(map(below, node.value)) if isinstance(node, SequenceNode) else 0)

    return 0 if node is None else below(node)


def _read(path: Path) -> DictConfig:
    node = _read_yaml(path)
    base = node.pop("base", None)
    if base:
        merged = OmegaConf.merge(_read(path.parent / base), node)
        assert isinstance(merged, DictConfig)
        return merged
    return node


def _resolve(layers: list[tuple[str, DictConfig]], *, trusted: bool = True) -> RunConfig:
    names = [OmegaConf.select(node, "model.name") for _, node in layers]
    name = next((n for n in reversed(names) if n), None)
    if not name:
        raise ValueError(f"model.name is missing; choose one of {family_names()}")
    family = load_family(str(name), trusted=trusted)
    base = OmegaConf.structured(RunConfig)
    base.model = OmegaConf.structured(family.Config)
    base.objective = OmegaConf.structured(family.Objective.Config)
    for where, node in layers:
        base = _merge(base, node, where)
    try:
        config = OmegaConf.to_object(base)
    except OmegaConfBaseException as error:
        raise _explain(error, layers[0][0], base) from error
    assert isinstance(config, RunConfig)
    return config


def to_yaml(config: Any) -> str:
    """The resolved configuration as yaml, readable by `load`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass (nested ones too) as plain JSON-ready values."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of a dataclass: to compare two resolved configurations."""
    out: dict[str, Any] = {}
    for f in fields(config):
        value, key = getattr(config, f.name), f"{prefix}{f.name}"
        out.update(flatten(value, key + ".") if is_dataclass(value) else {key: value})
    return out
