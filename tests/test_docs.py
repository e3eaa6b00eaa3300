"""What README, docs and examples say, held to what is there: options, fields, errors, commands, links, code."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import tramontane
from tramontane.cli.app import app
from tramontane.config import ALIASES, option_names
from tramontane.errors import TramontaneError
from tramontane.inputs import SAMPLING_FIELDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="this copy of the sources has no documents")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_readme_sets_up_with_two_commands() -> None:
    (commands,) = blocks(page("README.md"), "sh")
    run, test = commands.splitlines()
    assert run.endswith('.venv/bin/tramontane run "Why is the sky blue?"')
    assert test.endswith(".venv/bin/pytest")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


def test_every_option_field_and_error_is_explained() -> None:
    text = page("docs/python.md")
    errors = {name for name in tramontane.__all__ if isinstance(getattr(tramontane, name), type)}
    errors = {name for name in errors if issubclass(getattr(tramontane, name), TramontaneError)}
    for name in {*option_names(), *ALIASES, *SAMPLING_FIELDS, *errors}:
        assert re.search(rf"`{name}[`(=]", text), name


def commands() -> dict[str, set[str]]:
    """Each command, as it is called, and its long options."""
    root: Any = typer.main.get_command(app)
    context = root.make_context("tramontane", [], resilient_parsing=True)
    found = {}
    for name in root.list_commands(context):
        command = root.get_command(context, name)
        inner = getattr(command, "commands", None)
        for full, one in {f"{name} {k}": v for k, v in inner.items()}.items() if inner else [(name, command)]:
            found[full] = {flag for p in one.params for flag in p.opts if flag.startswith("--")} - {"--help"}
    return found


@pytest.mark.parametrize(("name", "options"), commands().items())
def test_every_command_and_option_is_explained(name: str, options: set[str]) -> None:
    text = page("docs/cli.md")
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    (section,) = (body for head, body in sections.items() if name in head.split(", "))
    for option in options:
        assert option in section or option in COMMON, option


COMMON = {"--model", "--backend", "--device", "--threads", "--option"}
"""Explained once, for `run`."""


@pytest.mark.slow
def test_the_readme_program_runs(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks(page("README.md"), "python")
    exec(compile(program.replace("LLM()", f"LLM({str(smollm2)!r})"), "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 20


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path, smollm2: Path) -> None:
    done = subprocess.run([sys.executable, path, smollm2], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) > 10


def test_the_table_of_backends_is_what_they_declare() -> None:
    spec = importlib.util.spec_from_file_location("make_backends", ROOT / "docs" / "make_backends.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = page("docs/backends.md")
    assert script.made(text) == text, "run python docs/make_backends.py"
