"""`vtok features`: shards of video into shards of frozen towers' features: one pass, many compressors to train on it.

Whole clips (or the middle window of each) at the frame rate, size and crop of the `data:` node that is to read them; in
many processes and resumed after any kill, as `vtok.data.shard_work` does. What the result depends on stands in
`recording.json`. The format is that of `vtok.data.feature_shards`; the tower's identity goes with the features.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import av
import torch

from vtok.config import DataConfig, from_dict
from vtok.config import load as load_config
from vtok.data import shard_work
from vtok.data.feature_index import KIND, SAME, SAME_AUDIO, FeatureSettings, audio_facts, check_sound
from vtok.data.pack import write_atomically
from vtok.data.shard_work import Job, Ledger, TarWriter
from vtok.data.sources import ShardReader
from vtok.data.view import FEATURES, HEARD
from vtok.data.workers import Notify
from vtok.families.reducer import reads_of
from vtok.feature_recording import RecordedClip, Recorder, own_size, try_settings
from vtok.vision import AudioTower, AudioTowerConfig, Tower, TowerConfig, load_audio_tower, load_tower

log = logging.getLogger(__name__)

COUNTS = ("samples", "frames")
# options whose place --config takes
ANSWERED = ("tower", "layer", "dtype", "tower_size", "revision", "frames_per_call", "fps", "size", "crop", "attention")
ANSWERED += ("attention_from", "keys", "audio_tower", "audio_tokens", "audio_layer", "audio_dtype", "audio_chunk")
ANSWERED += ("audio_revision",)


@dataclass(frozen=True)
class Summary:
    """What stands in the output folder, and how fast this call was. outstanding: shards of other parts. heard: clips
    with features of their sound."""

    samples: int
    frames: int
    shards: int
    outstanding: int
    rejected: list[dict[str, Any]]
    seconds: float
    done_now: dict[str, int]  # samples and frames that this call recorded
    heard: int = 0


def record_features(
    shards: str | Path,
    out: str | Path,
    *,
    tower: TowerConfig,
    audio: AudioTowerConfig | None = None,
    fps: float | None = 8.0,
    size: tuple[int, int] | None = None,
    crop: str = "center",
    frames: int | None = None,
    attention: tuple[int, ...] = (),
    attention_from: str = "all",
    keys: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    part: tuple[int, int] = (0, 1),
    max_bad_fraction: float = 0.01,
    cache_dir: str = "",
    progress: bool = True,
) -> Summary:
    """Feature shards of video shards, resuming what an earlier call left in `out`.

    Args:
        shards: a folder with index.json, a whole packing (train/, val/ ...), or what `data.shards` may be.
        tower: as in the model's configuration; its dtype is that of the features, bfloat16 for half of the bytes.
        audio: an audio tower, as in the model's configuration: what it makes of each clip's sound is recorded too.
        fps, crop, frames, attention, attention_from, keys: see `FeatureSettings`. size: (height, width); None: what the
            tower resizes frames to.
        workers: processes; None: one a core, on CUDA one a device; 0: this process. More than there are devices share.
        device: cpu, cuda (every device) or cuda:N.
        part: (i, n): every n-th shard from the i-th on.
        max_bad_fraction: share of the samples that may be rejected.
    Raises: ValueError for bad settings or inputs, an `out` that holds something else, or too many rejected samples.
    """
    began, out = time.monotonic(), Path(out)
    shard_work.check_part(part)
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction={max_bad_fraction} is a share of the samples, 0 to 1")
    jobs = shard_work.plan(str(shards), cache_dir=cache_dir)
    devices = shard_work.devices_of(device)
    for cached in (_tower, _audio_tower, shard_work.health):  # of an earlier call in this process
        cached.cache_clear()
    halves = [each for each in (tower, audio) if each is not None and each.dtype != "float32"]
    for each in halves if device == "cpu" else ():
        log.warning(
            "%s works in %s on a CPU, which can take ten times as long as float32 where it has no instructions for it "
            "(--dtype, --audio-dtype, or the configuration's dtype)",
            each.name,
            each.dtype,
        )
    config = json.dumps(asdict(tower))
    loaded = _tower(config, "cpu")
    layers = tuple(dict.fromkeys(loaded.block(layer) for layer in attention))
    settings = FeatureSettings(fps, size or own_size(loaded), crop, frames, layers, attention_from, keys)
    try_settings(loaded, settings)
    who, claim = loaded.identity(), {}
    hears = "" if audio is None else json.dumps(asdict(audio))
    ears = _audio_tower(hears, "cpu")
    if ears is not None:
        firsts = {job.folder: [job.shard()] for job in reversed(jobs)}
        check_sound(list(firsts.values()), of=str(shards), needs="--audio-tower", cache_dir=cache_dir)
        claim = {f"audio.{name}": ears.identity()[name] for name in SAME_AUDIO}
    counts = COUNTS if ears is None else (*COUNTS, "heard")
    ledger = Ledger(out, jobs, claim="recording.json", counts=counts, made="features")
    numerics = {"frames_per_call": tower.frames_per_call, "torch": torch.__version__, "av": av.__version__}
    ledger.claim(
        {**{f"tower.{name}": who[name] for name in SAME}, **asdict(settings), **claim},
        {**numerics, "device": device.partition(":")[0]},
    )
    now = ledger.run(
        write_shard if ears is None else partial(write_shard, audio=(hears, ears.sha256)),
        lambda job: (job, out, config, loaded.sha256, settings, devices, max_bad_fraction),
        part=part,
        workers=shard_work.default_workers(device, devices) if workers is None else workers,
        title="recording clips",
        progress=progress,
    )

    def index(rows: list[dict[str, Any]]) -> dict[str, Any]:
        facts = {"stride": loaded.stride, "window": loaded.window, "embedding_dim": loaded.embedding_dim}
        columns = (*counts, "name", "bytes", "sha256")
        listed = [{key: row[key] for key in columns} for row in rows]
        heard = {} if ears is None else {"audio": audio_facts(ears)}
        return {"kind": KIND, "tower": {**who, **facts}, **heard, "settings": asdict(settings), "shards": listed}

    done = ledger.finish(index, limit=max_bad_fraction)
    return Summary(
        **done.totals,
        shards=done.shards,
        outstanding=done.outstanding,
        rejected=done.rejected,
        seconds=time.monotonic() - began,
        done_now=now,
    )


@lru_cache(maxsize=1)
def _tower(config: str, device: str) -> Tower:
    """This process's tower: it is read once, not once a shard."""
    return load_tower(from_dict(TowerConfig, json.loads(config), where="tower")).to(device)


