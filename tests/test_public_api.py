"""The public names are pinned, and importing them costs next to nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tramontane

NAMES = """
    LLM AsyncLLM SamplingParams load_gguf_hf ModelSource
    Message TextPart ImagePart AudioPart Tool ToolCall ToolCallDelta NamedTool Grammar Request
    Chunk Choice Result TokenLogprob Score Usage Stats
    EmbedRequest Embedding RerankRequest RerankResult Ranked
    TramontaneError ModelNotFound UnsupportedModel CorruptCheckpoint OutOfMemory DeviceNotAvailable InvalidRequest
    ContextLengthExceeded DownloadFailed AuthenticationRequired MissingExtra TemplateError RequestCancelled EngineClosed
    RequestTimeout Overloaded
    __version__
""".split()  # noqa: SIM905  (a list of strings would be four times as long)

HEAVY = {"numpy", "ml_dtypes", "torch", "tokenizers", "jinja2", "safetensors", "huggingface_hub", "llguidance", "typer"}


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter holds after running `code`."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    out = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_the_names_are_pinned() -> None:
    assert sorted(tramontane.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(tramontane))


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_there(name: str) -> None:
    value = getattr(tramontane, name)
    assert name == "__version__" or value.__name__ == name


def test_other_names_are_not() -> None:
    assert not hasattr(tramontane, "Engine")
    # what is imported for the public names is not public itself
    assert not hasattr(tramontane, "math")


def test_the_version_is_a_plain_line() -> None:
    source = Path(tramontane.__file__).read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE) == [tramontane.__version__]


def test_importing_the_package_imports_nothing_else() -> None:
    loaded = loaded_by("import tramontane")
    assert not HEAVY & loaded
    assert {name for name in loaded if name.startswith("tramontane")} == {"tramontane"}
    assert "asyncio" not in loaded


def test_importing_the_facade_loads_no_model_code() -> None:
    loaded = loaded_by("from tramontane import LLM, AsyncLLM, SamplingParams")
    assert not HEAVY & loaded
    assert not {
        name for name in loaded if re.match(r"tramontane\.(engine|models|layers|weights|kernels|loading)", name)
    }


def test_the_mock_needs_no_library() -> None:
    loaded = loaded_by("from tramontane import LLM\nLLM('mock').generate('a')")
    assert not HEAVY & loaded
