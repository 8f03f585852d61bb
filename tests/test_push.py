"""Exports go to the Hub through its own client, whole, and nothing is lost where that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from hub_stand_in import COMMIT, TOKEN, Hub, Repository, running
from huggingface_hub import ModelCard
from small_vlms import SEEN, WIDTH, vlm_of
from test_export import make_run
from test_projector_card import make_projector
from waiting import PATIENCE_S

from vtok import export as shipping
from vtok.loading import ExportError


@pytest.fixture
def hub(monkeypatch):
    """Nothing of the client is replaced: it has another endpoint, a token, and the LFS way of storing large files."""
    with running() as made:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):  # a busy machine is no network that is down
            monkeypatch.setattr(huggingface_hub.constants, name, 300)
        huggingface_hub.close_session()  # one that remembers proxies
        yield made
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    return shipping.export(make_run(folder / "run"), folder / "export", entropy=False)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pushed(hub: Hub, name: str = "tester/model") -> dict[str, bytes]:
    return {k: v for k, v in hub.repositories[name].files.items() if k != ".gitattributes"}


def test_what_arrives_is_the_folder(exported, hub):
    url = shipping.push(exported, "tester/model", private=True, endpoint=hub.endpoint)
    assert url == f"{hub.endpoint}/tester/model"
    assert pushed(hub) == files(exported) and hub.repositories["tester/model"].private is True
    assert hub.repositories["tester/model"].messages == [
        f"vtok export of {shipping.read_config(exported)['model_id']}"
    ], "one commit"
    stored = [call for call, _ in hub.seen if call.startswith("PUT /blob/")]
    assert len(stored) == 1, "weights go the way of large files"
    assert {token for call, token in hub.seen if call.startswith("POST")} == {f"Bearer {TOKEN}"}


def test_an_export_replaces_an_earlier_one_and_nothing_else(exported, hub):
    facts = {
        "model_type": "vtok",
        "format": 1,
        "family": "flexible",
        "model": {},
        "model_id": "x",
        "weights_sha256": "",
    }
    old = {"config.json": json.dumps(facts).encode(), "entropy.safetensors": b"old", "notes.md": b"mine"}
    hub.repositories["tester/model"] = Repository(dict(old))
    hub.repositories["tester/thesis"] = Repository({"thesis.tex": b"years of work"})
    hub.repositories["tester/other"] = Repository({"config.json": b'{"model_type": "llama"}', "weights.bin": b"w"})
    hub.repositories["tester/empty"] = Repository({".gitattributes": b"", "README.md": b"---\nlicense: mit\n---\n"})
    for name, shown in (("thesis", "thesis.tex"), ("other", "config.json, weights.bin")):
        before = dict(hub.repositories[f"tester/{name}"].files)
        with pytest.raises(ExportError, match=f"exists and holds {shown}, which is no export; choose another name"):
            shipping.push(exported, f"tester/{name}", endpoint=hub.endpoint)
        assert hub.repositories[f"tester/{name}"].files == before
    with pytest.raises(ExportError, match="tester/empty --private: the repository exists and is public"):
        shipping.push(exported, "tester/empty", private=True, endpoint=hub.endpoint)
    for name in ("tester/model", "tester/empty"):
        shipping.push(exported, name, endpoint=hub.endpoint)
    written = files(exported)
    assert pushed(hub) == {**written, "notes.md": b"mine"}, "the old entropy model is gone: nothing would load with it"
    assert pushed(hub, "tester/empty") == written


def test_a_failed_push_says_why_and_loses_nothing(exported, hub, monkeypatch):
    hub.repositories["tester/full"] = Repository()
    there, here = dict(hub.repositories["tester/full"].files), files(exported)

    def refused(why: str, repository: str = "tester/full", endpoint: str = "", **broken: int) -> None:
        hub.broken = {f"/{part}/": status for part, status in broken.items()}
        with pytest.raises(ExportError, match=why) as caught:
            shipping.push(exported, repository, endpoint=endpoint or hub.endpoint)
        hub.broken = {}
        said = str(caught.value)
        assert said.startswith(f"--push {repository}: ") and f"the export is complete in {exported}" in said
        assert "secret" not in said and files(exported) == here
        assert hub.repositories["tester/full"].files == there

    refused("the Hub refused with 400", blob=400)  # before one arrives, which is not asked for again
    refused("refused with 403: the token may not write there", commit=403)
    refused("the Hub refused with 400", preupload=400)
    refused("no/such/name", "no/such/name")
    with running() as gone:
        nowhere = gone.endpoint
    refused("could not be reached, or broke off .*Connect", endpoint=nowhere)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    refused("refused with 401: it does not know the token: set HF_TOKEN", "tester/new")
    assert "tester/new" not in hub.repositories
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    shipping.push(exported, "tester/full", endpoint=hub.endpoint)
    assert pushed(hub, "tester/full") == here, "the same once more"


def test_only_exports_are_pushed(tmp_path, hub):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="is not an export"):
        shipping.push(tmp_path, "tester/model", endpoint=hub.endpoint)
    assert not hub.seen


def test_a_vlm_that_cannot_read_the_tokens_is_refused(tmp_path, exported, hub):
    vlm_of("llava_onevision").save_pretrained(tmp_path / "vlm")
    seen = {"tower": f"vlm:{tmp_path / 'vlm'}"}
    wide, narrow = (make_projector(tmp_path / str(width), embedding_dim=width, **seen) for width in (WIDTH, 16))
    other = make_projector(tmp_path / "other", embedding_dim=WIDTH)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "gpt2"}')
    for run, vlm, why in (
        (narrow, "vlm", f"its words are {WIDTH} wide, this projector's tokens 16: it was trained for hf:Qwen"),
        (
            other,
            "vlm",
            "the compressor was trained on model.tower.name='.*: something else; train it with model.tower.na",
        ),
        (wide, "text", "is of type 'gpt2'; tokens are put into llava"),
        (wide, "nothing-here", "is no folder here and could not be had from the Hub"),
        (exported.parent / "run", "vlm", "a VLM reads the tokens of projectors; flexible is none"),
    ):
        with pytest.raises(ExportError, match=f"--vlm {tmp_path / vlm}.*{why}"):
            shipping.export(run, tmp_path / "out", entropy=False, vlm=str(tmp_path / vlm))
        assert not (tmp_path / "out").exists()
    joined = shipping.export(wide, tmp_path / "out", vlm=str(tmp_path / "vlm"))
    assert str(tmp_path) not in (joined / "README.md").read_text()
    with pytest.raises(ExportError, match="the VLM is .*vlm, a folder here; name one of the Hub"):
        shipping.push(joined, "tester/model", endpoint=hub.endpoint)
    assert "tester/model" not in hub.repositories


REGION = {"scale": 2, "width": 8, "num_heads": 2}
SCRIPT = """
import sys, torch, vtok
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from vtok import export
from vtok.types import Clip, Features