@lru_cache(maxsize=1)
def _audio_tower(config: str, device: str) -> AudioTower | None:
    if not config:
        return None
    return load_audio_tower(from_dict(AudioTowerConfig, json.loads(config), where="audio")).to(device)


def write_shard(
    job: Job,
    out: Path,
    tower: str,
    sha256: str,
    settings: FeatureSettings,
    devices: list[str],
    limit: float,
    lost: dict[str, str],
    notify: Notify,
    *,
    audio: tuple[str, str] = ("", ""),
) -> dict[str, Any]:
    """Record one shard; returns its record.

    Args:
        tower: its configuration as json. sha256: of its weights when recording began. audio: both of the audio tower,
            "" for none.
        lost: {key: reason} of samples not to touch again. notify: called with each sample's key before it is touched.
    Raises: ValueError for other weights. TooManyBroken past the share of broken samples. OSError where the shard cannot
        be read or written.
    """
    number = (multiprocessing.current_process()._identity or (0,))[0]  # 1, 2 ... in worker processes
    device = devices[number % len(devices)]
    loaded, ears = _tower(tower, device), _audio_tower(audio[0], device)
    for each, begun in ((loaded, sha256), (ears, audio[1])):
        if each is not None and each.sha256 != begun:
            raise ValueError(f"{each.name} changed: its weights were {begun} when recording began: {each.sha256} now")
    recorder = Recorder(loaded, settings, audio=ears)
    reader = ShardReader([job.shard()], cache_dir=job.cache_dir, media=recorder.view.media)
    counts = {"samples": 0, "frames": 0} | ({} if ears is None else {"heard": 0})

    def add(tar: TarWriter, key: str, result: RecordedClip) -> None:
        tar.add(f"{key}.{FEATURES}", result.recording(recorder.tower.stride).to_bytes())
        if result.heard is not None:
            tar.add(f"{key}.{HEARD}", result.heard.to_bytes())
            counts["heard"] += 1
        tar.add(f"{key}.json", (json.dumps(result.json) + "\n").encode())
        counts["samples"] += 1
        counts["frames"] += len(result.seconds)

    results = recorder.shard(reader, 0, lost=lost, notify=notify)
    written = shard_work.write_results(job, out, results, add, command="vtok features", limit=limit)
    record = {"name": job.name, **counts, **written}
    write_atomically(job.record(out), record)
    return record


