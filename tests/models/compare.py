"""Our logits beside transformers' on one of the tiny models: `python -m tests.models.compare qwen3`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.models.harness import MAIN, Rig, make
from tests.models.tiny import Tiny, tokens
from tramontane.loading.build import load_model


def main(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tiny, ids = Tiny(name, Path(folder)), tokens(75)
        rig = Rig(load_model(tiny.path, make(str(MAIN.values[0]))).decoder)
        ours, theirs = rig.run(ids, [20, 1, 30]), tiny.logits(ids)
        sequence, fed, out = rig.sequence(), ids[:11], []
        for _ in range(12):
            fed = [int(rig.step((sequence, fed))[0][-1].argmax())]
            out += fed
        for title, logits, continued in (("ours", ours, out), ("theirs", theirs, tiny.greedy(ids[:11], 12))):
            print(f"{title:8}{' '.join(f'{value:9.5f}' for value in logits[-1, :6])} ...  then {continued}")
        print(f"largest difference of {ours.size} logits: {np.abs(ours - theirs).max():.1e}")


if __name__ == "__main__":
    main(sys.argv[1])
