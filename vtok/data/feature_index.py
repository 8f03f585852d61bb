"""Whose features lie in feature shards, and of which frames: what may read them, and what is refused.

    index.json    kind "features"; "tower": its identity, stride and window; "settings"; shards with their hashes;
                  "audio": where sound was recorded too, the audio tower's identity, rate and step

Features of one tower mean nothing to another, and those of other frames are another training: both are errors that name
what was recorded and what is asked. The files themselves are those of `vtok.data.feature_shards`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vtok.data.audio import SOUND
from vtok.data.sources import Shard, ShardReader, fetch, open_sources
from vtok.data.view import Cached, Hearing, View

KIND = "features"  # what index.json says it lists
AGAIN = "run the same `vtok features` command again: it checks every shard by its hash and replaces damaged ones"
SAME = ("sha256", "layer", "dtype", "preprocess")  # of a tower's identity: what features depend on
SAME_AUDIO = (*SAME, "chunk", "pool")


class FeatureShardError(ValueError):
    """Feature shards that this run cannot use: another tower's, or made of other frames."""


@dataclass(frozen=True)
class FeatureSettings:
    """What the tower saw of each clip, and what is kept of it.

    fps: frames per second; None: every frame of the source. size, crop: as data.size and data.crop (center or none).
    frames: the middle window of so many frames, as validation sees it; None: the whole clip.
    attention (blocks counted from 0), attention_from, keys: as in `Tower.forward`.
    """

    fps: float | None = 8.0
    size: tuple[int, int] = (224, 224)
    crop: str = "center"
    frames: int | None = None
    attention: tuple[int, ...] = ()
    attention_from: str = "all"
    keys: bool = False

    def __post_init__(self) -> None:
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"--fps {self.fps} must be above 0, or `source`")
        if min(self.size) < 1:
            raise ValueError(f"--size {self.size[0]}x{self.size[1]} must be 1 pixel or more each")
        if self.crop not in ("center", "none"):
            raise ValueError(f"--crop {self.crop!r} is not one of center, none: a cache holds one crop of each clip")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"--frames {self.frames} must be 1 or more; leave it out for whole clips")
        if self.attention_from not in ("all", "cls"):
            raise ValueError(f"--attention-from {self.attention_from!r} is unknown; choose all or cls")


@dataclass(frozen=True)
class FeatureIndex:
    """What index.json says of feature shards.

    tower: its identity, and `stride` and `window`, as plain values. audio: the fields of the audio tower's `Hearing`,
    its identity among them; None where no sound was recorded.
    """

    where: str
    tower: dict[str, Any]
    settings: FeatureSettings
    audio: dict[str, Any] | None = None

    def view(self, view: View, name: str = "") -> View:
        """`view` on these features, under a name of the tower, unchecked."""
        identity = tuple(self.tower[key] for key in SAME)
        name = name or self.tower["name"]
        cached = Cached(name, int(self.tower["window"]), identity, self.settings.attention_from)
        return replace(view, cached=cached)


def hearing_of(tower: Any) -> Hearing:
    """What the loader must know of an audio tower (`vtok.vision.AudioTower`)."""
    who = tower.identity()
    return Hearing(
        name=tower.name,
        tokens=tower.tokens,
        rate=tower.rate,
        chunk=tower.chunk,
        step=tower.step,
        width=tower.embedding_dim,
        dtype=who["dtype"],
        identity=tuple(who[key] for key in SAME_AUDIO),
    )


def audio_facts(tower: Any) -> dict[str, Any]:
    """What index.json says of the audio tower whose features were recorded: its identity, and its `Hearing`."""
    heard = hearing_of(tower)
    return {**tower.identity(), **{key: getattr(heard, key) for key in ("tokens", "rate", "step", "width")}}