def main(argv: list[str]) -> int:
    """`vtok features SHARDS --config RUN.yaml key=value ... --out DIR`, or `vtok features SHARDS --tower NAME ...`."""
    defaults = DataConfig()
    parser = argparse.ArgumentParser(prog="vtok features", description="Shards of a frozen tower's features.")
    add = parser.add_argument
    add("shards", help="folder of `vtok shards` (one split, or all), or what data.shards may be")
    add("overrides", nargs="*", metavar="key=value", help="with --config: as of `vtok train`")
    add("--config", metavar="YAML", help="of the run that will read them: tower, frames, size, crop, attention, sound")
    add(
        "--tower",
        default="",
        metavar="NAME",
        help="timm:MODEL, timm:USER/REPO, hf:USER/REPO, vlm:USER/REPO or a folder",
    )
    add(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="where feature shards go; run again to resume or to check",
    )
    add("--layer", type=int, default=-1, help="block whose output is taken (default: the tower's own last output)")
    add("--dtype", default="bfloat16", help="of the tower and the features: bfloat16, float16 or float32")
    add("--tower-size", metavar="HxW", help="tower.size: whole frames resized to this (default: the tower's own)")
    add("--revision", default="", help="branch, tag or commit of a repository")
    add("--frames-per-call", type=int, default=64, help="frames through the tower at once (default: 64)")
    add("--fps", default=str(defaults.fps), help=f"data.fps: frames per second, or `source` (default: {defaults.fps})")
    add("--size", metavar="HxW", help="data.size (default: what the tower resizes frames to)")
    add("--crop", default="center", help="data.crop: center, or none (aspect not kept)")
    add("--frames", type=int, metavar="N", help="the middle window of N frames only, as validation (default: all)")
    add("--audio-tower", default="", metavar="NAME", help="hear each clip's .wav too: hf:USER/REPO or a folder")
    add("--audio-tokens", type=int, metavar="A", help="keep as few as A vectors of sound a frame (default: all)")
    add("--audio-layer", type=int, default=-1, help="as --layer, of the audio tower")
    add("--audio-dtype", help="of the audio tower and its features (default: --dtype)")
    add("--audio-chunk", type=float, default=0.0, metavar="S", help="seconds heard at once (default: the tower's own)")
    add("--audio-revision", default="", help="as --revision, of the audio tower")
    add("--attention", default="", metavar="L,L", help="blocks whose received attention is kept too")
    add("--attention-from", default="all", help="queries that count: all or cls")
    add("--keys", action="store_true", help="keep the attention keys of the layer too")
    shard_work.add_arguments(parser, bad_fraction=str(defaults.max_bad_fraction))
    args = parser.parse_intermixed_args(argv)
    if args.config:
        what = _of_config(args, parser, argv)
    elif args.overrides or not args.tower:
        raise ValueError(
            f"--tower {args.tower!r}, {args.overrides}: give --tower NAME and options, or --config YAML key=value ..."
        )
    else:
        what = _of_options(args)
    done = record_features(
        args.shards,
        args.out,
        **what,
        frames=args.frames,
        workers=args.workers,
        device=args.device,
        part=shard_work.parse_part(args.part),
        max_bad_fraction=defaults.max_bad_fraction if args.max_bad_fraction is None else args.max_bad_fraction,
        cache_dir=args.cache_dir,
        progress=not args.quiet,
    )
    clips, frames = (done.done_now.get(name, 0) for name in COUNTS)
    print(f"{args.out}: features of {done.samples} clips, {done.frames} frames in {done.shards} shards")
    print(f"  {clips} clips now, in {done.seconds:.1f} s: {clips / done.seconds:.1f} clips/s, ", end="")
    print(f"{frames / done.seconds:.1f} frames/s")
    if audio := what["audio"]:
        same = ("dtype", "layer", "chunk_s", "pool")
        told = " ".join(f"model.audio.{key}={getattr(audio, key)}" for key in same)
        print(f"  sound: {done.heard} clips have one; a model reads it with {told}")
    shard_work.print_rest(args.out, done.rejected, done.outstanding)
    return 0


