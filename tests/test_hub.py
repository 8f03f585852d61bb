"""Exports on their way to the Hub and back, through its own client: in parts, cut, killed, pinned, offline; and the
token goes nowhere else."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_stand_in import COMMIT, TOKEN, Hub, Repository
from safetensors.torch import load_file, save_file
from test_export import clip
from test_init_from import ship
from test_push import exported, files, hub, make_run, pushed  # noqa: F401
from waiting import PATIENCE_S, until

import vtok
from vtok import cli
from vtok import export as shipping
from vtok.config import load
from vtok.loading import WEIGHTS, ExportError, without_token

NAME = "tester/model"
CONFIGS = Path(__file__).parents[1] / "configs"


def oid(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def in_parts(hub: Hub, folder: Path, count: int = 3) -> int:  # noqa: F811
    hub.part_bytes = -(-(folder / WEIGHTS).stat().st_size // count)
    return hub.part_bytes


@pytest.fixture
def client(hub: Hub, tmp_path, monkeypatch) -> Hub:  # noqa: F811
    """This process's client takes the stand-in for the Hub, with an empty cache."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


def test_a_part_that_was_cut_in_half_is_sent_again_and_no_other(exported, hub):  # noqa: F811
    size, name = in_parts(hub, exported), oid(exported)
    hub.cuts = {f"/part/{name}/2": size // 2}
    shipping.push(exported, NAME, endpoint=hub.endpoint)
    sent = [call.rpartition("/")[2] for call, _ in hub.seen if call.startswith(f"PUT /part/{name}")]
    assert sent == ["1", "2", "2", "3"] and not hub.cuts
    assert pushed(hub) == files(exported) and len(hub.repositories[NAME].messages) == 1


KILLED = "import sys; from vtok.export import push; push(sys.argv[1], sys.argv[2])"


@pytest.mark.slow
@pytest.mark.hub
def test_a_push_killed_in_the_middle_leaves_nothing_half_and_is_taken_up_again(exported, hub, tmp_path):  # noqa: F811
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    (folder / "entropy.safetensors").write_bytes(os.urandom(1000))  # a second large file, of one part
    size, name = in_parts(hub, folder), oid(folder)
    arrived = hashlib.sha256((folder / "entropy.safetensors").read_bytes()).hexdigest()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), NAME], env=hub.environment(tmp_path / "home")
    )

    def kill() -> None:
        until(lambda: arrived in hub.blobs, "the other file")
        process.kill()
        process.wait()

    hub.cuts, hub.cutting = {f"/part/{name}/2": size // 2}, kill
    assert process.wait(PATIENCE_S) == -9
    assert not pushed(hub) and hub.repositories[NAME].head == COMMIT and arrived in hub.blobs
    hub.seen.clear()
    shipping.push(folder, NAME, endpoint=hub.endpoint)
    sent = [call for call, _ in hub.seen if call.startswith("PUT ")]
    assert sent == [f"PUT /part/{name}/{number}" for number in (1, 2, 3)], "what had arrived is not sent again"
    assert pushed(hub) == files(folder)


def test_a_download_that_was_cut_goes_on_where_it_was(exported, client, monkeypatch):  # noqa: F811
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 8192)  # kept so far are whole chunks
    client.repositories[NAME] = Repository(files(exported))
    client.cuts = {f"/resolve/{COMMIT}/{WEIGHTS}": (exported / WEIGHTS).stat().st_size // 2}
    model = vtok.load(NAME)
    assert [path for path in client.ranges if path.endswith(WEIGHTS)] and not client.cuts
    here = vtok.load(str(exported))
    assert model.shipped.model_id == here.shipped.model_id
    assert torch.equal(model.encode(clip(frames=4)).indices, here.encode(clip(frames=4)).indices)


def test_a_revision_stays_what_it_was_and_its_hashes_are_checked(exported, client, tmp_path, monkeypatch):  # noqa: F811
    newer = ship(make_run(tmp_path / "run", seed=1))
    ids = [vtok.load(str(folder)).shipped.model_id for folder in (exported, newer)]
    assert ids[0] != ids[1]
    heads = []
    for folder in (exported, newer):
        shipping.push(folder, NAME, private=True, endpoint=client.endpoint)
        heads.append(client.repositories[NAME].head)
    assert vtok.load(NAME).shipped.model_id == vtok.load(NAME, revision="main").shipped.model_id == ids[1]
    assert (
        vtok.load(NAME, revision=heads[0]).shipped.model_id
        == vtok.load(f"{NAME}@{heads[0]}").shipped.model_id
        == ids[0]
    )
    with pytest.raises(ExportError, match="names revision 'main', and revision='v1' was given: give one of them"):
        vtok.load(f"{NAME}@main", revision="v1")
    with pytest.raises(ExportError, match="could not be had from the Hub"):
        vtok.load(NAME, revision="e" * 39)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "other"))
    with pytest.raises(ExportError, match="could not be had from the Hub"):  # it is private
        vtok.load(NAME)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    given, state = client.repositories[NAME].files, load_file(newer / WEIGHTS)
    name = next(name for name in state if state[name].is_floating_point())
    state[name] = state[name] + 2**-20  # a whole file, of other weights
    save_file(state, tmp_path / "other.safetensors")
    config = given["config.json"].replace(b'"num_heads": 2', b'"num_heads": 1')
    for file, content in ((WEIGHTS, (tmp_path / "other.safetensors").read_bytes()), ("config.json", config)):
        client.repositories[NAME].commit()
        client.repositories[NAME].files = {**given, file: content}
        assert content != given[file]
        with pytest.raises(ExportError, match="the files are damaged or mixed up"):
            vtok.load(NAME)


