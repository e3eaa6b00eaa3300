"""What a token costs a model's weights: bytes to read and operations to do. `python -m bench.weights MODEL.gguf`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from tramontane.loading.gguf import GGUFFile


def cost(path: Path) -> dict[str, float]:
    """Of one decoded token, every matrix read once, the head included; of a prompt's, layers alone (`layer_ops`).

    Token embeddings count only where they are the head too. Two operations a weight.
    """
    with GGUFFile.open(path) as file:
        tied = "output.weight" not in file.tensors
        tensors = [t for t in file.tensors.values() if tied or t.name != "token_embd.weight"]
        heads = ("output.weight", "token_embd.weight")
        layers = [t for t in tensors if len(t.shape) > 1 and t.name not in heads]
        formats = {t.format for t in layers}
    return {
        "token_bytes": sum(t.nbytes for t in tensors),
        "layer_ops": 2 * sum(math.prod(t.shape) for t in layers),
        "quantized": not formats <= {"F32", "F16", "BF16"},
        "file_bytes": path.stat().st_size,
    }


if __name__ == "__main__":
    print(json.dumps(cost(Path(sys.argv[1]))))
