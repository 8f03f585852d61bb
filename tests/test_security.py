"""docs/security.md holds: files from elsewhere run no code, are read and nothing else, and have limits."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from miniature import clip, movie, write_index, write_tar
from test_export import make_run

import vtok
from vtok import config as vtok_config
from vtok import export as shipping
from vtok.coding import stream_header
from vtok.coding.tokenize import trained_data
from vtok.data import sources, strict
from vtok.data.decode import iter_frames
from vtok.data.sources import BrokenSample, ShardReader, open_sources, scan
from vtok.data.strict import DecodeError
from vtok.data.verify import _samples as shard_samples
from vtok.data.verify import verify
from vtok.evaluate import load_model
from vtok.loading import MAX_CONFIG, read_training

ROOT = Path(__file__).resolve().parents[1]
CODE = [
    path
    for folder in ("vtok", "data", "slurm", "soak", "examples", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
] + [ROOT / "train.py", ROOT / "eval.py"]
# What runs or unpacks what it is given. pickle itself is imported for the names of its errors alone.
FORBIDDEN = {
    "eval", "exec", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open",
    "joblib.load", "dill.load", "dill.loads", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "shutil.unpack_archive", "torch.hub.load", "runpy.run_path", "runpy.run_module",
}  # fmt: skip
METHODS = {"extractall", "extract"}  # of tar and zip archives: members are read by their place, never unpacked
# A shell for `pipe:` shards, which the user's own configuration names.
ALLOWED = {"vtok/data/sources.py": {"shell=True"}}


def calls(source: str) -> list[tuple[str, int]]:
    """(what, line) of every call in a Python source that could run or unpickle what it is given."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = {keyword.arg: keyword.value for keyword in node.keywords}
        safe = {key: isinstance(value, ast.Constant) and value.value for key, value in words.items()}
        last = name.rpartition(".")[2]
        if name == "torch.load" and safe.get("weights_only") is not True:
            found.append(("torch.load", node.lineno))
        if last == "load" and name.startswith(("np.", "numpy.")) and safe.get("allow_pickle", None) is not False:
            found.append((name, node.lineno))
        if name in FORBIDDEN or last in METHODS and isinstance(node.func, ast.Attribute):
            found.append((name, node.lineno))
        found += [("trust_remote_code", node.lineno)] if safe.get("trust_remote_code") else []
        found += [("shell=True", node.lineno)] if safe.get("shell") else []
    return found


def test_no_source_runs_or_unpickles_what_it_is_given():
    assert len(CODE) > 150
    bad, unused = [], {(name, what) for name, each in ALLOWED.items() for what in each}
    for path in CODE:
        name = str(path.relative_to(ROOT))
        for what, line in calls(path.read_text(encoding="utf-8")):
            unused.discard((name, what))
            if what not in ALLOWED.get(name, set()):
                bad.append(f"{name}:{line}: {what}")
    assert not bad, bad
    assert not unused, "allowed, and no longer done"


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=flag)",
        "pickle.load(f)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "eval(s)",
        "exec(s)",
        "tar.extractall(d)",
        "subprocess.run(s, shell=True)",
        "kind.from_pretrained(n, trust_remote_code=True)",
        "yaml.load(s)",
        "os.system(s)",
    ],
)
def test_the_rule_itself_can_fail(text):
    assert calls(text)
    assert not calls("model.eval(); torch.load(p, weights_only=True); np.load(f, allow_pickle=False); load(p)")


def test_pickle_is_imported_for_its_error_alone():
    for path in CODE:
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"\bpickle\.(?!UnpicklingError\b)\w+", text), path
        assert not re.search(r"^\s*from (pickle|dill|cloudpickle|joblib|marshal) import", text, re.MULTILINE), path


# exports


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("security")
    return shipping.export(make_run(folder / "run"), folder / "export", entropy=False)


def training(exported: Path, folder: Path, **changes: object) -> Path:
    """A copy of an export whose training.yaml says something else."""
    copy = folder / "export"
    copy.mkdir()
    for path in exported.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    values = vtok_config.read_plain(copy / "training.yaml")
    for key, value in changes.items():
        node = values
        *above, last = key.split("__")
        for name in above:
            node = node[name]
        node[last] = value
    (copy / "training.yaml").write_text(json.dumps(values))
    return copy


