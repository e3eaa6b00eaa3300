"""Which device is chosen, and what is imported to find out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("version", "asked"), [("2.13.0+cpu", False), ("2.13.0+cu130", True)])
def test_torch_is_asked_for_a_gpu_only_where_it_was_built_for_one(tmp_path: Path, version: str, asked: bool) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("print('asked'); raise ImportError('not today')")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    code = (
        "import sys; from tramontane.kernels.device import resolve_device; print(resolve_device())\n"
        "print('importlib.metadata' in sys.modules)"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, text=True, check=True).stdout
    assert said.split() == [*["asked"] * asked, "cpu", "False"]
