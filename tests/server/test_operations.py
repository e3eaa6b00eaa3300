"""What an operator relies on: keys, limits, draining, failures, clients that leave, logs and metrics."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.live import HELLO, Live, events, live, until
from tests.server.scripted import Scripted, says
from tramontane.backends.base import Capabilities
from tramontane.backends.mock import MockBackend
from tramontane.errors import EngineClosed, InvalidRequest, ModelNotFound, Overloaded
from tramontane.server.keys import ApiKey, read_keys
from tramontane.server.logs import PlainLines, start_logging
from tramontane.server.settings import ServerSettings
from tramontane.types import Chunk, Request

KEYS = (ApiKey("alice", "alice-secret"), ApiKey("bob", "bob-secret-too", priority=5))


HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


# ---- keys


def test_only_who_has_a_key_is_served() -> None:
    with live(MockBackend(), keys=KEYS) as server:
        for headers in (
            {},
            bearer("wrong"),
            {"Authorization": "Bearer"},
            {"Authorization": "alice-secret"},
            bearer("älice".encode()),
        ):
            answer = server.chat_with(headers)
            assert answer.status_code == 401
            assert error_of(answer)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert server.get("/metrics").status_code == 401
        assert server.get("/v1/models").status_code == 401
        assert server.get("/health").status_code == server.get("/ready").status_code == 200
        assert server.chat_with(bearer("alice-secret")).status_code == 200


def test_a_key_says_on_whose_behalf_and_how_urgent() -> None:
    backend = Scripted(says("hi"))
    with live(backend, keys=KEYS) as server:
        assert server.chat_with(bearer("alice-secret"), cache_salt="x").status_code == 200
        assert server.chat_with(bearer("bob-secret-too"), priority=2).status_code == 200
    alice, bob = backend.asked
    assert (alice.tenant, alice.priority) == ("alice", 0)
    assert (bob.tenant, bob.priority) == ("bob", 7)
    assert alice.cache_salt != bob.cache_salt != ""
    assert "alice" in alice.cache_salt
    assert "x" in alice.cache_salt


def test_keys_may_share_prefixes() -> None:
    backend = Scripted(says("hi"))
    with live(backend, keys=KEYS, share_prefixes=True) as server:
        server.chat_with(bearer("alice-secret"))
        server.chat_with(bearer("bob-secret-too"))
    assert [request.cache_salt for request in backend.asked] == ["", ""]


class Simple(MockBackend):
    """Without tenants, priorities and salts."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), request_fields=frozenset())


def test_what_the_server_adds_by_itself_a_simple_backend_need_not_know() -> None:
    with live(Simple("hi"), keys=KEYS) as server:
        assert server.chat_with(bearer("bob-secret-too")).status_code == 200
        answer = server.chat_with(bearer("bob-secret-too"), priority=1)
        assert error_of(answer)["param"] == "priority"


def test_nobody_jumps_the_queue_by_asking(mock: Live) -> None:
    assert error_of(mock.chat(priority=-1))["param"] == "priority"


def test_keys_are_read_from_lines() -> None:
    text = "# who may\nalice alice-secret # she may\n\nbob bob-secret-too 5;carol carols-secret -1"
    assert read_keys(text, "keys.txt") == (*KEYS, ApiKey("carol", "carols-secret", -1))
    assert "secret" not in repr(KEYS)