def test_an_export_runs_no_command(exported, tmp_path, caplog):
    """Shards named by a shell command are the user's own to name: in a stranger's training.yaml they are left out."""
    bomb = f"pipe:touch {tmp_path / 'ran'}"
    copy = training(exported, tmp_path, data__shards=bomb, data__val_shards=bomb, data__cache_dir=str(tmp_path / "c"))
    _, data, _ = load_model(str(copy))
    assert (data.shards, data.val_shards, data.cache_dir) == ("", "", "")
    assert caplog.text.count("is a shell command, which is not run") == 2
    assert trained_data(copy).shards == ""
    assert not (tmp_path / "ran").exists() and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__root": "${oc.env:HOME}"}, "may not refer to other values or to the environment"),
        ({"base": "/etc/passwd"}, "base='/etc/passwd' would read another file"),
    ],
)
def test_what_an_export_was_trained_with_is_plain_values(exported, tmp_path, changes, message):
    copy = training(exported, tmp_path, **changes)
    for reads in (read_training, trained_data, lambda path: load_model(str(path))):
        with pytest.raises(ValueError, match=message):
            reads(copy)


def test_an_export_names_families_of_the_package_only(exported, tmp_path, monkeypatch):
    (tmp_path / "strange_module.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    copy = training(exported, tmp_path, model__name="strange_module.inner")
    facts = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**facts, "family": "strange_module.inner"}))
    with pytest.raises(ValueError, match="package's families only"):
        vtok.load(str(copy))
    from vtok.evaluate import objective_of

    with pytest.raises(ValueError, match="package's families only"):
        objective_of(str(copy))
    for name in ("../flexible", "a b.c", ".flexible", "flexible."):
        with pytest.raises(ValueError, match="is not a family"):
            vtok_config.load_family(name)
    assert not (tmp_path / "ran").exists()


def test_a_model_does_not_read_the_environment(exported, tmp_path):
    copy = training(exported, tmp_path)
    facts = json.loads((copy / "config.json").read_text())
    facts["model"]["norm"] = "${oc.env:HOME}"
    (copy / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"norm='\$\{oc.env:HOME\}'"):
        vtok.load(str(copy))


@pytest.mark.parametrize("name", ["config.json", "training.yaml"])
def test_json_and_yaml_of_an_export_are_limited(exported, tmp_path, name):
    copy = training(exported, tmp_path)
    (copy / name).write_text((copy / name).read_text() + " " * (MAX_CONFIG + 1))
    with pytest.raises(ValueError, match=rf"{name} has \d+ bytes, (more than|above the limit)"):
        vtok.load(str(copy)) if name == "config.json" else read_training(copy)


def test_yaml_that_grows_is_refused_before_it_does(tmp_path):
    levels = ["l0: &a0 [1, 2]"] + [f"l{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    path = tmp_path / "c.yaml"
    path.write_text("\n".join(levels))
    with pytest.raises(ValueError, match=rf"stand for \d+ values, above the limit of {vtok_config.MAX_NODES}"):
        vtok_config.load(path)
    path.write_text("a: &a\n  b: *a\n")
    with pytest.raises(ValueError, match="not readable as yaml"):
        vtok_config.load(path)
    path.write_text("data: &d {num_frames: 4}\nmodel: {name: flexible}\n")
    assert vtok_config.load(path).data.num_frames == 4


def test_yaml_tags_make_nothing(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"model: {{name: flexible}}\nname: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n")
    with pytest.raises(ValueError, match="not readable as yaml"):
        vtok_config.load(path)
    assert not (tmp_path / "ran").exists()


# pickles


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_reader_of_weights_unpickles(tmp_path):
    from vtok.layers.weights import read_weights
    from vtok.loading import load_run
    from vtok.metrics import frechet
    from vtok.training.strategy import AtomicCheckpointIO, describe

    path = tmp_path / "weights.pth"
    torch.save({"x": Bomb(tmp_path / "exploded")}, path)
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "last.ckpt").write_bytes(path.read_bytes())
    for read in (
        lambda: read_weights(path, "", "any"),
        lambda: describe(path),
        lambda: AtomicCheckpointIO().load_checkpoint(path),
        lambda: load_run(run),
        lambda: frechet.read_state(path, key="eval.fid_weights"),
    ):
        with pytest.raises(Exception, match="(?i)weights.only|unpickl|not a checkpoint|not a readable|sha256"):
            read()
    assert not (tmp_path / "exploded").exists()


