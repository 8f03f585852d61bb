"""What ships: runs become folders, folders the same model again, with vtok and without it, and nothing else loads."""

import hashlib
import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vtok
from vtok import config as vtok_config
from vtok import export as shipping
from vtok.data.encode import write_video
from vtok.loading import ExportError, load_run, model_id, weights_sha256
from vtok.types import Clip

TINY = {
    "flexible": {
        "name": "flexible",
        "num_frames": 4,
        "size": [16, 16],
        "patch": [2, 8, 8],
        "width": 16,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "num_heads": 2,
        "num_tokens": 4,
    },
    "discrete": {
        "name": "discrete",
        "num_frames": 3,
        "size": [16, 16],
        "stride": [2, 4, 4],
        "latent_channels": 6,
        "conv": {"width": 8, "mult": [1, 2, 2], "num_res_blocks": 1, "mid_blocks": 1, "num_heads": 2},
    },
}
BLOCKS = {"mask": "time_block_causal_last", "blocks": 2}
VQ = {"quantizer": {"name": "vq", "codebook_size": 512, "dim": 4}}
TEACHER = {"head": "teacher", "teacher_config": {k: v for k, v in TINY["flexible"].items()}}


def video(frames=5, height=16, width=16, seed=0):
    """uint8 [2, 3, T, H, W]: patches of one colour each, changing with every frame."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (2, 3, frames, 3, 3), generator=generator).float()
    return torch.nn.functional.interpolate(colours, size=(frames, height, width)).to(torch.uint8)


def clip(**keywords):
    pixels = video(**keywords)
    return Clip(keys=["a", "b"], video=pixels).as_float()


def make_run(folder: Path, *, family="flexible", seed=0, ema=False, shards="", **model) -> Path:
    """A run directory as training leaves it: config.yaml and a checkpoint with random weights."""
    values = {
        "name": folder.name,
        "out": str(folder.parent),
        "model": {**TINY[family], **model},
        "data": {
            "num_frames": 4,
            "size": [16, 16],
            "shards": shards,
            "fps": None,
            "crop": "center",
            "val_batch_size": 2,
        },
    }
    config = vtok_config.loads(values)
    torch.manual_seed(seed)
    net = vtok_config.load_family(family).Model(config.model)
    with torch.no_grad():
        # An untrained model's first attention may make every id the same. By name: whatever order weights are made in.
        for name, parameter in net.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:  # gains of norms, biases
                parameter.copy_(0.1 * noise + name.endswith("weight"))
        for name, buffer in net.named_buffers():
            if name.endswith("_codebook.embed"):
                buffer.copy_(torch.nn.functional.normalize(torch.randn_like(buffer), dim=-1))
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(vtok_config.to_yaml(config))
    checkpoint = {"state_dict": {f"model.{k}": v for k, v in net.state_dict().items()}}
    checkpoint["state_dict"]["objective.discriminator.weight"] = torch.zeros(3)
    if ema:
        checkpoint["ema"] = {k: v + 0.25 for k, v in net.named_parameters()}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipping")
    run = make_run(folder / "run")
    return run, shipping.export(run, folder / "export", entropy=False)


# --- there and back ---


@pytest.mark.parametrize("changes", [{}, BLOCKS, VQ, TEACHER, {"registers": "pyramid"}, {"dropped": "cut"}], ids=str)
def test_an_export_encodes_and_decodes_as_the_run(tmp_path, changes):
    run = make_run(tmp_path / "run", **changes)
    model, config = load_run(run)
    assert config.model.num_tokens == 4 and not model.training
    back = vtok.load(str(shipping.export(run, tmp_path / "export", entropy=False)))
    assert not back.training
    with torch.no_grad():
        for budget in (None, 1, 3):
            want, got = model.encode(clip(), budget=budget), back.encode(clip(), budget=budget)
            assert torch.equal(want.indices, got.indices) and torch.equal(want.embeddings, got.embeddings)
            assert torch.equal(model.decode(want, size=(16, 16)), back.decode(got, size=(16, 16)))
    assert len(torch.unique(model.encode(clip()).indices)) > 4, "ids that are all alike prove nothing"


def test_the_folder_holds_what_the_design_says(exported):
    _, folder = exported
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "model.safetensors", "training.yaml", "README.md", "modeling_vtok.py"
    }  # fmt: skip
    facts = json.loads((folder / "config.json").read_text())
    state = {k.removeprefix("model."): v for k, v in load_file(folder / "model.safetensors").items()}
    assert facts["weights_sha256"] == weights_sha256(state).hex()
    assert facts["model_id"] == model_id("flexible", facts["model"], weights_sha256(state))
    assert facts["model_id"].startswith("flexible-")
    assert not any("objective" in name or "discriminator" in name for name in state)
    again = vtok_config.load(folder / "training.yaml")
    assert vtok_config.to_dict(again.model) == facts["model"]


def test_weights_sha256_is_the_documented_one():
    state = {"b": torch.tensor([1, 2], dtype=torch.int64), "a": torch.tensor([[1.5]])}
    digest = hashlib.sha256()
    digest.update(b"a\nfloat32\n[1, 1]\n" + torch.tensor([1.5]).numpy().tobytes())
    digest.update(b"b\nint64\n[2]\n" + torch.tensor([1, 2]).numpy().tobytes())
    assert weights_sha256(state) == digest.digest()
    assert weights_sha256({**state, "a": torch.tensor([1.5])}) != digest.digest()


def test_averaged_weights_are_preferred(tmp_path):
    run = make_run(tmp_path / "run", ema=True)
    averaged, raw = load_run(run)[0], load_run(run, ema=False)[0]
    assert torch.allclose(averaged.patch_in.weight, raw.patch_in.weight + 0.25)


def test_best_is_preferred_and_last_on_request(tmp_path):
    run = make_run(tmp_path / "run", seed=1)
    other = make_run(tmp_path / "other", seed=2)
    (other / "checkpoints" / "last.ckpt").rename(run / "checkpoints" / "best.ckpt")
    best, last = load_run(run)[0], load_run(run, which="last")[0]
    assert not torch.equal(best.patch_in.weight, last.patch_in.weight)
    assert torch.equal(best.patch_in.weight, load_run(make_run(tmp_path / "third", seed=2))[0].patch_in.weight)


def test_an_earlier_export_is_replaced_and_nothing_else_is(tmp_path, exported):
    run, _ = exported
    out = shipping.export(run, tmp_path / "export", entropy=False)
    (out / "stale.txt").write_text("x")
    shipping.export(run, out, entropy=False)
    assert not (out / "stale.txt").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="exists and is not an export"):
        shipping.export(run, mine, entropy=False)
    assert (mine / "thesis.tex").read_text() == "years of work"
    assert not list(tmp_path.glob(".*part*"))


def test_the_model_card_is_valid_for_the_hub_and_holds_the_table(tmp_path):
    from huggingface_hub import ModelCard

    run = make_run(tmp_path / "run", shards="shards/train")
    rows = [
        {"method": "flexible", "budget": 4, "tokens_mean": 4.0, "bits_mean": 63.86, "psnr_db": 21.4567, "ssim": None},
        {
            "method": "mean_colour",
            "budget": None,
            "tokens_mean": None,
            "bits_mean": 16.0,
            "psnr_db": 14.0,
            "ssim": None,
        },
    ]
    (run / "eval").mkdir()
    (run / "eval" / "eval.json").write_text(
        json.dumps({"schema": 1, "clips": 59, "shards": "shards/val", "rows": rows})
    )
    start = {
        "command": ["/opt/me/python", "/opt/me/train.py", "demo.yaml"],
        "gpus": [],
        "cpu_count": 2,
        "commit": "abc",
    }
    (run / "environment.json").write_text(json.dumps({"starts": [start]}))
    (run / "metrics.jsonl").write_text('{"step": 20}\n{"step": 137, "val/loss": 1.0}\n{"step": 2')
    text = (shipping.export(run, tmp_path / "export", entropy=False, licence="cc-by-4.0") / "README.md").read_text()
    facts = ModelCard(text).data.to_dict()
    assert facts["license"] == "cc-by-4.0" and facts["library_name"] == "transformers"
    assert {"vtok", "custom_code"} <= set(facts["tags"])
    assert "| flexible | 4 | 4 | 63.86 | 21.46 |" in text and "| mean_colour |  |  | 16 | 14 |" in text
    assert "59 clips of `shards/val`" in text and "`python train.py demo.yaml`" in text and "/opt/me" not in text
    assert "- 137 steps of" in text, "the steps that were made, not those that were allowed"
    assert "2 CPU cores" in text and "shards/train" in text and "15.966 bits" in text


# --- entropy ---


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A tar of five moving clips, and one member that is not a video."""
    import io
    import tarfile

    folder = tmp_path_factory.mktemp("shards")
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for i in range(6):
            data = io.BytesIO()
            frames = torch.randint(0, 256, (6, 24, 32, 3), generator=torch.Generator().manual_seed(i)).to(torch.uint8)
            write_video(data, frames, fps=8)
            payload = data.getvalue() if i < 5 else b"not a video at all"
            for name, content in ((f"clip{i}.mp4", payload), (f"clip{i}.json", b'{"caption": "noise"}')):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(folder / "shard-{000000..000000}.tar")


