"""Rotary positions that depend on the length of a sequence, through the engine: transformers' own words, on both sides
of the threshold and across it, alone and among others, in chunks, and with prefixes out of the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine import checkpoints
from tramontane import LLM

LIMIT = 32
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"max_position_embeddings": LIMIT, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "longrope": {
        "max_position_embeddings": 4 * LIMIT,
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": LIMIT,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 5.0],
        },
    },
}
LENGTHS = (12, 31, 32, 33, 50)
NEW = 24


@pytest.fixture(scope="module", params=ROPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkpoints.write(tmp_path_factory.mktemp(request.param) / request.param, windows=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ROPES[request.param]))
    return folder


def prompt(length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(5).integers(0, 200, length)]


def expected(folder: Path, ids: list[int]) -> list[int]:
    """Greedy, by transformers: with its cache where a key keeps the stretch it was made with (dynamic), anew for each
    token where all keys have that of the length (longrope)."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out, cache = list(ids), None
    with torch.no_grad():
        while len(out) < len(ids) + NEW:
            fed = out if cache is None else out[-1:]
            start = len(out) - len(fed)
            positions = torch.arange(start, len(out))[None]
            step = model(torch.tensor([fed]), position_ids=positions, past_key_values=cache, use_cache=True)
            cache = step.past_key_values if folder.name == "dynamic" else None
            out.append(int(step.logits[0, -1].argmax()))
    return out[len(ids) :]


@pytest.mark.parametrize("budget", [7, 256])
def test_text_is_that_of_transformers(folder: Path, budget: int) -> None:
    options: dict[str, Any] = {"kernels": "reference", "block_size": 4, "num_blocks": 200, "threads": 1}
    wanted = [expected(folder, prompt(length)) for length in LENGTHS]
    with LLM(folder, max_num_batched_tokens=budget, temperature=0, ignore_eos=True, max_tokens=NEW, **options) as llm:
        alone = [list(llm.generate(prompt(length)).token_ids) for length in LENGTHS]
        together = [list(result.token_ids) for result in llm.generate([prompt(length) for length in LENGTHS])]
        assert llm.stats().cached_tokens > 0
    assert alone == wanted
    assert together == wanted