tokenizer, projector, before_vlm, out = sys.argv[1:]
vlm = ["--vlm", "tester/vlm"]
for run, name, more in ((tokenizer, "model", []), (projector, "projector", []), (before_vlm, "joined", vlm)):
    export.main_export([run, "--out", f"{out}/{name}", "--no-entropy", "--push", f"tester/{name}", *more])

clip = Clip(keys=["a"], video=torch.randint(0, 256, (1, 3, 4, 16, 16), dtype=torch.uint8))
here, there = vtok.load(f"{out}/model"), vtok.load("tester/model", revision="main")
assert torch.equal(here.encode(clip).indices, there.encode(clip).indices)
assert here.shipped.model_id == there.shipped.model_id
from vtok.evaluate import load_model
model, data, settings = load_model("tester/model")
assert (data.num_frames, data.size, data.fps) == (4, [16, 16], None), data  # as it was trained, not the defaults
try:
    vtok.load("tester/missing")
except ValueError as error:
    assert "could not be had from the Hub" in str(error), error
else:
    raise AssertionError("a missing repository loads")

here, there = vtok.load(f"{out}/projector"), vtok.load("tester/projector")
features = Features(torch.randn(2, 3, 12, here.config.in_dim), (3, 4), lengths=torch.tensor([3, 1]))
tokens = here.compress(features, budget=5)
assert torch.equal(tokens.embeddings, there.compress(features, budget=5).embeddings)
remote = AutoModel.from_pretrained("tester/projector", trust_remote_code=True, revision="main")
with torch.no_grad():
    again = remote.compress(features.patches, grid=(3, 4), lengths=features.lengths, budget=5)
assert torch.equal(tokens.embeddings, again.embeddings) and again.lengths.tolist() == [5, 4]
count = get_class_from_dynamic_module("modeling_vtok.token_count", "tester/projector")
config = AutoConfig.from_pretrained("tester/projector", trust_remote_code=True)
assert config.length_policy == "metadata"
assert [count(config, frames, 3, 4, budget=5) for frames in (3, 1)] == [5, 4]

from vtok.llm.joined import attach
inputs = {"input_ids": torch.tensor([[5, 121, 6, 7]]), "pixel_values_videos": torch.randn(1, 3, 3, 32, 32)}
options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, budget=5)
joined = AutoModelForImageTextToText.from_pretrained("tester/joined", trust_remote_code=True)
vlm = AutoModelForImageTextToText.from_pretrained("tester/vlm").eval()
ids = joined.generate(**inputs, **options)
assert ids.shape == (1, 4) and torch.equal(ids, attach(vtok.load(f"{out}/joined"), vlm).generate(**inputs, **options))
logits = joined(**inputs, budget=5).logits
assert torch.equal(logits, attach(vtok.load("tester/joined"), vlm)(**inputs, budget=5).logits)
assert not any(parameter.requires_grad for parameter in joined.vlm.parameters())
"""


@pytest.mark.slow
@pytest.mark.hub
def test_the_command_pushes_and_every_kind_loads_by_name(tmp_path, hub):
    """In a process whose Hub is the stand-in from the first line on."""
    vlm_of("llava_onevision").save_pretrained(tmp_path / "vlm")
    hub.repositories["tester/vlm"] = Repository(files(tmp_path / "vlm"))
    widths = {"in_dim": SEEN, "embedding_dim": WIDTH}
    runs = [make_run(tmp_path / "run-a")]
    runs += [make_projector(tmp_path / f"run-{n}", compressor="region", region=REGION, **w)
             for n, w in (("b", {}), ("c", {**widths, "tower": "vlm:tester/vlm"}))]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, runs), str(tmp_path)],
        capture_output=True, text=True, timeout=PATIENCE_S, env=hub.environment(tmp_path / "home"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("pushed to") == 3 and "secret" not in done.stdout + done.stderr
    for name in ("model", "projector", "joined"):
        assert pushed(hub, f"tester/{name}") == files(tmp_path / name)
    facts = json.loads(pushed(hub, "tester/joined")["config.json"])
    assert facts["vlm"] == {"name": "tester/vlm", "revision": COMMIT}, "what was joined stays what it was"
    card = ModelCard(pushed(hub, "tester/joined")["README.md"].decode())
    assert card.data.to_dict()["base_model"][0] == "tester/vlm" and COMMIT in card.text
