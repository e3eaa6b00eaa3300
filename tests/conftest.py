"""What all tests share: where real weights and data are, and what happens when they are not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Machines are busy and slow: how long an example takes says nothing. The first text that hypothesis draws in a process
# alone takes it a second, for its table of Unicode.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_configure() -> None:
    # Jobs in a shell's background ignore Ctrl-C and hand that on; some tests send it to themselves and to others.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def missing(reason: str) -> None:
    """Skip, naming what is missing; under CI=true that is a failure: CI must have everything."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (under CI nothing may be missing)")
    pytest.skip(reason)


def model_path(name: str) -> Path:
    """A file or folder of real weights below $TEST_MODELS (default ~/.cache/test-models)."""
    path = Path(os.environ.get("TEST_MODELS", Path.home() / ".cache" / "test-models")) / name
    if not path.exists():
        missing(f"no {name} in $TEST_MODELS ({path.parent})")
    return path


def data_path(name: str) -> Path:
    """A file or folder of test data below $TRAMONTANE_TEST_DATA."""
    root = os.environ.get("TRAMONTANE_TEST_DATA")
    if not root:
        missing("TRAMONTANE_TEST_DATA is not set")
    path = Path(root or "") / name
    if not path.exists():
        missing(f"no {name} in $TRAMONTANE_TEST_DATA ({root})")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return model_path("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def stories15m() -> Path:
    path = model_path("stories15m")
    if not (path / "model.safetensors").exists():
        missing(f"no model.safetensors in {path}")
    return path


@pytest.fixture(scope="session")
def qwen_coder() -> Path:
    return model_path("qwen2.5-coder-1.5b-instruct-q4_k_m.gguf")


@pytest.fixture(scope="session")
def wikitext() -> Path:
    return data_path("wikitext2-test.txt")
