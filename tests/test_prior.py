"""The prior: what it learns of token shards, how it ships, and what it draws."""

import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import write_tar
from test_prior_coding import (
    SHA,
    header,
)
from waiting import PATHS, PATIENCE_S, until

import vtok
from vtok import export as shipping
from vtok.coding import bitstream, codec
from vtok.coding import tokenize as tokenizing
from vtok.coding.bitstream import Chunk, Reader, Writer, file_key
from vtok.coding.prior import train_prior
from vtok.coding.prior_data import row_of, scan, stack, tokens_of_ids
from vtok.coding.prior_training import Trainer, Training
from vtok.coding.sample import condition_words, conditions, draw_ids
from vtok.config import loads
from vtok.data.token_reader import SampleFacts, iter_token_samples
from vtok.evaluate import _samples
from vtok.evaluation.report import write_report
from vtok.families import flexible
from vtok.layers.token_prior import START, TokenRows
from vtok.loading import ExportError, Identity, identify, load_prior
from vtok.shipping.card import with_prior
from vtok.types import Clip


def corpus_videos(first: int, count: int, frames: int = 16) -> list[np.ndarray]:
    """uint8 [T, 32, 32, 3] each: scenes of the procedural corpus."""
    from vtok.data.synthetic import render, scene

    return [
        np.stack(list(render(scene(7, n, level=2, seconds=frames / 8, size=(32, 32), fps=8, needles=0))))
        for n in range(first, first + count)
    ]


