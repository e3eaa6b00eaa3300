"""Models of every kind under the real engine, many requests at once: the answers that transformers gives to each."""

from __future__ import annotations

import pytest

from tests.engine.checkpoints import load, request, rig
from tests.models.harness import MAIN, make
from tests.models.tiny import TinyModels, tokens
from tramontane.config import CacheConfig, EngineConfig, SchedulerConfig


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", ["gemma3", "cohere2", "gpt2", "opt-post-norm", "bloom", "falcon-groups"])
def test_greedy_answers_are_those_of_transformers(name: str, tiny_models: TinyModels) -> None:
    """Windows and none, learned positions, ALiBi; in chunks of at most 20 tokens a step, and behind a shared prefix."""
    tiny = tiny_models.get(name)
    config = EngineConfig(CacheConfig(block_size=4), SchedulerConfig(4, 20))
    engine = rig(load(tiny.path, make(str(MAIN.values[0]))), config, 300)
    prompts = [tokens(length, length) for length in (11, 26, 5, 33)]
    prompts.append([*prompts[1][:20], 3, 4])
    engine.run([request(str(i), ids, max_tokens=16, temperature=0.0, ignore_eos=True) for i, ids in enumerate(prompts)])
    for i, ids in enumerate(prompts):
        answer = engine.ids(str(i))
        assert len(answer) == 16
        assert answer == tiny.logits([*ids, *answer])[len(ids) - 1 : -1].argmax(-1).tolist()