def test_the_entropy_model_is_fitted_on_training_clips_and_shipped(tmp_path, shards):
    run = make_run(tmp_path / "run", shards=shards)
    out = shipping.export(run, tmp_path / "export")
    model = vtok.load(out)
    static = model.shipped.entropy
    assert static.index_factors == ((8, 8, 8, 5, 5, 5),) and static.max_rank == 4
    assert json.loads((out / "config.json").read_text())["entropy_sha256"] == static.sha256.hex()
    config = load_run(run)[1]
    batches = list(shipping.training_clips(config, limit=100))
    assert [len(b) for b in batches] == [2, 2, 1], "five good clips in batches of two; the broken one is left out"
    tokens = [model.encode(b.as_float()) for b in batches]
    bits, nominal = (
        sum(float(x.sum()) for x in xs) for xs in ([static.bits(t) for t in tokens], [t.bits for t in tokens])
    )
    assert bits < nominal
    assert "entropy.safetensors" in (out / "README.md").read_text()


def test_without_shards_the_export_says_that_it_has_no_entropy_model(tmp_path, caplog):
    out = shipping.export(make_run(tmp_path / "run", shards="/nowhere/at/all"), tmp_path / "export")
    assert not (out / "entropy.safetensors").exists()
    assert "no static entropy model" in (out / "README.md").read_text() and "/nowhere" in caplog.text


