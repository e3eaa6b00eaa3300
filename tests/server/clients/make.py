"""Make the environments of tests/server/test_clients.py: `TEST_CLIENTS=FOLDER python tests/server/clients/make.py`.

One a line of pins.txt, or those that are named behind the command, with uv where there is one, else with pip. What is
there already, with the same pins, stays. Tests fetch nothing: this is what does, by hand or in CI. All together take
2 GB, of which guidellm's torch is the most.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).with_name("pins.txt")
MADE = "made-with.txt"


def folder() -> Path | None:
    given = os.environ.get("TEST_CLIENTS")
    return Path(given).expanduser().absolute() if given else None


def pins() -> dict[str, str]:
    """What each environment holds."""
    lines = [line.split(maxsplit=1) for line in PINS.read_text(encoding="utf-8").splitlines()]
    return {line[0]: line[1] for line in lines if line and line[0] != "#"}


def python(environment: Path) -> Path | None:
    """The environment's Python, where it was made with today's pins."""
    made = environment / MADE
    if not made.exists() or made.read_text(encoding="utf-8") != pins()[environment.name]:
        return None
    return _own_python(environment)


def _own_python(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make(environment: Path) -> None:
    """Raises CalledProcessError."""
    wanted = pins()[environment.name]
    shutil.rmtree(environment, ignore_errors=True)
    uv = shutil.which("uv")
    if uv:
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, environment], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(environment)]
    else:
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        install = [str(_own_python(environment)), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *wanted.split()], check=True)
    (environment / MADE).write_text(wanted, encoding="utf-8")


def main() -> None:
    where = folder()
    if where is None:
        sys.exit("Name a folder in TEST_CLIENTS.")
    for name in sys.argv[1:] or pins():
        if python(where / name) is None:
            print(f"{name}: {pins()[name]}", flush=True)
            make(where / name)


if __name__ == "__main__":
    main()
