"""The registry: the backend that a name asks for, or a refusal that says which there are; other packages' backends."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from tests.backends import elsewhere
from tramontane.backends import registry
from tramontane.backends.base import REQUEST_FIELDS, check_request
from tramontane.backends.declared import Declared
from tramontane.backends.mock import MockBackend
from tramontane.backends.registry import BUILT_IN, GROUP, choose, declared, names, open_backend, those_that
from tramontane.errors import InvalidRequest, MissingExtra, ModelNotFound
from tramontane.inputs import SAMPLING_FIELDS
from tramontane.llm import LLM
from tramontane.types import Request, SamplingParams


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAMONTANE_BACKEND", raising=False)


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that brings one backend, and an entry point that leads nowhere."""
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    points = "parrot = tests.backends.elsewhere:DECLARED\nlost = no.such.module:DECLARED\nmock = no.such.module:MOCK\n"
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{points}odd = tests.backends.elsewhere:ParrotBackend\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def opened(model: str | Path | None, options: dict[str, Any] | None = None, **more: Any) -> Any:
    return open_backend(model, options or {}, SamplingParams(), **more)


@pytest.mark.parametrize(("model", "backend"), [("mock", None), ("mock", "mock"), (None, "mock"), ("mock/", None)])
def test_mock(model: str | None, backend: str | None) -> None:
    assert isinstance(opened(model, backend=backend), MockBackend)


def test_the_mock_takes_what_it_can_honour() -> None:
    assert opened("mock", {"context_length": 77}).capabilities().context_length == 77
    assert opened("mock", {"max_model_len": 78}).capabilities().context_length == 78
    with LLM("mock", script=["Hello", "Bye"], fail_after=100) as llm:
        assert [llm.generate("x").text for _ in range(3)] == ["Hello", "Bye", "Hello"]
    with pytest.raises(InvalidRequest, match="chat_template"):
        opened("mock", chat_template="{{ messages }}")
    with pytest.raises(InvalidRequest, match="model"):
        opened("mock/some-model")
    for wrong in ({"delay": -1}, {"delay": "soon"}, {"fail_after": 1.5}, {"script": 3}, {"context_length": True}):
        with pytest.raises(InvalidRequest) as caught:
            opened("mock", wrong)
        assert caught.value.field in wrong


# ---- options


def test_an_option_that_a_backend_lacks_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"block_size.*mock backend.*a backend that has it: native") as caught:
        opened("mock", {"block_size": 8})
    assert caught.value.field == "block_size"
    with pytest.raises(InvalidRequest, match=r"max_pages.*mock backend.*native") as caught:
        opened("mock", {"max_pages": 8})
    assert caught.value.field == "max_pages"
    with pytest.raises(InvalidRequest, match=r"blok_size.*native backend.*block_size"):
        opened("a.gguf", {"blok_size": 8})
    with pytest.raises(InvalidRequest, match="already given"):
        opened("mock", {"context_length": 8, "max_model_len": 8})
    assert opened("mock", {"context_length": None, "max_model_len": 9}).capabilities().context_length == 9


# ---- choosing


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_backend_is_chosen_in_three_ways(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = "org/model" if declared(name).takes_model else None
    asked = "org/model" if model else ""
    assert choose(model, name) == (declared(name), asked)
    assert choose(f"{name}/{asked}" if model else name) == (declared(name), asked)
    monkeypatch.setenv("TRAMONTANE_BACKEND", name)
    assert choose(model) == (declared(name), asked)
    assert choose("org/model", "native") == (declared("native"), "org/model")
    assert choose("native/org/model") == (declared("native"), "org/model")


def test_no_model_is_the_demo_model_of_those_that_take_one() -> None:
    for name in BUILT_IN:
        chosen, model = choose(None, name)
        assert bool(model) == chosen.takes_model


def test_an_unknown_backend_and_two_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match=r"llamafile.*native.*mock"):
        opened("a.gguf", backend="llamafile")
    with pytest.raises(InvalidRequest, match=r"native.*mock"):
        opened("mock", backend="native")
    monkeypatch.setenv("TRAMONTANE_BACKEND", "llamafile")
    with pytest.raises(InvalidRequest, match="llamafile") as caught:
        opened("a.gguf")
    assert caught.value.field == "TRAMONTANE_BACKEND"