# shards


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("/etc/passwd.mp4", tarfile.REGTYPE, ""),
        ("../x.mp4", tarfile.REGTYPE, ""),
        ("a/../../x.mp4", tarfile.REGTYPE, ""),
        ("..\\x.mp4", tarfile.REGTYPE, ""),
        ("x.mp4", tarfile.SYMTYPE, "/etc/passwd"),
        ("x.mp4", tarfile.LNKTYPE, "../secret"),
        ("x.mp4", tarfile.CHRTYPE, ""),
        ("x.mp4", tarfile.BLKTYPE, ""),
        ("x.mp4", tarfile.FIFOTYPE, ""),
        ("x.mp4", tarfile.CONTTYPE, ""),
        ("x.mp4", tarfile.GNUTYPE_SPARSE, ""),
        ("x.mp4", b"Z", ""),
    ],
)
def test_only_plain_files_with_relative_names_are_taken(tmp_path, name, kind, link):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(member(name, kind, link))
    found = scan(path)
    assert kind == tarfile.CONTTYPE or found and all(sample.problem for sample in found), found
    assert not list(tmp_path.glob("**/passwd*"))


def test_nothing_of_a_tar_lands_on_disk(tmp_path):
    folder = tmp_path / "shards"
    write_index(folder, {write_tar(folder / "a.tar", clip("good") + clip("../evil")).name: 2})
    before = sorted(p for p in tmp_path.rglob("*"))
    reader = ShardReader(open_sources(str(folder))[0])
    assert {s.key: bool(s.problem) for s in reader.samples(0)} == {"good": False, "../evil": True}
    assert verify(folder, progress=False)
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_members_and_indices_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 100)
    monkeypatch.setattr(sources, "MAX_MEDIA_BYTES", 1000)
    path = write_tar(tmp_path / "a.tar", [("a.mp4", bytes(1001)), ("a.json", b'"' + b"x" * 100 + b'"')])
    (sample,) = scan(path)
    reader = ShardReader([sources.Shard(str(path), "a.tar")])
    for suffix, limit in (("mp4", 1000), ("json", 100)):
        with pytest.raises(BrokenSample, match=rf"\.{suffix} has \d+ bytes, above the limit of {limit}"):
            reader.read(sample, suffix)
    write_index(tmp_path, {"a.tar": 1})
    monkeypatch.setattr(sources, "MAX_INDEX_BYTES", 10)
    with pytest.raises(ValueError, match="has over 10 bytes, the limit of an index"):
        open_sources(str(tmp_path))


