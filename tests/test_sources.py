"""The list of shards, local copies of remote ones, and what the headers of a tar give away."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import re
import tarfile
import threading
from pathlib import Path

import pytest
from miniature import SMALL, clip, make_shards, movie, stream, take, write_tar

from vtok.data import sources
from vtok.data.pipeline import training_batches
from vtok.data.sources import Shard, ShardReader, expand_braces, open_sources, scan
from vtok.data.view import View


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """5 shards x 6 clips, with an index."""
    return make_shards(tmp_path_factory.mktemp("corpus"), 5, 6)


# ---- the shard list


@pytest.mark.parametrize("claim", sources.CLAIMS)
def test_a_folder_that_is_still_being_made_is_no_data(tmp_path, claim):
    """One part of it failed, say: its clips would be missing without a word."""
    folder = make_shards(tmp_path / "out" / "train", 2, 1)
    (folder / "index.json").rename(tmp_path / "index.json")
    assert len(open_sources(str(folder))[0]) == 2, "somebody's tars"
    for where in (folder, folder.parent):
        (where / claim).touch()
        with pytest.raises(ValueError, match=f"data.shards=.* has no index.json, and .*/{claim} says .*again"):
            open_sources(str(folder))
        (where / claim).rename(tmp_path / claim)
    (folder / claim).touch()
    (tmp_path / "index.json").rename(folder / "index.json")
    assert len(open_sources(str(folder))[0]) == 2


def test_claims_are_those_of_the_commands_that_make_folders():
    root = Path(__file__).parents[1] / "vtok"
    texts = [path.read_text() for path in root.rglob("*.py") if path.name != "sources.py"]
    named = {name for text in texts for name in re.findall(r'claim="(\w+\.json)"|out / "(\w+ing\.json)"', text)}
    assert {one or other for one, other in named} == set(sources.CLAIMS)


def test_brace_expansion_keeps_padding_and_multiplies():
    assert expand_braces("a-{08..10}.{x,y}") == ["a-08.x", "a-08.y", "a-09.x", "a-09.y", "a-10.x", "a-10.y"]
    with pytest.raises(ValueError, match="counts downwards"):
        expand_braces("{3..1}")


def test_sources_by_folder_pattern_list_and_root(corpus):
    names = [f"c-{i:03d}.tar" for i in range(5)]
    for given in (str(corpus), f"{corpus}/c-{{000..004}}.tar", f"{corpus}/c-*.tar", [f"{corpus}/{n}" for n in names]):
        assert [shard.name for shard in open_sources(given)[0]] == names
    assert [shard.samples for shard in open_sources(str(corpus))[0]] == [6] * 5
    assert len(open_sources("c-{000..001}.tar", root=corpus)[0]) == 2
    two = open_sources(f"{corpus}/c-000.tar::{corpus}/c-001.tar", weights=[1, 3])
    assert [[shard.name for shard in part] for part in two] == [["c-000.tar"], ["c-001.tar"]]


@pytest.mark.parametrize(
    ("shards", "keywords", "message"),
    [
        ("x-{0..9}.tar", {}, r"data\.shards='x-\{0\.\.9\}\.tar' matched 0 files under .*check data\.root or run"),
        ("c-{000..009}.tar", {}, r"5 of 10 shards are missing, e\.g\. .*c-005\.tar"),
        ("", {}, "names no shards"),
        ("c-000.tar::", {}, "names no shards"),
        ("c-000.tar::c-000.tar", {}, r"more than once; use data\.weights"),
        ("c-000.tar", {"weights": [1.0, 2.0]}, "2 entries for 1 sources"),
        ("c-000.tar::c-001.tar", {"weights": [1.0, 0.0]}, "must all be above 0"),
        ("https://127.0.0.1:1/{0..3}.tar", {}, "set data.cache_dir"),
    ],
)
def test_bad_sources_are_named(corpus, shards, keywords, message):
    with pytest.raises(ValueError, match=message):
        open_sources(shards, root=corpus, **keywords)


def test_folder_above_the_shards_gets_a_hint(tmp_path):
    make_shards(tmp_path / "train", 1, 1)
    with pytest.raises(ValueError, match="did you mean '.*train'"):
        open_sources(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"shards": [{"name": "../x.tar", "samples": 1, "bytes": 1}]}'])
def test_bad_index_is_an_error(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json"):
        open_sources(str(tmp_path))


def test_pipe_and_http_go_through_the_cache(corpus, tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(corpus))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        expected = [b.keys for b in take(stream(corpus), 4)]
        for number, given in enumerate(
            (address, f"{address}/c-{{000..004}}.tar", f"pipe:cat {corpus}/c-{{000..004}}.tar")
        ):
            cache = tmp_path / str(number)
            batches = training_batches(given, view=SMALL, batch_size=3, seed=7, shuffle_buffer=4, cache_dir=cache)
            assert [b.keys for b in take(batches, 4)] == expected
            assert not list(cache.glob("*.part")) and list(cache.glob("*.tar"))
    finally:
        server.shutdown()
        server.server_close()
    # From the cache, with the server gone:
    assert [
        b.keys
        for b in take(
            training_batches(
                f"{address}/c-{{000..004}}.tar",
                view=SMALL,
                batch_size=3,
                seed=7,
                shuffle_buffer=4,
                cache_dir=tmp_path / "1",
            ),
            4,
        )
    ] == expected


def test_failed_pipe_leaves_nothing_in_the_cache(tmp_path):
    with pytest.raises(OSError, match="status 3"):
        sources.fetch("pipe:printf half; exit 3", tmp_path, tries=1)
    with pytest.raises(OSError, match="gave 4 bytes, index.json says 9"):
        sources.fetch("pipe:printf half", tmp_path, tries=1, num_bytes=9)
    assert [p.suffix for p in tmp_path.iterdir()] == [".lock", ".lock"]


# ---- tar members


def test_scan_groups_members_and_finds_their_bytes(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*clip("d/one.two"[:5], caption="x"), *clip("zwei-ü" * 30)])
    found = scan(path)
    assert [s.key for s in found] == ["d/one", "zwei-ü" * 30] and all(s.problem is None for s in found)
    reader = sources.ShardReader([sources.Shard(str(path), "a.tar")])
    assert json.loads(reader.read(found[0], "json")) == {"caption": "x"}


def _cut(keep: float | int):
    def change(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])

    return change


def _offset_of(path: Path, key: str, suffix: str) -> int:
    return next(s.members[suffix][0] for s in scan(path) if s.key == key)


@pytest.mark.parametrize("where", ["data", "inside a header", "between members", "between samples"])
@pytest.mark.parametrize("index", [True, False])
def test_truncated_tar_gives_its_whole_samples_and_counts_the_rest(tmp_path, where, index):
    path = write_tar(tmp_path / "a.tar", [m for i in range(4) for m in clip(f"k{i}")])
    video, facts = _offset_of(path, "k2", "mov"), _offset_of(path, "k2", "json")
    at = {
        "data": video + 99,
        "inside a header": facts - 300,
        "between members": facts - 512,
        "between samples": video - 512,
    }
    _cut(at[where])(path)
    found = scan(path, expected=4 if index else None)
    whole = [s.key for s in found if s.problem is None]
    # Between samples nothing tells that k1 is complete, so it goes too.
    assert whole == (["k0", "k1"] if where in ("data", "inside a header", "between members") else ["k0"])
    assert found[-1].key == "" and found[-1].lost == (4 - len(whole) if index else 1)
    assert "cut short" in found[-1].problem or "unexpected end" in found[-1].problem


def test_missing_samples_show_against_the_index(tmp_path):
    path = write_tar(tmp_path / "a.tar", clip("k0"))
    assert [s.problem for s in scan(path, expected=3)] == [None, "holds 1 samples, index.json says 3"]
    assert scan(path, expected=3)[-1].lost == 2


def test_empty_zero_byte_and_missing_tars(tmp_path):
    assert scan(write_tar(tmp_path / "empty.tar", [])) == []
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "junk.tar").write_bytes(os.urandom(4096))
    for name in ("zero.tar", "junk.tar"):
        (entry,) = scan(tmp_path / name)
        assert entry.problem and entry.key == "" and not entry.passing
    (entry,) = ShardReader([Shard(str(tmp_path / "none.tar"), "none.tar", samples=3)]).samples(0)
    assert entry.passing and entry.lost == 3 and "No such file" in entry.problem


def test_hostile_members_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("ok/a.mov", None),
            ("/abs.mov", None),
            ("x/../../up.mov", None),
            ("link.mov", tarfile.SYMTYPE),
            ("hard.mov", tarfile.LNKTYPE),
            ("dev.mov", tarfile.CHRTYPE),
            ("pipe.mov", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            data = movie() if kind is None else b""
            info.size = len(data)
            if kind is not None:
                info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))
        tar.addfile(tarfile.TarInfo("folder"))
    found = scan(path)
    assert [s.key for s in found if s.problem is None] == ["ok/a"]
    assert sum("not a plain file" in (s.problem or "") for s in found) == 4
    assert sum("absolute or parent path" in (s.problem or "") for s in found) == 2


def test_duplicate_keys_and_missing_media(tmp_path):
    found = scan(
        write_tar(
            tmp_path / "a.tar",
            [*clip("a"), *clip("b"), *clip("a"), ("c.json", b"{}"), ("d.mov", movie()), ("d.MOV", b"")],
        )
    )
    assert {s.key: s.problem for s in found} == {
        "a": "the key comes twice in the shard",
        "b": None,
        "c": "no video or image among its members ['json']",
        "d": "two members .MOV",
    }


def test_a_cut_shard_never_merges_with_the_next(tmp_path):
    """WebDataset gives shard A's json with shard B's video as one sample here."""
    cut = write_tar(tmp_path / "a.tar", [*clip("x"), ("same.json", b'{"caption": "A"}'), ("same.mov", movie())])
    _cut(_offset_of(cut, "same", "mov") + 100)(cut)
    write_tar(tmp_path / "b.tar", [("same.mov", movie(40)), ("same.txt", b"B")])
    view = View(num_frames=1, size=(8, 8), crop="center")
    batches = take(training_batches(str(tmp_path), view=view, batch_size=1, max_bad_fraction=1.0, shuffle_buffer=0), 8)
    assert {(b.keys[0].split(":")[1], (b.text or [""])[0]) for b in batches} == {("x", ""), ("same", "B")}
