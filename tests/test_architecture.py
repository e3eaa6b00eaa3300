"""Imports go down only: the syntax tree of every module, imports inside functions included, is held to the order."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tramontane

ROOT = Path(tramontane.__file__).parent

# From the top down; a module imports from its own row and from those below.
ORDER = [
    {"cli", "server", "integrations", "__main__"},
    {"llm", "inputs", "functions", "gather", "bridge", ""},
    {"backends"},
    {"quantize", "evaluate"},
    {"engine", "text"},
    {"loading"},
    {"models"},
    {"adapters", "layers"},
    {"weights"},
    {"kernels"},
    {"platform", "tracing"},
    {"config", "types", "errors"},
    {"records"},
]
RANK = {part: len(ORDER) - i for i, row in enumerate(ORDER) for part in row}

HOST_ONLY = {
    *("engine.beams", "engine.blocks", "engine.places", "engine.scheduler", "engine.sequence", "engine.step"),
    "engine.waiting",
    "engine.pace",
}
ARRAY_LIBRARIES = {"numpy", "ml_dtypes", "torch", "jax", "cupy", "safetensors"}
TORCH_ALLOWED = ("kernels.torch_", "kernels.triton", "models.fallback", "backends.transformers")
SERVER_KNOWS = {"server", "backends.base", "types", "errors", "config", "platform", "records"}
SERVER_DEPENDENCIES = {"fastapi", "starlette", "pydantic", "pydantic_core", "uvicorn", "prometheus_client"}
EXTRAS = {"llguidance": "text.grammar"}
"""What is imported, lazily, by one module alone."""
DEPENDENCIES = {
    "numpy",
    "ml_dtypes",
    "tokenizers",
    "jinja2",
    "safetensors",
    "huggingface_hub",
    "typer",
    "rich",
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """`engine.blocks`; a package's `__init__` has the package's name, the root's is empty."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that a module imports, wherever it does so."""
    package = ["tramontane", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from tramontane import bridge` imports the module tramontane.bridge
                inner = source.replace(".", "/").removeprefix("tramontane").lstrip("/")
                is_module = source.split(".")[0] == "tramontane" and (
                    alias.name == "_native"  # compiled, and not there in a pure installation
                    or (ROOT / inner / f"{alias.name}.py").exists()
                    or (ROOT / inner / alias.name).is_dir()
                )
                yield node.lineno, f"{source}.{alias.name}" if is_module else source


def only_for_types(path: Path) -> set[int]:
    """The lines below `if TYPE_CHECKING:`, which never run."""
    return {
        line
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in node.body
        for line in range(inner.lineno, (inner.end_lineno or inner.lineno) + 1)
    }


def ours(name: str) -> str | None:
    """The name inside the package, or None for what is not ours."""
    if name != "tramontane" and not name.startswith("tramontane."):
        return None
    return name.removeprefix("tramontane").lstrip(".")


ALL = [pytest.param(path, id=name_of(path) or "tramontane") for path in modules()]


def test_every_part_has_its_place() -> None:
    parts = {name_of(path).split(".")[0] for path in modules()}
    assert parts <= RANK.keys()


@pytest.mark.parametrize("path", ALL)
def test_imports_go_down_only(path: Path) -> None:
    part = name_of(path).split(".")[0]
    for line, name in imports(path):
        target = ours(name)
        if target is None or target == "_native":
            continue
        target = target.split(".")[0]
        assert RANK[target] <= RANK[part], f"{path}:{line}: {part} may not import {target}"


@pytest.mark.parametrize("path", ALL)
def test_classes_are_made_by_our_dataclass(path: Path) -> None:
    """The standard library's takes four times as long for each, at every start."""
    if name_of(path) == "records":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "dataclasses":
            assert "dataclass" not in {alias.name for alias in node.names}, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", ALL)
def test_the_top_knows_backends_and_no_engine(path: Path) -> None:
    if RANK[name_of(path).split(".")[0]] <= RANK["backends"]:
        return
    never_run = only_for_types(path)
    for line, name in imports(path):
        target = (ours(name) or "").split(".")[0]
        assert line in never_run or target not in ("engine", "models"), f"{path}:{line}: imports {name}"


@pytest.mark.parametrize("path", ALL)
def test_the_server_knows_protocols_and_plain_data(path: Path) -> None:
    if name_of(path).split(".")[0] != "server":
        return
    for line, name in imports(path):
        target = ours(name)
        allowed = target is None or target.split(".")[0] in SERVER_KNOWS or target in SERVER_KNOWS
        assert allowed, f"{path}:{line}: imports {name}"


@pytest.mark.parametrize("path", ALL)
def test_bookkeeping_knows_no_arrays(path: Path) -> None:
    if name_of(path) not in HOST_ONLY:
        return
    for line, name in imports(path):
        assert name.split(".")[0] not in ARRAY_LIBRARIES, f"{path}:{line}: imports {name}"
        target = ours(name)
        assert (
            target is None or target.split(".")[0] in ("types", "errors", "config", "records") or target in HOST_ONLY
        ), f"{path}:{line}: imports {name}, which may hold arrays"


@pytest.mark.parametrize("path", ALL)
def test_torch_is_imported_in_few_places(path: Path) -> None:
    name = name_of(path)
    allowed = name.startswith(TORCH_ALLOWED)
    for line, imported in imports(path):
        if imported.split(".")[0] in ("torch", "transformers", "triton"):
            assert allowed, f"{path}:{line}: imports {imported}"


@pytest.mark.parametrize("path", ALL)
def test_nothing_but_the_dependencies_is_imported(path: Path) -> None:
    extra = SERVER_DEPENDENCIES if name_of(path).split(".")[0] == "server" else set()
    for line, name in imports(path):
        top = name.split(".")[0]
        known = top == "tramontane" or top in sys.stdlib_module_names or top in DEPENDENCIES | extra
        known = known or EXTRAS.get(top) == name_of(path)
        assert known or top in ("torch", "transformers", "triton"), f"{path}:{line}: imports {name}"


@pytest.mark.parametrize("path", ALL)
def test_every_module_says_what_it_owns(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