LOADS = """
import sys, vtok
for name in sys.argv[1:]:
    try:
        print(vtok.load(name).shipped.model_id)
    except ValueError as error:
        print("refused:", error)
"""


@pytest.mark.slow
@pytest.mark.hub
def test_offline_loads_what_was_downloaded_and_the_token_is_nowhere(exported, hub, tmp_path):  # noqa: F811
    """Real processes, with the client's own debugging on: its output and every file of the run and of its cache."""
    out = tmp_path / "pushed"
    environment = hub.environment(tmp_path / "home", HF_DEBUG="1", HF_HUB_VERBOSITY="debug")

    def run(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, *command]
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=PATIENCE_S, env={**environment, **more}, cwd=tmp_path
        )

    sent = run("-m", "vtok.cli", "export", str(exported.parent / "run"), "--out", str(out), "--no-entropy",
               "--push", NAME, "--private")  # fmt: skip
    assert sent.returncode == 0, sent.stderr[-3000:]
    assert pushed(hub) == files(out) and hub.repositories[NAME].private
    head = hub.repositories[NAME].head
    online = run("-c", LOADS, NAME, f"{NAME}@{head}")
    made = shipping.read_config(out)["model_id"]
    assert online.stdout.split() == [made, made], online.stderr[-3000:]
    hub.seen.clear()
    hub.repositories["tester/other"] = Repository(files(out))
    offline = run("-c", LOADS, NAME, f"{NAME}@{head}", "tester/other", HF_HUB_OFFLINE="1")
    first, second, refused = offline.stdout.splitlines()
    assert (first, second) == (made, made) and not hub.seen
    assert (
        "'tester/other' is no folder here, and it was not downloaded before HF_HUB_OFFLINE=1 was set: load it"
        in refused
    )
    hub.broken = {"/commit/": 400}  # an answer that repeats the token
    failed = run(
        "-m", "vtok.cli", "export", str(exported.parent / "run"), "--out", str(out), "--no-entropy", "--push", NAME
    )
    assert failed.returncode == 1 and "refused with 400" in failed.stderr and "Traceback" not in failed.stderr
    said = "".join(each.stdout + each.stderr for each in (sent, online, offline, failed))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10 and len(said) > 1000
    assert TOKEN not in said, "printed"
    assert not [
        path
        for path in [*written, *exported.parent.rglob("*")]
        if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]


def test_messages_do_not_repeat_the_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "some-other-kind-of-secret")
    said = without_token(f"401 for Bearer some-other-kind-of-secret, {TOKEN} at hf_hub_download")
    assert said == "401 for Bearer hf_***, hf_*** at hf_hub_download"


@pytest.mark.parametrize("what", ["load", "push", "vlm"])
def test_tracebacks_do_not_repeat_the_token(tmp_path, monkeypatch, what):
    """Of the Python interface, where nobody turns errors into a line."""

    class Repeats:
        def __init__(self, *_: object, **__: object) -> None:
            raise OSError(f"401 for Bearer {TOKEN}")

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, Repeats)
    for name in ("create_repo", "model_info"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, Repeats)
    monkeypatch.setattr(shipping, "read_config", lambda _: {"model_id": "m"})
    monkeypatch.setattr(shipping, "is_projector", lambda _: True)
    with pytest.raises(ExportError, match="401 for Bearer hf_") as caught:
        if what == "load":
            vtok.load(NAME)
        elif what == "push":
            shipping.push(tmp_path, NAME)
        else:
            shipping.named_vlm(NAME, load(CONFIGS / "flexible" / "debug.yaml"))
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_private_without_push_is_refused(tmp_path, exported, capsys):  # noqa: F811
    run = str(exported.parent / "run")
    assert cli.main(["export", run, "--out", str(tmp_path / "out"), "--private"]) == 1
    assert "--private: it is of a --push; name the repository, --push USER/REPO" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