def open_features(
    shards: str | Sequence[str], *, root: str | Path = "", cache_dir: str | Path = "", setting: str = "data.shards"
) -> FeatureIndex | None:
    """What the feature shards under `shards` hold; None where they hold videos.

    Raises: FeatureShardError for parts of which only some are features, or that are of different towers or settings.
    """
    parts = [part.strip() for part in (shards.split("::") if isinstance(shards, str) else shards)]
    found = [_read_index(part, str(root), cache_dir) for part in parts]
    first = found[0]
    if not any(found):
        return None
    lacking = [part for part, index in zip(parts, found) if index is None]
    if lacking or first is None:
        raise FeatureShardError(
            f"{setting}: {lacking[0]!r} holds no features, other parts do; run `vtok features` on all of them"
        )
    for index in found[1:]:
        assert index is not None
        check_tower(index.tower, first.tower, of=f"{setting}: {index.where}", other=first.where)
        if replace(index.settings, frames=None) != replace(first.settings, frames=None):
            raise FeatureShardError(
                f"{setting}: {index.where} was made with {index.settings}, {first.where} with {first.settings}; make "
                "all parts with the same settings"
            )
        if index.audio and first.audio:
            check_tower(index.audio, first.audio, of=f"{setting}: {index.where}", other=first.where, same=SAME_AUDIO)
    silent = [index.where for index in found if index is not None and index.audio is None]
    if silent:  # whoever asks for sound is told which part has none
        first = replace(first, audio=None, where=silent[0])
    least = [index.settings.frames for index in found if index is not None and index.settings.frames is not None]
    return replace(first, settings=replace(first.settings, frames=min(least, default=None)))


def _read_index(part: str, root: str, cache_dir: str | Path) -> FeatureIndex | None:
    remote = part.startswith(("https://", "http://"))
    if part.startswith("pipe:") or (remote and part.rstrip("/").endswith(".tar")):
        return None
    if remote:
        if not cache_dir:
            return None  # refused where the shards are listed
        path = fetch(f"{part.rstrip('/')}/index.json", cache_dir)
    else:
        path = Path(root, part, "index.json")
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text())
        if index.get("kind") != KIND:
            return None
        seen = {**index["settings"], "size": tuple(index["settings"]["size"])}
        seen["attention"] = tuple(seen["attention"])
        tower = {name: index["tower"][name] for name in (*SAME, "name", "revision", "stride", "window")}
        audio = index.get("audio")
        if audio is not None:
            wanted = (*SAME_AUDIO, "name", "revision", "tokens", "rate", "step", "width")
            audio = {name: audio[name] for name in wanted}
        return FeatureIndex(part, tower, FeatureSettings(**seen), audio)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FeatureShardError(f"{part}/index.json does not say what its features are ({error!r}); {AGAIN}") from error


def check_tower(
    cached: dict[str, Any], wanted: dict[str, Any], *, of: str, other: str, same: Sequence[str] = SAME
) -> None:
    """Raises FeatureShardError where two identities (`Tower.identity`) are of towers whose features differ.

    The same weights may have two names. of, other: what they are the identities of, for the message. same: what must
    not differ; of audio towers, SAME_AUDIO.
    """
    differ = [f"{name} {cached[name]!r} and {wanted[name]!r}" for name in same if cached[name] != wanted[name]]
    audio, rest = ("audio ", "chunk and pool") if same is SAME_AUDIO else ("", "size")
    if differ:
        raise FeatureShardError(
            f"{of} holds features of {cached['name']!r}, {other} has the {audio}tower {wanted['name']!r}: "
            f"{'; '.join(differ)}. Features of one tower mean nothing to another: set the tower, its layer, dtype and "
            f"{rest} to those of the cache, or run `vtok features` with this one"
        )


def check_sound(sources: Sequence[Sequence[Shard]], *, of: str, needs: str, cache_dir: str | Path = "") -> None:
    """Raises ValueError where clips are to be heard, and none in the first shard of each source has a sound.

    of, needs: what the sources are, and what needs their sound, for the message.
    """
    for source in sources:
        if any(SOUND in sample.members for sample in ShardReader(source[:1], cache_dir=cache_dir).samples(0)):
            return
    raise ValueError(
        f"{of}: no clip in {', '.join(source[0].name for source in sources)} has a .{SOUND}, which {needs} needs: pack "
        "the videos with `vtok shards --audio`, or leave sound out"
    )