@pytest.mark.parametrize("text", ["alone", "a b c d", "alice short", "alice alice-secret high", "a/b alice-secret", ""])
def test_bad_keys_are_refused_without_being_shown(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_keys(text, "keys.txt")
    assert "keys.txt" in str(caught.value)
    assert "alice-secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_without_a_key_only_this_machine_is_served(host: str) -> None:
    with pytest.raises(InvalidRequest, match="can be reached from other machines"):
        ServerSettings(("m",), host=host)
    ServerSettings(("m",), host=host, allow_anyone=True)
    ServerSettings(("m",), host=host, keys=KEYS)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machine_needs_no_key(host: str) -> None:
    assert ServerSettings(("m",), host=host).keys == ()


# ---- pages of other origins


def test_other_origins_are_not_let_in_unless_named(mock: Live) -> None:
    origin = {"Origin": "https://page.example"}
    assert "access-control-allow-origin" not in mock.get("/v1/models", headers=origin).headers
    with live(MockBackend(), cors_origins=("https://page.example",), keys=KEYS) as server:
        asked = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = server.client.options("/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        other = server.get("/health", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_name_that_somebody_else_points_here_is_not_ours(mock: Live) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", "localhost.evil.example:80"):
        answer = mock.get("/v1/models", headers={"Host": host})
        assert answer.status_code == 403, host
        assert error_of(answer)["code"] == "unknown_host"
    for host in ("localhost", "localhost:8000", "127.0.0.1", "[::1]:80"):
        assert mock.get("/v1/models", headers={"Host": host}).status_code == 200, host
    with live(MockBackend(), keys=KEYS) as server:
        named = {"Host": "llm.example", **bearer("alice-secret")}
        assert server.get("/v1/models", headers=named).status_code == 200
    with live(MockBackend(), allow_anyone=True) as server:
        assert server.get("/v1/models", headers={"Host": "llm.example"}).status_code == 200


def test_a_form_of_another_page_is_no_request(mock: Live) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        body = json.dumps({"messages": HELLO}).encode()
        answer = mock.post("/v1/chat/completions", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 415, kind


# ---- limits


def test_bodies_have_an_end() -> None:
    with live(MockBackend(), body_bytes=1000) as server:
        answer = server.complete(prompt="x" * 2000)
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "request_too_large"

        def pieces() -> Any:
            yield b'{"prompt": "'
            for _ in range(20):
                yield b"x" * 100
            yield b'"}'

        headers = {"Content-Type": "application/json"}
        assert server.post("/v1/completions", content=pieces(), headers=headers).status_code == 413
        assert server.complete().status_code == 200


def test_no_more_choices_than_allowed() -> None:
    with live(MockBackend(), n=2, inputs=3) as server:
        assert server.chat(n=2).status_code == 200
        assert error_of(server.chat(n=3))["param"] == "n"
        assert error_of(server.complete(prompt=["a"] * 4))["param"] == "prompt"
        assert error_of(server.post("/v1/embeddings", {"input": ["a"] * 4}))["param"] == "input"
        assert error_of(server.post("/v1/rerank", {"query": "a", "documents": ["a"] * 4}))["param"] == "documents"


def test_what_is_too_much_at_once_is_told_to_come_back() -> None:
    with live(lambda: MockBackend("x" * 100, delay=0.02), open_requests=2) as server:
        with server.streaming(), server.streaming():
            answer = server.chat()
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) > 0
            assert error_of(answer)["code"] == "too_many_requests"
        until(lambda: server.service.open_requests == 0)
        assert server.chat(max_tokens=1).status_code == 200
        assert server.complete(prompt=["a"] * 3).status_code == 400  # that many will never fit


def test_a_full_line_is_told_when_to_come_back() -> None:
    def full(request: Request) -> list[Chunk]:
        raise Overloaded(7, 3.2)

    with live(Scripted(full)) as server:
        answer = server.chat()
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "4")
    assert error_of(answer)["code"] == "too_many_requests"


def test_one_key_cannot_take_all_places() -> None:
    backend = MockBackend("x" * 100, delay=0.02)
    alice, bob = bearer("alice-secret"), bearer("bob-secret-too")
    with live(backend, keys=KEYS, open_requests_per_key=1) as server, server.streaming(headers=alice):
        assert server.chat_with(alice, max_tokens=1).status_code == 429
        assert server.chat_with(bob, max_tokens=1).status_code == 200


def test_an_answer_that_takes_too_long_ends() -> None:
    with live(lambda: MockBackend("x" * 1000, delay=0.05), request_seconds=0.3) as server:
        answer = server.chat()
        assert answer.status_code == 504
        assert error_of(answer)["code"] == "request_timeout"
        *_, last, done = events(server.chat(stream=True).text)
        assert json.loads(last)["error"]["code"] == "request_timeout"
        assert done == "[DONE]"
        until(lambda: server.service.open_requests == 0)


