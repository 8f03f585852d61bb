"""Where an audio tower comes from: a Hub repository or a folder of transformers, its weights hashed before a read.

    whisper                          log-mel of 30 s, the encoder alone        a vector every 20 ms
    audio-spectrogram-transformer    filter banks of 10 s, mean over pitch     every 100 ms
    wav2vec2, hubert, wavlm ...      waveforms through convolutions            every 20 ms, of most

Letters: M chunks in one call, S vectors of a chunk, n samples, D width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vtok.layers.pretrained import commit_of, fetch, weight_files, weights_sha256
from vtok.vision.audio import AudioTower, AudioTowerConfig, Ear
from vtok.vision.bodies import block_index
from vtok.vision.tower import DTYPES

AST = "audio-spectrogram-transformer"
_UNHEARD = ("weight_g", "weight_v")  # old names of a weight norm's parts, which the library renames as it loads


def names_an_audio_tower(name: str) -> bool:
    """Whether `load_audio_tower` would look for weights under this name."""
    return name.startswith("hf:") or (bool(name) and Path(name).is_dir())


def audio_width(config: AudioTowerConfig) -> int:
    """D of a tower's features, read off its configuration alone. Raises: as `load_audio_tower`."""
    return int(_facts(_folder(config, weights=False)[0], config).hidden_size)


def load_audio_tower(config: AudioTowerConfig) -> AudioTower:
    """A frozen audio tower on the CPU, its weights those of the files that were hashed; no code of a repository is run.

    Raises: ImportError without transformers; ValueError for a name, folder or repository that holds no audio tower, for
        other weights than expected, for weights that are incomplete.
    """
    folder, revision = _folder(config, weights=True)
    facts = _facts(folder, config)
    sha256 = weights_sha256(weight_files(folder), config.sha256, key="audio.sha256", name=config.name)
    ear = _Ear(_model(folder, config), _extractor(folder, config), facts, config.name)
    layer = block_index(config.layer, ear.depth, config.name)
    return AudioTower(config, ear, layer=layer, sha256=sha256, revision=revision)


def _folder(config: AudioTowerConfig, *, weights: bool) -> tuple[Path, str]:
    """(folder, commit) that hold the tower."""
    kind, _, rest = config.name.partition(":")
    if kind != "hf" or not rest:
        kind, rest = "", config.name
    if rest and Path(rest).is_dir():
        return Path(rest), ""
    if kind and rest.count("/") == 1 and not rest.startswith((".", "/", "~")):
        files = () if weights else ("config.json",)
        folder = fetch(rest, config.revision, texts=["*.json"], what="audio tower", files=files)
        return folder, commit_of(folder, config.revision)
    raise ValueError(
        f"audio.name={config.name!r} is no folder here and names no audio tower; give hf:USER/REPO, or a folder that "
        "save_pretrained of the model and of its feature extractor wrote"
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("audio towers need transformers: pip install 'vtok[towers]'") from error
    return transformers


def _facts(folder: Path, config: AudioTowerConfig) -> Any:
    """The configuration of an encoder that is read here."""
    try:
        facts = _transformers().AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"audio.name={config.name!r}: no configuration of transformers is there: {error}") from error
    if facts.model_type not in ("whisper", AST) and not getattr(facts, "conv_stride", None):
        raise ValueError(
            f"audio.name={config.name!r} is a {facts.model_type}; the audio towers read here are whisper, {AST} and "
            "those that hear waveforms through convolutions: wav2vec2, hubert, wavlm, data2vec-audio, sew ..."
        )
    if getattr(facts, "add_adapter", None):
        raise ValueError(f"audio.name={config.name!r} ends in an adapter, which changes its rate: give one without")
    return facts


def _model(folder: Path, config: AudioTowerConfig) -> Any:
    try:
        model, report = _transformers().AutoModel.from_pretrained(
            folder, dtype=DTYPES[config.dtype], output_loading_info=True
        )
    except (OSError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"audio.name={config.name!r}: transformers could not load it: {error}") from error
    whole = model.config.model_type == "whisper"
    missing = [name for name in sorted(report["missing_keys"]) if not whole or name.startswith("encoder.")]
    missing = [name for name in missing if not name.endswith(_UNHEARD) and name != "masked_spec_embed"]
    if missing:
        raise ValueError(
            f"{config.name}: {len(missing)} weights of {type(model).__name__} are not in its files, such as "
            f"{missing[0]}: they would be random numbers; is this an audio tower's checkpoint?"
        )
    return model.get_encoder() if whole else model


