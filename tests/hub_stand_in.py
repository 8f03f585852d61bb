"""As much of the Hub as making a repository, uploading a folder and downloading a snapshot ask for, on loopback.

Every commit has a hash and can be asked for later; large files go in parts where `part_bytes` says so; transfers can be
cut anywhere.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "c" * 40  # of a repository as a test made it
TOKEN = "hf_secretsecretsecret"


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    private: bool = False
    messages: list[str] = field(default_factory=list)
    head: str = COMMIT
    earlier: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by commit

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a branch or commit; None where there is none of that name."""
        if revision in ("main", self.head):
            return self.head, self.files
        return (revision, self.earlier[revision]) if revision in self.earlier else None

    def commit(self) -> str:
        """A new commit of what `files` will be."""
        self.earlier[self.head] = dict(self.files)
        self.head = hashlib.sha1(f"{self.head}{len(self.earlier)}".encode()).hexdigest()
        return self.head


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    broken: part of a path -> the status it is answered with. part_bytes: large files come in parts of so many bytes.
    cuts: part of a path -> bytes after which the connection ends, once, up or down. cutting: called then.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.seen: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.broken: dict[str, int] = {}
        self.part_bytes = 0
        self.cuts: dict[str, int] = {}
        self.cutting: Callable[[], object] = lambda: None

    def cut(self, path: str) -> int | None:
        """Where a transfer of this path is to end, if it is; said once."""
        found = next((part for part in self.cuts if part in path), None)
        return None if found is None else self.cuts.pop(found)

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
            "HF_HUB_DOWNLOAD_TIMEOUT": "300",  # a busy machine is no network that is down
            "HF_HUB_ETAG_TIMEOUT": "300",
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

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was killed
            super().handle()

    def hang_up(self) -> None:
        self.server.cutting()
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

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
        if self.command == "HEAD":
            return
        end = self.server.cut(unquote(self.path)) if self.command == "GET" else None
        self.wfile.write(payload[:end])
        if end is not None:
            self.hang_up()

    def handle_request(self) -> None:
        hub, path = self.server, unquote(urlparse(self.path).path)
        hub.seen.append((f"{self.command} {path}", self.headers.get("Authorization", "")))
        if self.command == "PUT" and (end := hub.cut(path)) is not None:
            self.rfile.read(end)
            return self.hang_up()
        data = self.body()
        for part, status in hub.broken.items():
            if part in path:
                told = f"as the test wants it, {self.headers.get('Authorization', '')}"  # as some proxies do
                return self.answer({"error": told}, status=status)
        writes = self.command in ("POST", "PUT") and not path.startswith(
            ("/blob/", "/part/", "/complete/", "/api/validate-yaml")
        )
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
        if path.startswith("/part/"):
            *_, oid, number = path.split("/")
            hub.parts.setdefault(oid, {})[int(number)] = data
            return self.answer({}, ETag=hashlib.md5(data).hexdigest())
        if path.startswith("/complete/"):
            return self.complete(json.loads(data))
        name = next((name for name in hub.repositories if f"/{name}" in path), None)
        if name is None:
            return self.answer({"error": "no such repository"}, status=404, X_Error_Code="RepoNotFound")
        if hub.repositories[name].private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Repository not found"}, status=401, X_Error_Code="RepoNotFound")
        self.of_repository(name, hub.repositories[name], path, data)

    def complete(self, asked: dict) -> None:
        """The parts of a large file, in the order and with the hashes that the client says."""
        parts = self.server.parts[asked["oid"]]
        assert [p["partNumber"] for p in asked["parts"]] == sorted(parts)
        assert all(hashlib.md5(parts[p["partNumber"]]).hexdigest() == p["etag"] for p in asked["parts"])
        whole = b"".join(parts[number] for number in sorted(parts))
        assert hashlib.sha256(whole).hexdigest() == asked["oid"]
        self.server.blobs[asked["oid"]] = whole
        self.answer({})

    def upload_of(self, wanted: dict) -> dict:
        """How one large file is to come; what is here already is not asked for again."""
        base, oid, size, part = self.server.endpoint, wanted["oid"], wanted["size"], self.server.part_bytes
        if oid in self.server.blobs:
            return wanted
        upload: dict = {"href": f"{base}/blob/{oid}"}
        if part:
            urls = {str(n): f"{base}/part/{oid}/{n}" for n in range(1, -(-size // part) + 1)}
            upload = {"href": f"{base}/complete/{oid}", "header": {"chunk_size": str(part), **urls}}
        return {**wanted, "actions": {"upload": upload}}

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
            uploads = [self.upload_of(each) for each in json.loads(data)["objects"]]
            return self.answer({"transfer": "multipart" if self.server.part_bytes else "basic", "objects": uploads})
        if "/commit/" in path:
            oid = repository.commit()
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
            return self.answer({"commitUrl": f"{base}/{name}/commit/{oid}", "commitOid": oid, "success": True})
        asked = re.search(r"/(?:tree|resolve|revision)/([^/]+)", path)
        found = repository.at(asked[1] if asked else "main")
        if found is None:
            return self.answer({"error": "no such revision"}, status=404, X_Error_Code="RevisionNotFound")
        commit, files = found
        if "/tree/" in path:
            return self.answer([{"type": "file", "path": k, "size": len(v), "oid": "0" * 40} for k, v in files.items()])
        if "/resolve/" in path:
            content = files.get(path.rpartition("/")[2])
            if content is None:
                return self.answer({"error": "no such file"}, status=404, X_Error_Code="EntryNotFound")
            tag = hashlib.sha256(content).hexdigest()
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if asked:
                self.server.ranges.append(path)
                content = content[int(asked[1]) :]
            status = 206 if asked else 200
            return self.answer(raw=content, status=status, ETag=f'"{tag}"', X_Repo_Commit=commit)
        names = [{"rfilename": k} for k in files]
        facts = {"id": name, "sha": commit, "siblings": names, "private": repository.private, "tags": []}
        return self.answer(facts)

    do_GET = do_POST = do_PUT = do_HEAD = handle_request