def test_a_body_that_does_not_come_is_given_up() -> None:
    with live(MockBackend(), idle_seconds=0.2) as server, server.raw() as connection:
        connection.sendall(HEAD % 99 + b"{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


# ---- connections


@pytest.mark.parametrize("sent", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_head_that_does_not_come_is_given_up(sent: bytes) -> None:
    with live(MockBackend(), idle_seconds=0.2) as server, server.raw() as connection:
        connection.sendall(sent)
        assert closed(connection)
        assert server.get("/health").status_code == 200


def test_a_connection_is_closed_when_it_has_been_idle() -> None:
    with live(MockBackend(), idle_seconds=0.2) as server, server.raw() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(10000).startswith(b"HTTP/1.1 200")
        assert closed(connection)


@pytest.mark.parametrize("sent", [b"", HEAD % 99, HEAD % 99 + b"{"], ids=("nothing", "a head", "half a body"))
def test_idle_connections_make_room(sent: bytes) -> None:
    with live(MockBackend("x" * 200, delay=0.02), connections=5) as server, server.streaming() as running:
        idle = [server.raw() for _ in range(20)]
        for connection in idle:
            with suppress(ConnectionError):  # it may have been closed to make room
                connection.sendall(sent)
        for _ in range(3):
            with httpx.Client(base_url=server.url, trust_env=False) as fresh:
                assert fresh.get("/health").status_code == 200
        assert closed(idle[0])
        assert next(running.iter_text())  # who is served stays
        for connection in idle:
            connection.close()


def test_a_head_has_an_end() -> None:
    with live(MockBackend()) as server, server.raw() as connection:
        flood = b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"y" * 1000) for i in range(600))
        try:
            connection.sendall(flood)
            assert b"400" in connection.recv(1000)
        except ConnectionError:
            pass  # it was closed before all was sent
        assert server.get("/health").status_code == 200


def test_who_does_not_read_is_let_go() -> None:
    backend = MockBackend("x" * 200_000, context_length=1_000_000)
    with live(backend, idle_seconds=0.3) as server, server.raw(receive_buffer=4096) as connection:
        body = json.dumps({"messages": HELLO, "stream": True}).encode()
        connection.sendall(HEAD % len(body) + body)
        until(lambda: server.service.open_requests == 1)
        assert server.chat(max_tokens=1).status_code == 200  # others do not wait for it
        until(lambda: server.service.open_requests == 0)
        until(lambda: backend.stats().running == 0)
        assert backend.stats().requests_cancelled == 1


# ---- clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(stream: bool) -> None:
    backend = MockBackend("x" * 10_000, delay=0.01, context_length=100_000)
    with live(backend) as server:
        with server.raw() as connection:
            body = json.dumps({"messages": HELLO, "stream": stream, "n": 2}).encode()
            connection.sendall(HEAD % len(body) + body)
            until(lambda: backend.stats().running == 1)
        until(lambda: backend.stats().running == 0)
        assert backend.stats().requests_cancelled == 1
        until(lambda: server.service.open_requests == 0)


# ---- its life


def test_the_socket_is_open_while_the_model_loads() -> None:
    go = threading.Event()

    def slowly() -> MockBackend:
        go.wait(20)
        return MockBackend()

    with live(slowly, wait=False) as server:
        assert server.get("/health").status_code == 200
        assert (server.get("/ready").status_code, server.get("/ready").json()) == (503, {"status": "loading"})
        answer = server.chat()
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert server.get("/metrics").status_code == 200
        go.set()
        until(lambda: server.get("/ready").status_code == 200)
        assert server.chat().status_code == 200


def test_a_model_that_does_not_load_ends_the_server() -> None:
    def fail() -> MockBackend:
        raise ModelNotFound("nowhere")

    with live(fail, wait=False) as server:
        server.thread.join(20)
        assert not server.thread.is_alive()
        assert isinstance(server.service.error, ModelNotFound)


def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    with live(lambda: MockBackend("x" * 50, delay=0.02)) as server:
        with server.streaming() as running:
            server.signal()
            until(lambda: server.service.phase == "draining")
            answer = server.chat()
            assert answer.status_code == 503
            assert error_of(answer)["code"] == "draining"
            assert server.get("/ready").status_code == 503
            assert server.get("/health").status_code == 200
            text = "".join(
                json.loads(data)["choices"][0]["delta"].get("content", "")
                for data in events(running.read().decode())[:-1]
            )
            assert text == "x" * 50
        server.thread.join(20)
        assert not server.thread.is_alive()