def feature_view(
    view: View,
    shards: str | Sequence[str],
    *,
    training: bool,
    tower: Callable[[], Any] | None = None,
    audio: Callable[[], Any] | None = None,
    most_frames: int | None = None,
    root: str | Path = "",
    cache_dir: str | Path = "",
    setting: str = "data.shards",
) -> View:
    """`view` where `shards` hold videos; where they hold features, the view of these that gives the same windows.

    Args:
        training: windows are drawn; else they are those of validation. tower: gives the model's tower, whose features
            they must be, and under whose name the clips bring them; asked for feature shards only. audio: gives the
            model's audio tower, where it hears: clips then bring the sound of the window, or its features. Without a
            tower, the clips bring all that was recorded.
        most_frames: the largest number of frames that is asked of a clip; None: view.num_frames.
    Raises: FeatureShardError for another tower's features, and where the settings ask for what was not recorded.
        ValueError where the model hears and no clip has a sound.
    """
    index = open_features(shards, root=root, cache_dir=cache_dir, setting=setting)
    ears = audio() if audio is not None else None
    if index is None:
        if ears is None:
            return view
        sources = open_sources(shards, apart=True, root=root, cache_dir=cache_dir, setting=setting)
        check_sound(sources, of=f"{setting}={shards!r}", needs=f"model.audio.name={ears.name!r}", cache_dir=cache_dir)
        return replace(view, hearing=hearing_of(ears))
    settings, name = index.settings, index.tower["name"]
    if tower is not None:
        model = tower()
        check_tower(index.tower, model.identity(), of=f"{setting}={shards!r}", other="the model")
        name = model.name
    crop = view.crop if training or view.crop == "none" else "center"
    most = view.num_frames if most_frames is None else most_frames
    window, fps = int(index.tower["window"]), settings.fps
    told = "the source's" if fps is None else fps
    wrong = [
        (tuple(view.size) != settings.size, f"data.size={list(view.size)}", f"{list(settings.size)}"),
        (crop != settings.crop, f"data.crop={crop}", settings.crop),
        (training and view.hflip > 0, f"data.hflip={view.hflip}", "0"),
        (view.map != "", f"data.map={view.map!r}", "''"),
        (view.texts, "data.texts=true", "false"),
        (settings.frames is not None and most > settings.frames, f"{most} frames of a clip", f"{settings.frames}"),
        (fps is not None and view.fps is None, "data.fps=null", f"{told} or less"),
        (fps is not None and (view.fps or 0) > fps * (1 + 1e-9), f"data.fps={view.fps}", f"{told} or less"),
        (window > 1 and view.fps != fps, f"data.fps={view.fps}", f"{told} (frames are seen {window} at once)"),
    ]
    differ = [f"{now} is asked, {there} was recorded" for bad, now, there in wrong if bad]
    if differ:
        raise FeatureShardError(
            f"{setting}={shards!r} holds features of other frames: {'; '.join(differ)}. Set the values of the cache, "
            "or run `vtok features` with these"
        )
    return replace(index.view(view, name), hearing=_recorded_hearing(index, ears, tower, of=f"{setting}={shards!r}"))


def _recorded_hearing(index: FeatureIndex, ears: Any, tower: Any, *, of: str) -> Hearing | None:
    """How what was recorded of the sound is read. Raises: FeatureShardError for another audio tower's features."""
    if ears is not None:
        if index.audio is None:
            raise FeatureShardError(
                f"{of} holds no features of sound ({index.where}), and the model hears with {ears.name!r}: run `vtok "
                "features` with --audio-tower on shards made with `vtok shards --audio`, or train without audio"
            )
        check_tower(index.audio, ears.identity(), of=of, other="the model", same=SAME_AUDIO)
        return hearing_of(ears)
    if index.audio is None or tower is not None:
        return None
    facts = {key: index.audio[key] for key in ("name", "tokens", "rate", "chunk", "step", "width", "dtype")}
    return Hearing(**facts, identity=tuple(index.audio[key] for key in SAME_AUDIO))