def _extractor(folder: Path, config: AudioTowerConfig) -> Any:
    try:
        return _transformers().AutoFeatureExtractor.from_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"{config.name} has no usable preprocessor_config.json: {first}") from error


class _Ear(Ear):
    """An encoder of transformers with its feature extractor."""

    def __init__(self, model: Any, extractor: Any, facts: Any, where: str):
        self.model, self._extractor, self._where = model, extractor, where
        told = extractor.to_dict()
        self.facts = {name: value for name, value in told.items() if isinstance(value, (str, int, float, bool, list))}
        self.facts = {name: value for name, value in self.facts.items() if not name.startswith(("_", "processor"))}
        self.rate = int(extractor.sampling_rate)
        self.depth = int(getattr(facts, "encoder_layers", None) or facts.num_hidden_layers)
        self.embedding_dim = int(facts.hidden_size)
        self._kind = facts.model_type if facts.model_type in ("whisper", AST) else "waveform"
        self._least = 400  # samples of a window of the spectrum
        if self._kind == "whisper":
            self.stride, self.longest = 2 * int(extractor.hop_length), int(facts.max_source_positions)
            if extractor.nb_max_frames != 2 * self.longest or extractor.feature_size != facts.num_mel_bins:
                raise ValueError(
                    f"{where}: its feature extractor makes {extractor.feature_size} x {extractor.nb_max_frames} "
                    f"numbers, its encoder takes {facts.num_mel_bins} x {2 * self.longest}"
                )
        elif self._kind == AST:
            side = facts.patch_size if isinstance(facts.patch_size, int) else facts.patch_size[0]
            self.stride = int(facts.time_stride) * self.rate // 100  # a filter bank every 10 ms
            self.longest = (int(facts.max_length) - side) // int(facts.time_stride) + 1
            if extractor.max_length != facts.max_length or extractor.num_mel_bins != facts.num_mel_bins:
                raise ValueError(
                    f"{where}: its feature extractor makes {extractor.max_length} x {extractor.num_mel_bins} numbers, "
                    f"its encoder takes {facts.max_length} x {facts.num_mel_bins}"
                )
        else:
            self.stride, self.longest = math.prod(facts.conv_stride), None
            self._least = 1
            for kernel, stride in zip(reversed(facts.conv_kernel), reversed(facts.conv_stride)):
                self._least = (self._least - 1) * stride + kernel

    def heard_as(self, samples: int) -> int:
        if self._kind != "waveform":
            return 0  # the extractor fills every chunk up to the model's length
        return max(-(-samples // self.rate) * self.rate, self._least)

    def inputs(self, sound: Tensor) -> dict[str, Tensor]:
        how: dict[str, Any] = dict(sampling_rate=self.rate, return_tensors="pt")
        if self._kind == "waveform":
            how |= dict(padding="max_length", max_length=self.heard_as(len(sound)))
        elif len(sound) < self._least:
            sound = torch.nn.functional.pad(sound, (0, self._least - len(sound)))
        made = self._extractor(sound.numpy(), **how)
        names = ("input_features", "input_values", "attention_mask")
        return {name: made[name] for name in names if name in made}

    def run(self, inputs: dict[str, Tensor], layer: int) -> Tensor:
        model = cast(Any, self.model)
        if self._kind != "waveform":
            inputs.pop("attention_mask", None)
        last = layer == self.depth - 1
        out = model(**inputs, output_hidden_states=not last, return_dict=True)
        # counted from the end: whether the embeddings come first in hidden_states depends on the model
        vectors = out.last_hidden_state if last else out.hidden_states[layer - self.depth]
        return self._over_pitch(vectors) if self._kind == AST else vectors

    def _over_pitch(self, vectors: Tensor) -> Tensor:
        """[M, 2 + pitch x time, D] -> the mean over pitch [M, time, D]; the first two are a class's and a teacher's."""
        assert self.longest is not None
        grid = vectors[:, 2:].unflatten(1, (-1, self.longest))
        return grid.to(torch.float32).mean(1).to(vectors.dtype)