@pytest.mark.parametrize("model", ["native/./no/such.gguf", "./no/such.gguf", Path("no/such.gguf")])
def test_native_is_the_default(model: str | Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no/such\.gguf") as caught:
        opened(model)
    assert "native" not in str(caught.value)


def test_a_path_is_never_read_as_a_backend() -> None:
    with pytest.raises(ModelNotFound):
        opened(Path("mock/model.gguf"))


def test_a_template_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"chat_template.*none\.jinja"):
        opened("mock", chat_template=tmp_path / "none.jinja")


# ---- what they declare


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_declaration_is_true_to_the_fields_that_there_are(name: str) -> None:
    one = declared(name)
    assert one.name == name
    assert one.summary
    assert one.sampling_fields <= SAMPLING_FIELDS
    assert one.request_fields <= REQUEST_FIELDS
    assert {"generate", "chat"} <= one.abilities
    assert bool(one.modules) == bool(one.extra)


def test_a_refused_field_says_who_honours_it() -> None:
    backend = MockBackend()
    request = Request(prompt="x", sampling=SamplingParams(logit_bias={1: 1.0}))
    with pytest.raises(InvalidRequest, match=r"logit_bias.*mock.*or use a backend that does: native"):
        check_request(request, backend.capabilities())
    assert "mock" not in those_that(lambda one: "logit_bias" in one.sampling_fields)


def test_an_ability_that_is_lacking_says_who_has_it() -> None:
    from tramontane.errors import UnsupportedModel

    with LLM("mock") as llm, pytest.raises(UnsupportedModel, match=r"mock.*Backends that do: native"):
        llm.add_allocation_listener(object())  # type: ignore[arg-type]


def test_an_absent_extra_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BUILT_IN:
        one = declared(name)
        if not one.modules:
            continue
        monkeypatch.setattr(Declared, "missing", lambda self: list(self.modules))
        with pytest.raises(MissingExtra, match=rf"pip install 'tramontane\[{one.extra}\]'"):
            opened("./no-model", backend=name)


def test_asking_about_all_of_them_imports_no_extra() -> None:
    script = (
        "import sys, tramontane\n"
        "from tramontane.backends import registry\n"
        "registry.those_that(lambda one: True)\n"
        "tramontane.LLM('mock').close()\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'mistralrs'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


# ---- other packages'


@pytest.mark.usefixtures("added")
def test_another_package_adds_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert names()[: len(BUILT_IN)] == list(BUILT_IN)
    assert "parrot" in names()
    for model, options in (("parrot/Polly", {}), ("Polly", {"backend": "parrot"})):
        with LLM(model, loudness=2, **options) as llm:
            assert isinstance(llm.backend, elsewhere.ParrotBackend)
            assert llm.generate("Hello").text == "HelloHello"
            assert llm.capabilities().model == "Polly"
    monkeypatch.setenv("TRAMONTANE_BACKEND", "parrot")
    with LLM("Polly") as llm:
        assert llm.generate("Hello").text == "Hello"
        with pytest.raises(InvalidRequest, match=r"top_k.*parrot.*native"):
            llm.generate("Hello", top_k=3)
    with pytest.raises(InvalidRequest, match=r"num_blocks.*parrot.*native"):
        LLM("Polly", num_blocks=3)


@pytest.mark.usefixtures("added")
def test_what_is_installed_is_read_again_only_where_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def counted(**chosen: str) -> Any:
        reads.append(chosen)
        return entry_points(**chosen)

    monkeypatch.setattr("importlib.metadata.entry_points", counted)
    registry._added_by.cache_clear()
    for _ in range(3):
        assert "parrot" in those_that(lambda one: "max_tokens" in one.sampling_fields)
    assert len(reads) == 1
    (tmp_path / "another-1.0.dist-info").mkdir()
    (tmp_path / "another-1.0.dist-info" / "entry_points.txt").write_text(f"[{GROUP}]\nowl = tests.owl:DECLARED\n")
    os.utime(tmp_path, (0, 0))  # a file system may tell no time as short as that
    assert {"owl", "parrot"} <= set(names())
    assert len(reads) == 2


@pytest.mark.usefixtures("added")
def test_an_entry_point_that_leads_nowhere_is_told_to_who_asks_for_it() -> None:
    with pytest.raises(InvalidRequest, match=r"lost.*no\.such\.module.*does not load"):
        opened("lost/model")
    with pytest.raises(InvalidRequest, match=r"odd.*is no.*Declared"):
        opened("x", backend="odd")
    assert isinstance(opened("mock"), MockBackend)  # ours keep their names
    able = those_that(lambda one: "generate" in one.abilities)
    assert "parrot" in able
    assert not {"lost", "odd"} & set(able)
    assert registry.DEFAULT in able