# --- what must not load ---


def damage(folder, tmp_path, name, change):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy / name)
    return copy


def edit_json(**changes):
    def apply(path):
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in {**facts, **changes}.items() if v != "drop"}))

    return apply


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", Path.unlink, "no config.json"),
        ("config.json", lambda p: p.write_text("{"), "is not json"),
        ("config.json", lambda p: p.write_text("[" * 100_000), "is not json"),
        ("config.json", lambda p: p.write_text("[]"), "not a vtok export"),
        ("config.json", edit_json(model_type="bert"), "type 'bert'"),
        ("config.json", edit_json(format=2), "install a newer vtok"),
        ("config.json", edit_json(model_id="drop"), "lacks model_id"),
        ("config.json", edit_json(family="os.path"), "package's families only"),
        ("config.json", edit_json(family="nope"), "not a family; choose one of"),
        ("config.json", edit_json(model={"width": 16, "depth": 3}), "depth"),
        ("config.json", edit_json(weights_sha256="00"), "weights are not those .* stated 00"),
        ("config.json", edit_json(model_id="flexible-000000000000"), "config.json: the weights are as stated.*edited"),
        ("model.safetensors", Path.unlink, "missing"),
        ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-10]), "damaged, or not a safetensors"),
        ("model.safetensors", lambda p: p.write_bytes(b"\x80\x04evil pickle"), "damaged, or not a safetensors"),
        ("model.safetensors", flip, "damaged or mixed up"),
        ("model.safetensors", lambda p: save_file({"x": torch.zeros(2)}, p), "names that vtok does not write"),
    ],
)
def test_unusable_exports_say_why(exported, tmp_path, name, change, message):
    with pytest.raises(ValueError, match=message):
        vtok.load(damage(exported[1], tmp_path, name, change))


def test_things_that_are_no_export_say_so(tmp_path):
    for missing in (str(tmp_path / "nothing"), "./nothing", "nothing"):
        with pytest.raises(ExportError, match="no export at"):
            vtok.load(missing)
    with pytest.raises(ExportError, match="no config.json"):
        vtok.load(tmp_path)
    with pytest.raises(ExportError, match="no config.yaml"):
        load_run(tmp_path)
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "last.ckpt").write_bytes(b"garbage")
    with pytest.raises(ExportError, match="not a readable checkpoint"):
        load_run(run)
    (run / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(ExportError, match="no checkpoint yet"):
        load_run(run)


def test_loading_never_unpickles_nor_runs_the_folder(exported, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    def poison(path):
        path.write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
        torch.save({"x": Bomb()}, path.parent / "pytorch_model.bin")

    vtok.load(damage(exported[1], tmp_path, "modeling_vtok.py", poison))
    run = make_run(tmp_path / "run")
    torch.save({"state_dict": {}, "hyper_parameters": Bomb()}, run / "checkpoints" / "last.ckpt")
    with pytest.raises(ExportError, match="not a readable checkpoint"):
        load_run(run)
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "ran").exists()