def write_tokens(folder: Path, model, videos, labels, *, make=None) -> None:
    """Token shards of videos, as `vtok tokenize` writes them; `make(n)`: other ids in their stead."""
    who = tokenizing.identity_of(model)
    members, counts = [], []
    for n, video in enumerate(videos):
        with torch.inference_mode():
            clip = Clip(keys=["x"], video=torch.from_numpy(video).permute(3, 0, 1, 2)[None])
            tokens = model.encode(clip.as_float())
        groups = torch.bincount(tokens.group[0]).tolist()
        ids = tokens.indices[0].numpy() if make is None else make(n, tokens.indices[0].numpy())
        about = SampleFacts(groups, len(video), 8.0, list(video.shape[1:3]), [], list(who.codebook_sizes))
        facts = {"caption": f"a {labels[n]} thing", "label": labels[n], "tokens": about._asdict()}
        members += [(f"c{n}.tokens.npy", tokenizing.npy(ids, who.dtype)), (f"c{n}.json", json.dumps(facts).encode())]
        counts.append(len(ids))
    folder.mkdir(parents=True, exist_ok=True)
    path = write_tar(folder / "t-0.tar", members)
    entry = {"name": path.name, "samples": len(counts), "bytes": path.stat().st_size, "sha256": ""}
    entry |= {"tokens": sum(counts), "longest": max(counts)}
    index = {"kind": "tokens", "tokenizer": asdict(who), "shards": [entry]}
    (folder / "index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """An export whose transform code is fitted to the corpus, and token shards of it."""
    root = tmp_path_factory.mktemp("prior")
    quantizer = {"name": "fsq", "levels": [5, 5, 5]}
    shape = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "predictor_width": 0}
    config = loads(
        {
            "name": "tiny",
            "model": {
                "name": "flexible", "num_frames": 4, "size": [32, 32], "patch": [4, 16, 16], "num_tokens": 16,
                "registers": "dct", "mask": "full", "quantizer": quantizer, **shape,
            },
            "data": {"num_frames": 4, "size": [32, 32]},
        }
    )  # fmt: skip
    torch.manual_seed(0)
    model = flexible.Model(config.model).eval()
    train, val = corpus_videos(0, 48), corpus_videos(1000, 16, frames=48)
    pieces = [v[at : at + 4] for v in train for at in (0, 8)]
    batch = torch.from_numpy(np.stack(pieces)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    model.fit_statistics([batch])
    (root / "export").mkdir()
    shipping.write_export(model, config, root / "export")
    model = vtok.load(root / "export")
    write_tokens(root / "tokens" / "train", model, train, [f"l{n % 3}" for n in range(48)])
    write_tokens(root / "tokens" / "val", model, val, [f"l{n % 3}" for n in range(16)])
    return root


FAST = Training(steps=40, batch_size=8, length=64, lr=5e-3, warmup=5, seed=1)
SMALL = dict(width=32, depth=1, num_heads=2, head_width=16, dropout=0.0, eval_every=20)


@pytest.fixture(scope="module")
def shipped(home) -> tuple[Path, list[dict[str, float]]]:
    rows = train_prior(home / "tokens", model=home / "export", out=home / "with", how=FAST, **SMALL)
    return home / "with", rows


def test_held_out_ids_cost_less_than_static_and_nominal(shipped):
    out, rows = shipped
    assert [row["budget"] for row in rows] == [1, 4, 16]
    for row in rows:
        assert row["ar"] < 0.97 * row["static"] < row["static"] < row["nominal"], row
        assert row["signalling"] == pytest.approx(8 * 16 / row["tokens"])
    model = vtok.load(out)
    assert model.shipped.prior.codebook_sizes == (125,)
    facts = json.loads((out / "prior.json").read_text())
    assert facts["held_out"] == rows and facts["layout"] == {
        "groups": [16] * 4,
        "frames": 16,
        "fps": 8.0,
        "size": [32, 32],
    }
    card = (out / "README.md").read_text()
    assert "## Prior" in card and f"{rows[-1]['ar']:.3f}" in card and card.count("## Use\n") == 1


def test_files_of_held_out_clips_are_smaller_too(shipped, home):
    """All but their headers: a file for each clip of 48 frames, 192 tokens."""
    model = vtok.load(shipped[0])
    prior = model.shipped.prior
    static = scan(
        iter_token_samples(home / "tokens" / "train"),
        index_factors=prior.config.index_factors, ranks=16, condition="none",
    ).static  # fmt: skip
    size = dict.fromkeys(("packed", "static", "ar"), 0)
    for sample in iter_token_samples(home / "tokens" / "val"):
        chunk = Chunk(sample.ids, tuple(sample.tokens.groups), 16)
        for coding, entropy in (("packed", None), ("static", static), ("ar", prior)):
            out = io.BytesIO()
            head = header(prior, coding=coding, key=file_key(SHA, entropy))
            writer = Writer(out, head, entropy=entropy)
            begin = out.tell()
            writer.write(chunk)
            writer.close(frames=16)
            size[coding] += out.tell() - begin
            reader = Reader(io.BytesIO(out.getvalue()))
            reader.expect(head.model_id, SHA, entropy=entropy)
            assert np.array_equal(np.concatenate([c.indices for c in reader]), sample.ids)
    assert size["ar"] < size["static"] < size["packed"]


def test_a_video_file_there_and_back(shipped, tmp_path):
    from vtok.data.encode import write_video

    model = vtok.load(shipped[0])
    write_video(tmp_path / "in.mkv", np.tile(corpus_videos(2000, 1, frames=40)[0], (6, 1, 1, 1)), fps=8, codec="ffv1")
    frames, size = {}, {}
    for coding in ("packed", "ar"):
        done = codec.encode_file(model, tmp_path / "in.mkv", tmp_path / f"{coding}.vtok", coding=coding)
        frames[coding] = np.stack(list(codec.decode_frames(model, tmp_path / f"{coding}.vtok")))
        size[coding] = done.bytes
    assert np.array_equal(frames["packed"], frames["ar"]) and frames["ar"].std() > 5 and len(frames["ar"]) == 240
    assert size["ar"] < size["packed"]
    bare = vtok.load(shipped[0])
    who = identify(bare)
    bare.shipped = Identity(who.model_id, who.weights_sha256)
    with pytest.raises(bitstream.WrongModel, match="prior.safetensors"):
        next(codec.decode_frames(bare, tmp_path / "ar.vtok"))
    with pytest.raises(ValueError, match="coding='ar' needs a prior"):
        codec.encode_file(bare, tmp_path / "in.mkv", tmp_path / "x.vtok", coding="ar")


def test_an_interrupted_training_ends_bitwise_the_same(home, shipped, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    advance, steps = Trainer._advance, []

    def dies(self, batch):
        if len(steps) in (13, 25):
            steps.append(None)
            raise Killed
        steps.append(None)
        self.save_seconds = 0.0  # after every step
        return advance(self, batch)

    monkeypatch.setattr(Trainer, "_advance", dies)
    ask = dict(model=home / "export", out=tmp_path / "out", how=FAST, **SMALL)
    for _ in range(2):
        with pytest.raises(Killed):
            train_prior(home / "tokens", **ask)
    train_prior(home / "tokens", **ask)
    assert len(steps) == FAST.steps + 2
    assert hashes(tmp_path / "out") == hashes(shipped[0])
    with pytest.raises(ValueError, match="training.seed=1 there, 2 now"):
        train_prior(
            home / "tokens", **{**ask, "out": tmp_path / "b", "how": replace(FAST, seed=2)}, run=tmp_path / "out.prior"
        )
    with pytest.raises(ValueError, match="is not empty"):
        train_prior(home / "tokens", **ask)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


KILLED = """
import os, sys, time
from vtok.cli import main
from vtok.coding.prior_training import Trainer
from waiting import PATIENCE_S

def log(self, line, *, real=Trainer._log):
    real(self, line)
    if line["step"] == int(os.environ.get("LAST", 0)):
        time.sleep(PATIENCE_S)  # however late the test is, the work is not done before it is killed

Trainer._log = log
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_the_command_killed_and_run_again(home, tmp_path, number):
    command = [sys.executable, "-c", KILLED, "prior", str(home / "tokens"), "--model", str(home / "export")]
    command += [
        "--steps",
        "60",
        "--length",
        "64",
        "--width",
        "32",
        "--depth",
        "1",
        "--num-heads",
        "2",
        "--eval-every",
        "5",
    ]

    def start(out, **more):
        environment = {**os.environ, "PYTHONPATH": PATHS, **more}
        words = [*command, "--out", str(out)]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=PATIENCE_S) == 0, whole.stdout.read().decode()[-2000:]
    held = {"LAST": "30"} if number == signal.SIGKILL else {}
    process, metrics = start(tmp_path / "cut", **held), tmp_path / "cut.prior" / "metrics.jsonl"
    until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 2 or process.poll() is not None)
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE_S) != 0
    if number == signal.SIGTERM:
        assert (tmp_path / "cut.prior" / "state.pt").is_file()
    again = start(tmp_path / "cut")
    assert again.wait(timeout=PATIENCE_S) == 0, again.stdout.read().decode()[-2000:]
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_it_is_added_to_the_export_in_place_and_again(home, tmp_path):
    import shutil

    shutil.copytree(home / "export", tmp_path / "export")
    before = hashes(tmp_path / "export")
    how = replace(FAST, steps=2)
    first = train_prior(home / "tokens", model=tmp_path / "export", how=how, run=tmp_path / "a", **SMALL)
    again = train_prior(
        home / "tokens", model=tmp_path / "export", how=replace(how, seed=5), run=tmp_path / "b", **SMALL
    )
    after = hashes(tmp_path / "export")
    assert set(after) - set(before) == {"prior.safetensors", "prior.json"} and first != again
    assert {n for n in before if before[n] != after[n]} == {"README.md", "config.json"}
    assert (tmp_path / "export" / "README.md").read_text().count("## Prior") == 1
    assert vtok.load(tmp_path / "export").shipped.model_id == vtok.load(home / "export").shipped.model_id
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "export"]


