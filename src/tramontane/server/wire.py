"""JSON on the wire: what is taken from a client, and how answers are written.

Owns the rules that Python's reader of JSON lacks. Must not know: schemas, what the JSON says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from tramontane.server.problems import Problem

MAX_DEPTH = 100
"""Of objects and lists in each other. No request needs as many, and what walks a schema by recursion may not."""
MAX_PARTS = 100_000
"""Objects, lists and texts (names too) in all. To read and check so many takes about a tenth of a second, in which all
others wait: no request needs as many, but a few megabytes hold millions."""
_BETWEEN = bytes({*range(256)}.difference(b'"[{'))
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def encode(value: Any) -> bytes:
    """Compact JSON. Half a surrogate pair, which UTF-8 cannot hold, is escaped as JSON does it."""
    return _ENCODER.encode(value).encode("utf-8", "backslashreplace")


def decode(body: bytes) -> Any:
    """JSON as its standard has it: UTF-8, finite numbers, no abyss, no dust. Raises Problem (400)."""
    _check_parts(body)
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise _malformed(f"It is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise _malformed(f"It nests deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise _malformed(f"{error}") from None
    except ValueError:  # what Python says of an integer that would take too long to read
        raise _malformed("An integer has too many digits") from None
    _check_depth(value)
    if _ESCAPED_HALF.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _malformed("It holds half of a surrogate pair, which is no character") from None
    return value


def _malformed(detail: str) -> Problem:
    return Problem(400, f"The body cannot be read as JSON. {detail.rstrip('.')}.", code="invalid_json")


def _refuse_constant(name: str) -> NoReturn:
    raise _malformed(f"{name} is not in it")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _malformed(f"The number {text:.40} is too large")
    return value


def _check_parts(body: bytes) -> None:
    """By their marks alone, before anything is read. What is no JSON is counted somehow, and refused either way."""
    if len(body) < 2 * MAX_PARTS:
        return
    marks = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _BETWEEN)
    parts = marks.count(b'"') // 2
    if parts <= MAX_PARTS:
        parts += len(b"".join(marks.split(b'"')[::2]))
    if parts > MAX_PARTS:
        raise _malformed(f"It holds more than {MAX_PARTS} texts, objects and lists")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise _malformed(f"It nests deeper than {MAX_DEPTH} levels")


class _Decoded(Request):
    """A request whose body has been read."""

    value: Any = None

    async def json(self) -> Any:
        return self.value


class StrictRoute(APIRoute):
    """A route that reads its body by `decode`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            decoded = _Decoded(request.scope, request.receive)
            body = await decoded.body()
            if body:
                _check_type(request.headers.get("content-type", ""))
                decoded.value = decode(body)
            return await handle(decoded)

        return strictly


def _check_type(given: str) -> None:
    """A page of another origin can send other types without asking the browser; nobody else has a reason to."""
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"The Content-Type is {kind!r:.80}. Send application/json."
        raise Problem(415, message, code="unsupported_media_type")


class JsonResponse(Response):
    """An answer in JSON, written by `encode`."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)
