"""Frozen image and video towers of timm and transformers: a Clip in, `Features` out.

    timm:NAME  hf:USER/REPO  a folder            names and weights of the library's own kind, files hashed
            |
    8-bit frames -> resize, crop, normalise      as the tower's own configuration says (`Preprocess`)
            |
    blocks, `frames_per_call` frames at a time   in the dtype asked, without gradients
            |
    patches [B, T, N, D], grid, frame vectors    and attention received per patch, keys, where asked

A tower is no nn.Module: whoever holds one holds a reference, so it adds nothing to a state_dict, to an optimizer or to
an engine, a deep copy shares it, and a pickle holds its name and hash alone.

    preprocess.py  what is done to frames        bodies.py  the libraries behind one call
    load.py        names, folders, hashes        tower.py   Tower, TowerConfig
    resample.py    features on another grid
    audio.py       AudioTower, AudioTowerConfig     audio_load.py  its names, folders, libraries
"""

from vtok.vision.audio import AudioTower, AudioTowerConfig
from vtok.vision.audio_load import audio_width, load_audio_tower, names_an_audio_tower
from vtok.vision.load import load_tower
from vtok.vision.preprocess import Preprocess
from vtok.vision.resample import resample_features
from vtok.vision.tower import Tower, TowerConfig

__all__ = [
    "AudioTower",
    "AudioTowerConfig",
    "Preprocess",
    "Tower",
    "TowerConfig",
    "audio_width",
    "load_audio_tower",
    "load_tower",
    "names_an_audio_tower",
    "resample_features",
]