def test_the_card_has_one_section(shipped):
    facts = json.loads((shipped[0] / "prior.json").read_text())
    card = "# x\n\n## Tokens and bits\n\ntext\n\n## Use\n\nmore\n"
    once = with_prior(card, facts)
    assert with_prior(once, facts) == once and once.endswith("## Use\n\nmore\n")
    assert once.index("## Tokens") < once.index("## Prior") < once.index("## Use")
    assert with_prior("", facts).startswith("## Prior") or with_prior("", facts).strip().startswith("## Prior")


def test_damaged_and_foreign_priors_are_refused(shipped, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    def copy():
        shutil.rmtree(tmp_path / "e", ignore_errors=True)
        return Path(shutil.copytree(shipped[0], tmp_path / "e"))

    folder = copy()
    tensors = load_file(folder / "prior.safetensors")
    for change, message in (
        (lambda t: t["base"].add_(1.0), "not the prior that config.json"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.pop("norm.weight"), "norm.weight"),
        (lambda t: t.update(base=torch.full_like(t["base"], math.nan)), "not finite"),
    ):
        changed = {name: value.clone() for name, value in tensors.items()}
        change(changed)
        save_file(changed, folder / "prior.safetensors")
        with pytest.raises(ExportError, match=message):
            vtok.load(folder)
    (copy() / "prior.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ExportError, match="prior.safetensors is damaged"):
        vtok.load(folder)
    (copy() / "prior.json").unlink()
    with pytest.raises(ExportError, match="prior.json is missing"):
        vtok.load(folder)
    for changes in ({"width": 2.5}, {"unknown": 1}, {"vocabulary": [1]}, {"digits": "x"}):
        facts = json.loads((copy() / "prior.json").read_text())
        facts["config"] |= changes
        (folder / "prior.json").write_text(json.dumps(facts))
        with pytest.raises(ExportError, match="does not fit prior.json"):
            load_prior(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flexible", "discrete"])
def test_clips_of_any_length_and_tokens_on_a_grid(family, tmp_path):
    """Images and videos of 4 to 30 frames through `vtok tokenize`, a prior, files, and a draw."""
    from test_export import make_run
    from test_tokenize import corpus

    from vtok.coding.sample import sample
    from vtok.data.encode import write_video

    export = shipping.export(make_run(tmp_path / "run", family=family), tmp_path / "export", entropy=False)
    corpus(tmp_path / "shards", shards=1)
    tokenizing.tokenize(tmp_path / "shards", tmp_path / "tokens", model=export, workers=0, progress=False)
    how = Training(steps=3, batch_size=3, length=12)  # shorter than clips, and than a group of the grid
    ask = dict(model=export, val=tmp_path / "tokens", how=how, **SMALL)
    rows = train_prior(tmp_path / "tokens", **ask)
    assert [row["budget"] for row in rows][-1] == max(
        max(s.tokens.groups) for s in iter_token_samples(tmp_path / "tokens")
    )
    assert len(rows) == (1 if family == "discrete" else 2) and all(row["ar"] < row["nominal"] for row in rows)
    model = vtok.load(export)
    write_video(tmp_path / "in.mkv", corpus_videos(0, 1, frames=11)[0], fps=8, codec="ffv1")
    frames = []
    for coding in ("packed", "ar"):
        codec.encode_file(model, tmp_path / "in.mkv", tmp_path / "x.vtok", coding=coding, size=(16, 16))
        frames.append(np.stack(list(codec.decode_frames(model, tmp_path / "x.vtok"))))
    assert np.array_equal(*frames) and len(frames[0]) == 11
    sample(export, tmp_path / "draws", count=1)
    assert (tmp_path / "draws" / "samples.png").is_file()
    if family == "discrete":
        with pytest.raises(ValueError, match="a grid, of which none can be left out"):
            sample(export, tmp_path / "draws", count=1, tokens=1)


# ---- training data


def test_rows_are_cut_where_groups_begin_and_know_what_lies_before():
    ids, counts = np.arange(10)[:, None], [3, 1, 4, 2]
    tokens = tokens_of_ids(ids, counts, (16,))
    row = row_of(ids, tokens.group[0].numpy(), tokens.rank[0].numpy(), [[16]], start=3, length=5)
    assert row["digits"][:, 0].tolist() == [3, 4, 5, 6, 7] and row["group"].tolist() == [1, 2, 2, 2, 2]
    assert row["previous"].tolist() == [-1, 0, 1, 2, 3] and row["above"].tolist() == [-1, 0, -1, -1, -1]


def test_rows_move_as_one():
    row = row_of(np.zeros((2, 1), np.int64), np.zeros(2, int), np.arange(2), [[4]], start=0, length=9)
    rows = stack([row], [[START]])
    assert isinstance(rows.to("cpu"), TokenRows)


# ---- drawing


@pytest.mark.slow
def test_a_chain_of_digits_knows_what_parallel_cannot(home, tmp_path):
    """Ids (d, 2 d mod 5, 0) of a random d, as the split halves of a large codebook may be: 2.3 bits, or twice that."""
    model = vtok.load(home / "export")
    videos, rng = corpus_videos(0, 48), np.random.default_rng(0)

    def make(n, ids):
        d = rng.integers(0, 5, ids.shape)
        return d + 5 * (2 * d % 5)

    for split in ("train", "val"):
        write_tokens(tmp_path / "tokens" / split, model, videos, ["x"] * 48, make=make)
    bits = {}
    for digits in ("chain", "parallel"):
        ask = dict(model=home / "export", out=tmp_path / digits, how=replace(FAST, steps=120, lr=1e-2), digits=digits)
        bits[digits] = train_prior(tmp_path / "tokens", **ask, **SMALL)[-1]["ar"]
    assert bits["chain"] < 3.0 < 4.3 < bits["parallel"]


def test_labels_are_learned_and_guidance_goes_beyond(home, tmp_path):
    """Ids that begin with the number of their label: what is drawn for a label begins so, and more so when guided."""
    model = vtok.load(home / "export")
    videos, labels = corpus_videos(0, 24, frames=4), [f"l{n % 3}" for n in range(24)]
    rng = np.random.default_rng(0)

    def make(n, ids):
        ids = rng.integers(0, 125, ids.shape)
        ids[:, 0] = np.where(rng.random(len(ids)) < 0.7, 40 * (n % 3), ids[:, 0])
        return ids

    for split in ("train", "val"):
        write_tokens(tmp_path / "tokens" / split, model, videos, labels, make=make)
    how = replace(FAST, steps=60, null=0.2)
    train_prior(tmp_path / "tokens", model=home / "export", out=tmp_path / "out", how=how, condition="label", **SMALL)
    prior = vtok.load(tmp_path / "out").shipped.prior
    assert prior.config.vocabulary == ["l0", "l1", "l2"]

    def share(words, **draw):
        return np.mean([draw_ids(prior, groups=[16], count=32, words=words, **draw)[:, :8, 0] == 40 * n for n in (2,)])

    told = share(condition_words(prior.config, label="l2"))
    assert told > 0.45 and told > 1.4 * share(None)
    assert share(condition_words(prior.config, label="l2"), guidance=3.0) > told
    told, made = _samples(vtok.load(tmp_path / "out"), str(tmp_path / "out"), [], seed=0)
    page = write_report({"rows": []}, [], tmp_path / "r.html", samples=made, told=told).read_text()
    assert told == ["l0", "l0", "l1", "l2"] and page.count('<th scope="row">l0</th>') == 2 and len(made) == 4
    assert conditions(replace(prior.config, condition="caption"), captions=["no", "an l1"] * 2, count=2) == [
        "an l1",
        "",
    ]
    with pytest.raises(ValueError, match="guidance=2 needs a condition"):
        draw_ids(prior, groups=[2], guidance=2)
    with pytest.raises(ValueError, match="top_p=0"):
        draw_ids(prior, groups=[2], top_p=0)


def test_the_sample_command(shipped, tmp_path, capsys):
    from vtok.cli import main
    from vtok.data.decode import probe

    assert main(["sample", str(shipped[0]), "--out", str(tmp_path / "s"), "--count", "2", "--top-p", "0.9"]) == 0
    assert "2 videos; samples.png shows each with 1, 4, 16 tokens a group" in capsys.readouterr().out
    info, picture = probe(tmp_path / "s" / "sample_01.mp4"), probe(tmp_path / "s" / "samples.png")
    assert (info.frames, info.height, info.width) == (16, 32, 32) and info.fps == pytest.approx(8)
    assert (picture.height, picture.width) == (2 * 32 + 2, 3 * 32 + 4)
    assert main(["sample", str(shipped[0]), "--out", str(tmp_path / "s"), "--label", "l0"]) == 1
    assert main(["sample", str(shipped[0]), "--out", str(tmp_path / "s"), "--tokens", "99"]) == 1


def test_eval_counts_bits_under_the_prior_and_the_report_shows_draws(shipped, home, tmp_path):
    from vtok.coding.sample import draw_samples
    from vtok.evaluation.evaluator import Evaluator

    model = vtok.load(shipped[0])
    clips = [
        Clip(keys=[f"v{n}"], video=torch.from_numpy(v).permute(3, 0, 1, 2)[None])
        for n, v in enumerate(corpus_videos(1000, 4))
    ]
    found = Evaluator(model, val=clips, train=clips, budgets=[4, 64], controls=(), fps=8, progress=False).run()
    for row in found["rows"]:
        assert 0 < row["ar_bits_mean"] < row["bits_mean"] and row["signalling_bits_mean"] == 8
    made = draw_samples(model, json.loads((shipped[0] / "prior.json").read_text()), count=2)
    page = write_report(found, [], tmp_path / "r.html", samples=made).read_text()
    assert page.count("data:image/webp") == 6 and "bits under the prior" in page and "16 tokens" in page
    model = vtok.load(home / "export")
    found = Evaluator(model, val=clips[:1], budgets=[64], controls=(), fps=8, progress=False).run()
    assert found["rows"][0]["ar_bits_mean"] is None and "under a prior: the model has none" in found["rows"][0]["note"]