def claiming(kind: bytes, size: int) -> bytes:
    """A header of a tar that says what follows has so many bytes; a file of holes may well have them."""
    return member("././@LongLink", kind, size=size).tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_headers_of_a_tar_are_limited(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", clip("good"))
    whole = path.read_bytes()
    with path.open("wb") as file:
        file.write(whole[: -(-len(whole.rstrip(b"\0")) // 512) * 512] + claiming(kind, 3 << 30))
        file.truncate(file.tell() + (3 << 30))  # of holes: the disk holds none of it
    tracemalloc.start()
    found = scan(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 16 << 20
    assert "above the limit of 1048576" in str(found[-1].problem), found
    folder = tmp_path / "shards"
    folder.mkdir()
    path.rename(folder / "a.tar")
    with pytest.raises(tarfile.ReadError, match="above the limit"):
        list(shard_samples(folder / "a.tar"))


def test_headers_of_a_tar_that_pile_up_are_limited(tmp_path):
    many = tmp_path / "many.tar"
    with tarfile.open(many, "w", format=tarfile.PAX_FORMAT, pax_headers={f"k{i}": "v" for i in range(65)}) as tar:
        tar.addfile(member("a.mp4"))
    assert "more than 64 global PAX records" in str(scan(many)[-1].problem)
    deep = tmp_path / "deep.tar"
    deep.write_bytes(b"".join(claiming(tarfile.GNUTYPE_LONGNAME, 1) + b"x".ljust(512, b"\0") for _ in range(3000)))
    assert "RecursionError" in str(scan(deep)[-1].problem)


def test_a_download_ends_where_the_index_says(tmp_path):
    with pytest.raises(OSError, match="gives more than the 1000 bytes it may have"):
        sources.fetch("pipe:cat /dev/zero # a.tar", tmp_path, num_bytes=1000, tries=1)
    assert not list(tmp_path.glob("*.tar*part"))


@pytest.mark.parametrize(
    "text", ['{"shards": [{"name": "a.tar", "samples": 1e999, "bytes": 1}]}', "[" * 100_000, "\xff"]
)
def test_an_index_from_elsewhere_is_an_error_in_words(tmp_path, text):
    write_tar(tmp_path / "a.tar", clip("a"))
    (tmp_path / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="index.json is not an index of shards"):
        open_sources(str(tmp_path))


@pytest.mark.parametrize("text", ["[" * 100_000, "5", '["caption"]', '"caption captions label"'])
def test_verify_takes_any_json(tmp_path, text):
    folder = tmp_path / "train"
    path = write_tar(folder / "a.tar", [("a.mov", movie()), ("a.json", text.encode())])
    write_index(folder, {path.name: 1})
    assert any("json" in problem for problem in verify(folder, progress=False))


def test_frames_are_limited_whatever_a_header_says(monkeypatch):
    monkeypatch.setattr(strict, "MAX_FRAME_PIXELS", 100)
    with pytest.raises(DecodeError, match="above the limit of 100 pixels"):
        with strict.StrictVideo(movie(), max_frame_pixels=strict.MAX_FRAME_PIXELS):
            pass


def test_no_video_opens_another_file(tmp_path):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(movie(container="mov"))
    for text in (f"ffconcat version 1.0\nfile {secret}\n", f"#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n"):
        with pytest.raises(DecodeError):
            list(iter_frames(text.encode()))


# .vtok


def test_headers_of_vtok_files_are_limited():
    from fractions import Fraction

    facts = {"model_id": "m", "key": bytes(8), "fps": Fraction(1), "codebook_sizes": (2,)}
    with pytest.raises(ValueError, match=f"above the limit of {stream_header.MAX_FRAME_PIXELS}; encode at a smaller"):
        stream_header.Header(size=(1 << 20, 1 << 20), **facts)
    from vtok.coding import bitstream
    from vtok.coding.entropy import varint

    claims = stream_header.MAGIC + bytes([stream_header.VERSION]) + varint(bitstream.MAX_HEADER + 1)
    with pytest.raises(bitstream.DamagedFile, match="its header claims 65537 bytes"):
        bitstream.Reader(io.BytesIO(claims + bytes(1000)))


def test_every_limit_of_the_page_is_the_code_s():
    text = (ROOT / "docs" / "security.md").read_text()
    from vtok.coding import bitstream, records

    assert strict.MAX_FRAME_PIXELS == stream_header.MAX_FRAME_PIXELS == 1 << 28 and "2^28 (16384 x 16384)" in text
    assert vtok_config.DataConfig().max_pixels == stream_header.MAX_STEP_PIXELS == 1 << 31
    assert sources.MAX_TEXT_BYTES == 8 << 20 and sources.MAX_MEDIA_BYTES == 4 << 30
    assert sources.MAX_TAR_HEADER_BYTES == 1 << 20 and sources.MAX_TAR_GLOBALS == 64
    assert sources.MAX_INDEX_BYTES == 256 << 20 and MAX_CONFIG == vtok_config.MAX_YAML == 1 << 20
    assert vtok_config.MAX_NODES == 131072 and bitstream.MAX_HEADER == 64 << 10
    assert records.MAX_RECORD == 1 << 24 and records.MAX_GROUPS == 1 << 16
