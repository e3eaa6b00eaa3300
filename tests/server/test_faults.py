"""What must not bring the service down: its own sudden death, a full disk, descriptors that run out, and hostile bytes.

The server runs as an operator runs it: a process of its own, over a tiny model of random weights.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine import checkpoints
from tests.server.live import events, until
from tests.server.test_endpoints import MALFORMED
from tests.server.test_operations import HEAD, bearer, error_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX systems"),
]

LONG = {"prompt": "Hello", "max_tokens": 140, "ignore_eos": True, "temperature": 0}
"""As long as the tiny model's context lets an answer be."""
SHORT = {"prompt": "Hello", "max_tokens": 5, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("tiny") / "model")


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, trust_env=False, **options)

    def complete(self, body: dict[str, Any] = SHORT, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60, trust_env=False, **options)

    def said(self, **options: Any) -> str:
        answer = self.complete(**options)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, "the server has ended"
        try:
            return self.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        """Its exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def served(folder: Path, *options: str, port: int = 0, before: str = "", stderr: Any = None) -> Iterator[Served]:
    """`tramontane serve` as a process. `before`: what the shell that starts it does first."""
    port = port or free_port()
    command = [sys.executable, "-m", "tramontane", "serve", "--model", str(folder), "--port", str(port),
               "--threads", "1", "--name", "tiny", "-o", "num_blocks=400", "-o", "block_size=4", *options]  # fmt: skip
    shell = ["sh", "-c", f'{before or ":"}; exec "$@"', "sh", *command]
    server = Served(subprocess.Popen(shell, stdin=subprocess.DEVNULL, stderr=stderr or subprocess.DEVNULL), port)
    try:
        until(server.is_ready, 60)
        yield server
    finally:
        server.process.kill()
        server.process.wait(20)


def test_killed_under_load_it_starts_again_at_the_same_place(folder: Path) -> None:
    port = free_port()
    with served(folder, port=port) as server, ThreadPoolExecutor(16) as pool:
        before = server.said()
        begun = threading.Semaphore(0)

        def reads() -> str:
            """How a stream ends whose server dies."""
            try:
                with httpx.stream(
                    "POST", f"{server.url}/v1/completions", json={**LONG, "stream": True, "n": 4}
                ) as answer:
                    for _ in answer.iter_text():
                        begun.release()
                return "whole"
            except httpx.TransportError:
                return "broken"

        asked = [pool.submit(reads) for _ in range(16)]
        for _ in range(4):
            assert begun.acquire(timeout=30)
        server.process.kill()
        assert {one.result(30) for one in asked} <= {"whole", "broken"}
    with served(folder, port=port) as again:  # although connections of the first still linger
        assert again.said() == before
        assert again.stop() == 0


@pytest.mark.parametrize("to", ["file", "stderr"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_costs_lines_of_the_log_and_nothing_else(folder: Path, to: str) -> None:
    options = ("--log-file", "/dev/full") if to == "file" else ()
    with open("/dev/full", "wb") as full, served(folder, *options, stderr=full) as server:
        with ThreadPoolExecutor(8) as pool:
            assert len({*pool.map(lambda _: server.said(), range(100))}) == 1
        assert server.get("/metrics").status_code == 200
        assert server.stop() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are Linux's to change")
def test_the_log_goes_on_when_there_is_room_again(folder: Path, tmp_path: Path) -> None:
    import resource

    log = tmp_path / "log"
    with served(folder, "--log-file", str(log), before="ulimit -S -f 8") as server:  # blocks of 512 bytes
        for _ in range(30):
            server.said()
        assert log.stat().st_size <= 8 * 512
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert server.complete(headers={"X-Request-Id": "after"}).status_code == 200
        assert server.stop() == 0
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]  # each is whole
    assert len(lines) < 30
    assert "after" in [line.get("id") for line in lines]


HALF_OPEN = [
    b"",
    b"POST /v1/comp",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
    HEAD % 100,
    HEAD % 100 + b'{"prompt":',
]


@pytest.mark.parametrize("sent", HALF_OPEN, ids=("nothing", "line", "head", "no body", "half a body"))
def test_who_fills_all_descriptors_keeps_nobody_out(folder: Path, sent: bytes) -> None:
    """Four times as many connections as the process may have descriptors, none of which ever asks anything whole."""
    with served(folder, before="ulimit -n 128") as server, ExitStack() as held:
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(server.complete, {**LONG, "n": 8})
            for number in range(512):
                connection = held.enter_context(server.connect())
                with suppress(ConnectionError):  # it may have been closed to make room
                    connection.sendall(sent)
                if number % 64 == 63:
                    assert server.said()
            assert long.result(60).status_code == 200
        assert server.get("/health").status_code == 200
        assert server.stop() == 0


def exchange(server: Served, sent: Sequence[bytes]) -> bytes:
    """What comes back for bytes that may be no HTTP; nothing where the connection was closed."""
    with server.connect() as connection:
        try:
            for piece in sent:
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(65536)
        except ConnectionError:
            return b""


HTTP = [
    [b"\x00" * 1000], [b"\xff\xfe\xfd" * 5000], [b"GET / HTTP/9.9\r\n\r\n"],
    [b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n"],
    [b"GET /health HTTP/1.1\r\n", *[b"X-%d: %s\r\n" % (i, b"y" * 1000) for i in range(600)]],
    [b"GET /health HTTP/1.1\r\n", *[b"X: y\r\n" for _ in range(100_000)]],
    [b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n{}"],
    [b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n{}"],
    [b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n{}"],
    [b"POST /v1/completions HTTP/1.1\r\nHost: \xff\r\nAuthorization: Bearer \xff\xfe\r\n\r\n"],
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500],  # TLS, to a server that speaks none
    [b"GET /\xff\xfe%ff%00?\xff=%00 HTTP/1.1\r\nHost: localhost\r\n\r\n"],
]  # fmt: skip


def test_hostile_bytes_and_wrong_keys_while_others_are_served(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice alice-secret\n", encoding="utf-8")
    log = tmp_path / "log"
    right = {"headers": bearer("alice-secret")}
    with served(folder, "--api-keys", str(keys), "--log-file", str(log)) as server:
        before = server.said(**right)
        stop = threading.Event()

        def healthy() -> int:
            served_well = 0
            while not stop.is_set():
                assert server.said(**right) == before
                served_well += 1
            return served_well

        with ThreadPoolExecutor(10) as pool:
            goes_on = pool.submit(healthy)
            long = pool.submit(server.complete, {**LONG, "stream": True}, **right)
            try:
                for answer in pool.map(lambda sent: exchange(server, sent), HTTP * 3):
                    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:200]
                json_type = {"Content-Type": "application/json", **bearer("alice-secret")}
                for body in MALFORMED:
                    refused = httpx.post(f"{server.url}/v1/completions", content=body, headers=json_type, timeout=30)
                    assert refused.status_code == 400, refused.text
                    assert error_of(refused)["message"]
                for key in ("", " wrong", " alice-secre", " alice-secrets", " alice-secret\u00ff", " " + "x" * 8000):
                    refused = server.complete(headers={"Authorization": f"Bearer{key}".encode()})
                    assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key"), key
            finally:
                stop.set()
            assert goes_on.result(60) > 0
            assert events(long.result(60).text)[-1] == "[DONE]"
        assert server.stop() == 0
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert not [line for line in lines if line["level"] in ("error", "critical") or "exception" in line]
