"""A hub on this machine: one repository's listing and files, and all the ways in which a server fails.

Answers as huggingface.co does where the client looks: status, `X-Error-Code`, `X-Repo-Commit`, ETag, ranges.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPO = "org/tiny"


def commit_of(files: Mapping[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted((n, hashlib.sha1(c).hexdigest()) for n, c in files.items())).encode()).hexdigest()


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    method: str
    path: str
    range: str | None
    token: str | None
    agent: str


class FakeHub:
    """`revisions`: branch or tag -> its files. Every other attribute may be set at any time."""

    def __init__(self, files: Mapping[str, bytes] | None = None, repo: str = REPO) -> None:
        self.repo = repo
        self.revisions: dict[str, Mapping[str, bytes]] = {"main": files or {}}
        self.token: str | None = None  # what opens the repository; None: anyone may
        self.gated = False  # refuse the files, not the listing
        self.answers: list[tuple[int, dict[str, str]]] = []  # statuses for the next requests, before all else
        self.listing_answers: list[tuple[int, dict[str, str]]] = []  # the same for the next listings
        self.cuts = 0  # transfers to break half way
        self.ranges = True
        self.blobs = True  # whether the listing tells hashes
        self.extra: list[dict[str, Any]] = []  # more entries of the listing
        self.override: dict[str, bytes] = {}  # what is sent instead of a file
        self.elsewhere = ""  # where files are redirected to
        self.gate = threading.Event()  # files wait for it
        self.gate.set()
        self.asked: list[Asked] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                """Silence."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def files(self) -> Mapping[str, bytes]:
        return self.revisions["main"]

    @property
    def commit(self) -> str:
        return commit_of(self.files)

    def transfers(self, name: str) -> list[str | None]:
        """The Range of every GET for a file."""
        return [
            a.range for a in self.asked if a.method == "GET" and a.path.endswith(f"/{name}") and "/api/" not in a.path
        ]

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(to.path).path)
        token = (to.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.asked.append(Asked(to.command, path, to.headers.get("Range"), token, to.headers.get("User-Agent", "")))
        api = re.fullmatch(rf"/api/models/{re.escape(self.repo)}(/(?P<kind>revision|tree)/(?P<revision>.+))?", path)
        file = re.fullmatch(rf"/{re.escape(self.repo)}/resolve/(?P<revision>[^/]+|refs/\w+/\w+)/(?P<name>.+)", path)
        if self.answers:
            return self.send(to, *self.answers.pop(0))
        if api and self.listing_answers:
            return self.send(to, *self.listing_answers.pop(0))
        if token is not None and token != self.token:
            return self.send(to, 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if self.token is not None and token is None and not (api and self.gated):
            return self.send(to, 401, {"X-Error-Message": "Invalid username or password."})
        found = api or file
        if found is None:
            return self.send(to, 404, {"X-Error-Code": "RepoNotFound"})
        files = self._at(found["revision"] or "main")
        if files is None:
            return self.send(to, 404, {"X-Error-Code": "RevisionNotFound"})
        if api:
            as_json = {"Content-Type": "application/json"}
            return self.send(to, 200, as_json, self._tree(files) if api["kind"] == "tree" else self._listing(files))
        if self.gated:
            return self.send(to, 403, {"X-Error-Code": "GatedRepo"})
        return self._send_file(to, files, found["name"])

    def _at(self, revision: str) -> Mapping[str, bytes] | None:
        by_commit = {commit_of(files): files for files in self.revisions.values()}
        return self.revisions.get(revision, by_commit.get(revision))

    def _listing(self, files: Mapping[str, bytes]) -> bytes:
        entries: list[dict[str, Any]] = [{"rfilename": name} for name in files]
        for entry in entries if self.blobs else ():
            content = files[entry["rfilename"]]
            entry.update(size=len(content), blobId=git_hash(content))
            if is_lfs(entry["rfilename"]):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
        return json.dumps({"id": self.repo, "sha": commit_of(files), "siblings": entries + self.extra}).encode()

    @staticmethod
    def _tree(files: Mapping[str, bytes]) -> bytes:
        """The same as `_listing`, in the form that snapshot_download asks for."""
        entries: list[dict[str, Any]] = []
        for name, content in files.items():
            entries.append({"type": "file", "path": name, "size": len(content), "oid": git_hash(content)})
            if is_lfs(name):
                sha256 = hashlib.sha256(content).hexdigest()
                entries[-1]["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return json.dumps(entries).encode()

    def _send_file(self, to: BaseHTTPRequestHandler, files: Mapping[str, bytes], name: str) -> None:
        commit = {"X-Repo-Commit": commit_of(files), "Accept-Ranges": "bytes"}
        if name not in files:
            return self.send(to, 404, {"X-Error-Code": "EntryNotFound", **commit})
        if self.elsewhere:
            return self.send(to, 302, {"Location": f"{self.elsewhere}{to.path}"})
        whole = files[name]
        content = self.override.get(name, whole)
        headers = {"ETag": f'"{hashlib.sha256(whole).hexdigest() if is_lfs(name) else git_hash(whole)}"', **commit}
        asked = to.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.gate.wait(30)
        rest = content[start:]
        sent = rest
        if to.command == "GET" and is_lfs(name) and self.cuts:
            self.cuts -= 1
            sent = rest[: len(rest) // 2]
        return self.send(to, 206 if start else 200, headers, sent, len(rest))

    @staticmethod
    def send(
        to: BaseHTTPRequestHandler,
        code: int,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        length: int | None = None,
    ) -> None:
        to.send_response(code)
        for name, value in {"Content-Length": str(len(body) if length is None else length), **(headers or {})}.items():
            to.send_header(name, value)
        to.end_headers()
        if to.command != "HEAD":
            to.wfile.write(body)
        if length is not None and length != len(body):
            to.close_connection = True

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.gate.set()
            self.server.shutdown()
            self.server.server_close()
            thread.join()


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf", ".bin"))


def git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
