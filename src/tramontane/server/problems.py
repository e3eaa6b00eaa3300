"""What went wrong, as a client reads it: a status and OpenAI's error object.

Owns the table from our errors to statuses and codes, and the shape of every error. Must not know: routes, backends.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from tramontane.errors import (
    ContextLengthExceeded,
    EngineClosed,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
    RequestCancelled,
    RequestTimeout,
    TemplateError,
    TramontaneError,
    UnsupportedModel,
)
from tramontane.records import dataclass

log = logging.getLogger("tramontane.server")


@dataclass
class Problem(Exception):
    """An error on its way to a client."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        content = json.dumps(self.body(), ensure_ascii=True).encode()
        return Response(content, self.status, headers=dict(self.headers), media_type="application/json")


class ClientGone(Exception):
    """The client left before its answer; nobody reads what is returned."""


# Our errors: status, type, code. The first row that an error is an instance of says what it becomes.
_ERRORS: Sequence[tuple[type[Exception], int, str, str | None]] = (
    (ContextLengthExceeded, 400, "invalid_request_error", "context_length_exceeded"),
    (InvalidRequest, 400, "invalid_request_error", "invalid_value"),
    (OutOfMemory, 400, "invalid_request_error", "context_length_exceeded"),
    (TemplateError, 400, "invalid_request_error", "invalid_messages"),
    (UnsupportedModel, 400, "invalid_request_error", "unsupported_by_model"),
    (EngineClosed, 503, "service_unavailable", "engine_closed"),
    (Overloaded, 429, "rate_limit_exceeded", "too_many_requests"),
    (RequestTimeout, 504, "timeout", "request_timeout"),
    (RequestCancelled, 503, "service_unavailable", "cancelled"),
    (TramontaneError, 500, "server_error", None),
)


def problem_of(error: BaseException, names: Mapping[str, str] | None = None) -> Problem:
    """An error as a Problem. `names`: what the client calls our fields, where it calls them otherwise.

    What is none of ours is a bug: it is logged whole, and the client learns only that it happened.
    """
    if isinstance(error, Problem):
        return error
    for kind, status, type_, code in _ERRORS:
        if isinstance(error, kind):
            ours = getattr(error, "field", "messages" if kind is TemplateError else None)
            param = (names or {}).get(ours, ours) if ours else None
            message = str(error)
            if ours and param != ours:
                message = message.replace(f"Invalid {ours}:", f"Invalid {param}:", 1)
            headers = {"Retry-After": str(math.ceil(error.retry_after))} if isinstance(error, Overloaded) else {}
            return Problem(status, message, type_, param, code, headers)
    log.error("unexpected error", exc_info=error)
    return Problem(500, "The server met an error of its own; its log says more.", "server_error")


# Kinds of pydantic's complaints: the code that OpenAI has for them. The rest are values out of range.
_CODES = {
    "missing": "missing_required_parameter",
    "union_tag_not_found": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "refused": "unsupported_parameter",
    "json_invalid": "invalid_json",
}


def problem_of_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> Problem:
    """The complaint that reaches deepest into the body, and of those one that is not about a type: of a union's
    members, it is about the one that was meant."""
    deepest = max(errors, key=lambda error: (len(_steps(error, body)), not str(error["type"]).endswith("_type")))
    param, kind = _shown(_steps(deepest, body)), str(deepest["type"])
    where = f"Invalid {param}: " if param else "The body is not what this endpoint takes: "
    message = {
        "missing": f"The field {param} is missing.",
        "union_tag_not_found": f"The field {param} is missing.",
        "extra_forbidden": f"The field {param} is unknown here. Leave it out.",
    }.get(kind, f"{where}{str(deepest['msg']).rstrip('.')}.")
    code = _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    return Problem(400, message, param=param or None, code=code)


def _steps(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Where in the body an error is: its location without the names of union members, which are no keys."""
    steps: list[str | int] = []
    location = [part for part in error["loc"] if part != "body"] if error["loc"][:1] == ("body",) else error["loc"]
    for number, part in enumerate(location):
        inside = (isinstance(body, dict) and part in body) or (
            isinstance(body, list) and isinstance(part, int) and part < len(body)
        )
        last = number == len(location) - 1 and error["type"] in ("missing", "extra_forbidden")
        if inside:
            body = body[part]
        elif not last:
            continue
        steps.append(part)
    if str(error["type"]).startswith("union_tag"):
        steps.append(str(error["ctx"]["discriminator"]).strip("'"))
    return steps


def _shown(steps: Sequence[str | int]) -> str:
    """messages[0].content"""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")


async def on_problem(request: Request, error: Exception) -> Response:
    """FastAPI's handler for whatever a route raises."""
    if isinstance(error, ClientGone):
        return Response(status_code=499)
    if isinstance(error, RequestValidationError):
        problem = problem_of_validation(error.errors(), error.body)
    elif isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        where = f"{request.method} {request.url.path}"
        message = {404: f"There is no {where}.", 405: f"{where} is not allowed."}.get(error.status_code, error.detail)
        problem = Problem(error.status_code, message, code=code, headers=error.headers or {})
    else:
        problem = problem_of(error)
    request.state.record.error = problem.message
    return problem.response()
