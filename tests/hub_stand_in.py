"""As much of the Hub as making a repository, uploading a folder and downloading a snapshot ask for, on loopback."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "c" * 40
TOKEN = "hf_secretsecretsecret"


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    private: bool = False
    messages: list[str] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """Repositories in memory. tokens: that may write. broken: part of a path -> the status it is answered with."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.seen: list[tuple[str, str]] = []
        self.broken: dict[str, int] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """For a process whose huggingface_hub, as it is, takes this for the Hub."""
        own = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",  # the storage behind Xet speaks another protocol; this is the LFS one
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        return {**kept, **own, **more}


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(10)


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, content=None, *, status=200, raw=None, **headers) -> None:
        payload = json.dumps(content).encode() if raw is None else raw
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def handle_request(self) -> None:
        hub, path, data = self.server, unquote(urlparse(self.path).path), self.body()
        hub.seen.append((f"{self.command} {path}", self.headers.get("Authorization", "")))
        for part, status in hub.broken.items():
            if part in path:
                return self.answer({"error": "as the test wants it"}, status=status)
        writes = self.command in ("POST", "PUT") and not path.startswith(("/blob/", "/api/validate-yaml"))
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, status=401)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if path.startswith("/blob/"):
            assert hashlib.sha256(data).hexdigest() == path.rpartition("/")[2]
            hub.blobs[path.rpartition("/")[2]] = data
            return self.answer({})
        name = next((name for name in hub.repositories if f"/{name}" in path), None)
        if name is None:
            return self.answer({"error": "no such repository"}, status=404, X_Error_Code="RepoNotFound")
        self.of_repository(name, hub.repositories[name], path, data)

    def create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        if name in self.server.repositories:
            known = {"error": "You already created this model repo", "url": f"{self.server.endpoint}/{name}"}
            return self.answer(known, status=409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories[name] = Repository(private=bool(private))
        self.answer({"url": f"{self.server.endpoint}/{name}", "name": name})

    def of_repository(self, name: str, repository: Repository, path: str, data: bytes) -> None:
        base, files = self.server.endpoint, repository.files
        if "/preupload/" in path:
            names = [f["path"] for f in json.loads(data)["files"]]
            mode = {True: "lfs", False: "regular"}
            found = [{"path": n, "uploadMode": mode[n.endswith(".safetensors")], "shouldIgnore": False} for n in names]
            return self.answer({"files": found})
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(data)["objects"]
            uploads = [{**o, "actions": {"upload": {"href": f"{base}/blob/{o['oid']}"}}} for o in wanted]
            return self.answer({"transfer": "basic", "objects": uploads})
        if "/commit/" in path:
            for line in data.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    repository.messages.append(value["summary"])
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.server.blobs[value["oid"]]
                else:
                    assert entry["key"] == "deletedFile", entry
                    del files[value["path"]]
            done = {"commitUrl": f"{base}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            return self.answer(done)
        if "/tree/" in path:
            return self.answer([{"type": "file", "path": k, "size": len(v), "oid": "0" * 40} for k, v in files.items()])
        if "/resolve/" in path:
            content = files.get(path.rpartition("/")[2])
            if content is None:
                return self.answer({"error": "no such file"}, status=404, X_Error_Code="EntryNotFound")
            tag = hashlib.sha256(content).hexdigest()
            return self.answer(raw=content, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
        names = [{"rfilename": k} for k in files]
        facts = {"id": name, "sha": COMMIT, "siblings": names, "private": repository.private, "tags": []}
        return self.answer(facts)

    do_GET = do_POST = do_PUT = do_HEAD = handle_request