def _of_config(args: argparse.Namespace, parser: argparse.ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """What the run of a configuration reads, as `record_features` takes it.

    Raises: ValueError for a model without a tower, for data that a cache cannot hold, and for options beside --config
        that it answers.
    """
    unsaid = argparse.Namespace(**dict.fromkeys(ANSWERED))  # what is there already, a default does not replace
    said = vars(parser.parse_intermixed_args(argv, unsaid))
    given = [name for name in ANSWERED if said[name] is not None]
    if given:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"{told} beside --config {args.config}: it says that; change it as `vtok train` does, key=value"
        )
    config = load_config(args.config, args.overrides)
    model: Any = config.model
    tower, data = getattr(model, "tower", None), config.data
    if tower is None or not tower.name:
        raise ValueError(f"--config {args.config}: it names no model.tower.name, whose features there are to record")
    if data.crop not in ("center", "none") or data.hflip:
        raise ValueError(
            f"--config {args.config}: data.crop={data.crop}, hflip={data.hflip}, and a cache holds one view of each "
            "clip: say data.crop=center (or none) data.hflip=0 here and in training"
        )
    audio = getattr(model, "audio", None)
    needs = reads_of(model) if hasattr(model, "method") else {}
    return dict(
        tower=tower,
        audio=audio if audio is not None and audio.name else None,
        fps=data.fps,
        size=(data.size[0], data.size[1]),
        crop=data.crop,
        attention=tuple(needs.get("attention", ())),
        attention_from=needs.get("attention_from", "all"),
        keys=needs.get("keys", False),
    )


def _of_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say, as `record_features` takes it."""
    tower = TowerConfig(
        name=args.tower,
        layer=args.layer,
        dtype=args.dtype,
        frames_per_call=args.frames_per_call,
        revision=args.revision,
        size=None if args.tower_size is None else list(shard_work.parse_size(args.tower_size, "--tower-size")),
    )
    fps = shard_work.parse_rate(args.fps)
    return dict(
        tower=tower,
        audio=_audio_config(args, fps),
        fps=fps,
        size=None if args.size is None else shard_work.parse_size(args.size),
        crop=args.crop,
        attention=_layers(args.attention),
        attention_from=args.attention_from,
        keys=args.keys,
    )


def _audio_config(args: argparse.Namespace, fps: float | None) -> AudioTowerConfig | None:
    """The audio tower of the options, `pool` such that each frame keeps --audio-tokens vectors at least."""
    if not args.audio_tower:
        return None
    config = AudioTowerConfig(
        name=args.audio_tower,
        layer=args.audio_layer,
        dtype=args.audio_dtype or args.dtype,
        chunk_s=args.audio_chunk,
        revision=args.audio_revision,
    )
    if args.audio_tokens is None:
        return config
    if args.audio_tokens < 1 or fps is None:
        raise ValueError(
            f"--audio-tokens {args.audio_tokens} with --fps {args.fps}: give 1 or more, for frames at a rate"
        )
    tower = load_audio_tower(config)
    pool = int(tower.rate / tower.step / (fps * args.audio_tokens) + 1e-9)
    if pool < 1:
        raise ValueError(
            f"--audio-tokens {args.audio_tokens} at --fps {args.fps}: {config.name} gives "
            f"{tower.rate / tower.step / fps:.3g} vectors a frame; ask for fewer, or leave it out to keep all"
        )
    return replace(config, tokens=args.audio_tokens, pool=pool)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",")) if text else ()
    except ValueError as error:
        raise ValueError(f"--attention {text!r} is not a list of blocks, such as -1 or 5,11") from error
