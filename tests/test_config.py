"""The resolved configuration: yaml, overrides, and errors that name the key, the value and the choices."""

from __future__ import annotations

import pytest

from vtok import config as configuration


def write(tmp_path, text: str):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_yaml_then_overrides_then_round_trip(tmp_path):
    path = write(tmp_path, "model: {name: flexible, width: 64}\ndata: {batch_size: 4}\n")
    config = configuration.load(path, ["data.batch_size=8", "objective.nested.mode=pow2"])
    assert (config.model.width, config.data.batch_size, config.objective.nested.mode) == (64, 8, "pow2")
    again = configuration.load(write(tmp_path, configuration.to_yaml(config)))
    assert configuration.flatten(again) == configuration.flatten(config)


def test_base_is_read_first(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {name: flexible, width: 64}\nseed: 3\n")
    config = configuration.load(write(tmp_path, "base: base.yaml\nmodel: {width: 128}\n"))
    assert (config.model.width, config.seed) == (128, 3)


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("model: {name: flexible, widht: 3}", [], "widht.*did you mean 'width'"),
        ("model: {name: flexible}", ["data.batch_sise=3"], "command line.*did you mean 'batch_size'"),
        ("model: {name: flexible, width: wide}", [], "model.width.*'wide'"),
        ("model: {name: flexibel}", [], "choose one of .*'flexible'"),
        ("data: {batch_size: 1}", [], "model.name is missing"),
        ("- 1", [], "expected a mapping"),
        (
            "model: {name: flexible}",
            ["data.shards="],
            "data.shards: .*is left empty: .* data.shards='' for no text",
        ),
        ("model: {name: flexible}", ["data.batch_size="], "left empty: write data.batch_size=VALUE$"),
        ("model: {name: flexible}", ["batch"], "key=value"),
        ("model: {name: flexible, mask: none}", [], "causal_last"),
        ("a: [", [], "not readable as yaml"),
        ("model: {name: flexible}", ["data.size=[1"], r"override 'data.size=\[1': its value is not yaml"),
        ("model: {name: flexible}", ["data.weights=[a]"], r"data.weights\[0\]: Value 'a' .* Float$"),
        ("model: {name: nowhere.at.all}", [], "model.name='nowhere.at.all': there is no module 'nowhere'.*PYTHONPATH"),
    ],
)
def test_errors_name_the_key(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        configuration.load(write(tmp_path, text), overrides)


def test_missing_file_and_untrusted_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such config"):
        configuration.load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="package's families only"):
        configuration.load_family("os.path", trusted=False)
    with pytest.raises(ValueError, match="does not export Config, Model, Objective"):
        configuration.load_family("os.path")
