"""What an export's config.json says becomes the configuration that was exported, for every family and form."""

from __future__ import annotations

import dataclasses
import json

import pytest
from test_contract import each_form, make_config

from vtok.config import load_family
from vtok.families import vqtoken
from vtok.quantize import QuantizerConfig
from vtok.shipping.hf import build_config


@each_form
def test_a_configuration_comes_back_from_its_json(case):
    config = make_config(*case)
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert build_config(load_family(case[0]).Config, values) == config


def test_a_node_that_may_be_left_out_comes_back_too():
    sizes = dict(in_dim=8, embedding_dim=8, embedding_rms=0.5, num_tokens=4)
    config = vqtoken.Config(**sizes, codebook=QuantizerConfig(name="fsq", levels=[3, 3]))
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    back = build_config(vqtoken.Config, values)
    assert back == config and vqtoken.Model(back).quantizer is not None
    assert build_config(vqtoken.Config, values | {"codebook": None}).codebook is None
    with pytest.raises(ValueError, match=r"model\.codebook has unknown keys \['level'\]"):
        build_config(vqtoken.Config, values | {"codebook": {"level": [3]}})