def test_draining_has_an_end() -> None:
    backend = MockBackend("x" * 100_000, delay=0.02, context_length=200_000)
    with live(backend, drain_seconds=0.2) as server, server.streaming() as running:
        server.signal()
        *_, last, done = events(running.read().decode())
        assert json.loads(last)["error"]["code"] == "cancelled"
        assert done == "[DONE]"
        server.thread.join(20)
        assert not server.thread.is_alive()


class Dying(Scripted):
    """A backend whose engine fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.dead = threading.Event()

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        while not self.dead.is_set():
            await asyncio.sleep(0.01)
            yield Chunk("r", 0, "x", (1,))
        yield Chunk("r", finish_reason="error", error=EngineClosed("The engine failed."))


def test_when_the_engine_dies_all_are_told_and_the_server_ends() -> None:
    backend = Dying()
    with live(backend) as server:
        with server.streaming() as one, server.streaming() as two:
            backend.dead.set()
            for running in (one, two):
                *_, last, done = events(running.read().decode())
                assert json.loads(last)["error"]["type"] == "service_unavailable"
                assert done == "[DONE]"
        server.thread.join(20)
        assert not server.thread.is_alive()
        assert server.service.phase == "failed"


def test_a_failure_of_one_request_is_its_own() -> None:
    with live(MockBackend("hello", fail_after=2)) as server:
        answer = server.chat()
        assert answer.status_code == 500
        assert "as scripted" in error_of(answer)["message"]
        *_, last, done = events(server.chat(stream=True).text)
        assert "as scripted" in json.loads(last)["error"]["message"]
        assert done == "[DONE]"
        assert server.get("/ready").status_code == 200


def test_a_bug_is_told_to_the_log_and_not_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    def broken(request: Request) -> list[Chunk]:
        raise KeyError("secret detail")

    with caplog.at_level(logging.ERROR, "tramontane"), live(Scripted(broken)) as server:
        answer = server.chat()
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "secret detail" in caplog.text


def test_nothing_is_reported_wherever_the_environment_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    with socket.create_server(("127.0.0.1", 0)) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.getsockname()[1]}")
        with live(MockBackend()) as server:
            assert server.chat().status_code == 200
        collector.setblocking(False)
        with pytest.raises(BlockingIOError):
            collector.accept()


def test_behind_a_proxy_that_mounts_it() -> None:
    with live(MockBackend(), root_path="/llm", keys=KEYS) as server:
        assert server.get("/health").status_code == 200  # the proxy cuts the path off
        assert server.get("/v1/models").status_code == 401
        assert server.get("/v1/models", headers=bearer("alice-secret")).status_code == 200
        assert server.get("/openapi.json").json()["servers"] == [{"url": "/llm"}]
    for odd in ("llm", "/llm/"):
        with pytest.raises(InvalidRequest):
            ServerSettings(("m",), root_path=odd)


def test_https(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    with live(MockBackend("hi"), tls_certificate=certificate, tls_key=key) as server:
        assert server.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=server.url, verify=trusting, trust_env=False) as client:
            assert client.get("/health").status_code == 200
    with pytest.raises(InvalidRequest, match="go together"):
        ServerSettings(("m",), tls_certificate=certificate)


# ---- logs and metrics


def test_requests_have_ids(mock: Live) -> None:
    assert mock.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    own = {mock.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(own) == 3
    odd = mock.get("/health", headers={"X-Request-Id": "a b\tc" * 50}).headers["x-request-id"]
    assert odd.startswith("req-")
    assert "x-request-id" in mock.get("/nowhere").headers
    assert "x-request-id" in mock.chat(store=True).headers


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.request for record in caplog.records if hasattr(record, "request")]


def test_a_line_a_request_without_what_was_asked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tramontane"), live(MockBackend("A secret answer."), keys=KEYS) as server:
        body = {"messages": [{"role": "user", "content": "A secret question."}], "user": "u-1", "max_tokens": 3}
        server.post("/v1/chat/completions", body, headers={**bearer("alice-secret"), "X-Request-Id": "mine"})
        server.chat_with({})
    (line, refused) = logged(caplog)
    assert line["id"] == "mine"
    assert line["key"] == "alice"
    assert line["user"] == "u-1"
    assert (line["status"], line["path"], line["completion_tokens"]) == (200, "/v1/chat/completions", 3)
    assert line["finish_reasons"] == ["length"]
    assert refused["status"] == 401
    assert "secret" not in json.dumps([line, refused])


def test_what_was_asked_is_logged_when_that_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tramontane"), live(MockBackend(), log_prompts=True) as server:
        server.complete(prompt="Once upon")
    assert logged(caplog)[0]["prompt"] == {"prompt": "Once upon"}


def test_metrics_by_the_names_that_dashboards_know() -> None:
    with live(MockBackend("hello"), keys=KEYS) as server:
        for _ in range(2):
            server.chat_with(bearer("alice-secret"), max_tokens=3)
        text = server.get("/metrics", headers=bearer("bob-secret-too")).text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['vllm:request_success_total{finished_reason="length",model_name="mock"}'] == "2.0"
    assert lines['vllm:time_to_first_token_seconds_count{model_name="mock"}'] == "2.0"
    assert lines['vllm:inter_token_latency_seconds_count{model_name="mock"}'] == "4.0"
    assert lines['vllm:e2e_request_latency_seconds_count{model_name="mock"}'] == "2.0"
    assert lines['vllm:generation_tokens_total{model_name="mock"}'] == "6.0"
    assert lines['vllm:num_requests_running{model_name="mock"}'] == "0.0"
    assert lines['tramontane:key_tokens_total{key="alice",kind="completion"}'] == "6.0"
    route = 'path="/v1/chat/completions",status="200"'
    assert lines[f'tramontane:http_requests_total{{key="alice",{route}}}'] == "2.0"


def test_made_up_paths_are_counted_as_one() -> None:
    with live(MockBackend()) as server:
        for number in range(3):
            server.get(f"/nowhere/{number}")
        text = server.get("/metrics").text
    assert 'tramontane:http_requests_total{key="",path="none",status="404"} 3.0' in text


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


class StuckPipe(io.StringIO):
    def __init__(self, go: threading.Event) -> None:
        super().__init__()
        self.go = go

    def write(self, text: str) -> int:
        self.go.wait(20)
        return super().write(text)


def test_a_full_disk_and_a_pipe_that_nobody_reads_cost_no_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    for stream in (FullDisk(), StuckPipe(go)):
        monkeypatch.setattr(sys, "stderr", stream)
        with kept_logging():
            start_logging(ServerSettings(("mock",)))
            with live(MockBackend("hi")) as server:
                assert server.chat().status_code == 200
    go.set()
    until(lambda: '"status": 200' in stream.getvalue())


def test_the_log_is_json_with_times_and_without_colours(tmp_path: Path) -> None:
    file = tmp_path / "server.log"
    with kept_logging():
        start_logging(ServerSettings(("mock",), log_file=file))
        with live(MockBackend("hi")) as server:
            server.chat(store=True)
            server.chat(user="line\nbreak")
        logging.getLogger("tramontane").handlers[0].close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    requests = [line for line in lines if line["message"] == "request"]
    assert [line["status"] for line in requests] == [400, 200]
    assert requests[1]["user"] == "line\nbreak"
    assert all(line["time"].endswith("Z") and line["level"] for line in lines)


def test_the_log_for_people_shows_no_control_characters() -> None:
    record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "request": {"user": "\x1b[31mred\nline"}})
    assert "\x1b" not in (text := PlainLines().format(record))
    assert "\n" not in text


@contextmanager
def kept_logging() -> Iterator[None]:
    """Whatever is done to loggers in here is undone."""
    loggers = [logging.getLogger(name) for name in ("tramontane", "uvicorn")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    try:
        yield
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)


def closed(connection: socket.socket) -> bool:
    """Waits until the other side closes the connection."""
    connection.settimeout(20)
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    return True
