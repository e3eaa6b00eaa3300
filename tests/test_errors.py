"""The error family: one tree, three parts to each message, whole after pickling."""

from __future__ import annotations

import copy
import pickle

import pytest

from tramontane import errors
from tramontane.errors import TramontaneError

SAMPLES: list[TramontaneError] = [
    errors.TramontaneError("It broke.", "Mend it."),
    errors.ModelNotFound("/no/such", "there is no such file"),
    errors.UnsupportedModel("The activation 'swoosh' is unknown.", "Use another model."),
    errors.CorruptCheckpoint("/a/file", "it ends after 12 bytes"),
    errors.OutOfMemory("9 GB are needed, 4 GB are free"),
    errors.DeviceNotAvailable("cuda:3", "there are 2"),
    errors.InvalidRequest("top_p", "1.5 is out of range", "It must be at most 1."),
    errors.ContextLengthExceeded(300, 256),
    errors.DownloadFailed("The disk is full.", "Free 98 MB."),
    errors.AuthenticationRequired("The source wants a token."),
    errors.MissingExtra("torch", "CUDA"),
    errors.TemplateError("The chat template refuses the conversation."),
    errors.RequestCancelled("r-1"),
    errors.RequestTimeout("r-1", 2.5),
    errors.Overloaded(12, 3.0),
    errors.EngineClosed("The engine was closed."),
]


def test_every_class_is_sampled() -> None:
    family = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TramontaneError)}
    assert family == {type(error) for error in SAMPLES}


@pytest.mark.parametrize("error", SAMPLES, ids=lambda e: type(e).__name__)
def test_errors_survive_pickling_and_copying(error: TramontaneError) -> None:
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert vars(other) == vars(error)


@pytest.mark.parametrize("error", SAMPLES, ids=lambda e: type(e).__name__)
def test_a_message_is_one_line_of_sentences(error: TramontaneError) -> None:
    assert str(error) == f"{error.message} {error.remedy}".strip()
    assert "\n" not in str(error)
    assert str(error).endswith(".")
    assert "  " not in str(error)


def test_messages_name_the_value() -> None:
    assert "/no/such" in str(errors.ModelNotFound("/no/such"))
    assert "300" in str(errors.ContextLengthExceeded(300, 256))
    assert "tramontane[torch]" in str(errors.MissingExtra("torch", "CUDA"))
    assert "cuda:3" in str(errors.DeviceNotAvailable("cuda:3"))
    assert str(errors.RequestCancelled()) == "Request was cancelled."


def test_errors_are_also_what_python_calls_them() -> None:
    assert issubclass(errors.InvalidRequest, ValueError)
    assert issubclass(errors.ContextLengthExceeded, errors.InvalidRequest)
    assert issubclass(errors.MissingExtra, ImportError)
