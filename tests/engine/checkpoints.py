"""A tiny random checkpoint with a tokenizer and a chat template, written without the libraries under comparison, and
engines over it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tramontane.config import EngineConfig
from tramontane.engine.blocks import make_pool
from tramontane.engine.engine import Engine
from tramontane.engine.executor import Executor, LocalExecutor
from tramontane.engine.runner import Runner
from tramontane.engine.scheduler import Scheduler
from tramontane.engine.sequence import EngineRequest, Event
from tramontane.engine.step import TokenInfo
from tramontane.kernels import Ops
from tramontane.loading.build import LoadedModel, load_model
from tramontane.models.spec import cache_groups
from tramontane.text.grammar import Grammars
from tramontane.types import SAMPLING_DEFAULTS, SamplingParams

SPECIAL = ("<s>", "</s>", "<|start|>", "<|end|>")
VOCAB = 256 + len(SPECIAL)
BOS, EOS, START, END = range(256, VOCAB)
CONTEXT = 160
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def write(folder: Path, *, windows: bool = True, template: str | None = TEMPLATE, seed: int = 0) -> Path:
    """A qwen2 model of four layers, three of which see nine tokens where `windows`; a token is a byte, or special."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, inner, heads, kv_heads, head = 32, 48, 4, 2, 8
    config: dict[str, Any] = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "use_sliding_window": windows,
        "sliding_window": 9 if windows else None,
        "max_window_layers": 1,
    }
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Any:
        return (rng.standard_normal((rows, columns)) * 1.6 / columns**0.5).astype(np.float32)

    def vector(size: int, mean: float) -> Any:
        return (mean + 0.3 * rng.standard_normal(size)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB, hidden) * 3,
        "lm_head.weight": matrix(VOCAB, hidden),
        "model.norm.weight": vector(hidden, 1),
    }
    for layer in range(4):
        at = f"model.layers.{layer}."
        for name, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = matrix(rows, hidden)
            tensors[f"{at}self_attn.{name}_proj.bias"] = vector(rows, 0)
        tensors[f"{at}self_attn.o_proj.weight"] = matrix(hidden, heads * head)
        tensors[f"{at}mlp.gate_proj.weight"] = matrix(inner, hidden)
        tensors[f"{at}mlp.up_proj.weight"] = matrix(inner, hidden)
        tensors[f"{at}mlp.down_proj.weight"] = matrix(hidden, inner)
        tensors[f"{at}input_layernorm.weight"] = vector(hidden, 1)
        tensors[f"{at}post_attention_layernorm.weight"] = vector(hidden, 1)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, template)
    return folder


def write_tokenizer(folder: Path, template: str | None) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: id_ for id_, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@dataclass
class Rig:
    """An engine over a loaded model, and what its requests have got so far."""

    engine: Engine
    runner: Runner
    cache_bytes: int
    tokens: dict[tuple[str, int], list[TokenInfo]] = field(default_factory=dict)
    ends: dict[tuple[str, int], Event] = field(default_factory=dict)
    prompt_logprobs: dict[str, tuple[TokenInfo | None, ...]] = field(default_factory=dict)
    errors_expected: bool = False

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            key = (event.request_id, event.index)
            assert key not in self.ends, "a choice has one final event, its last"
            if event.error is not None and not self.errors_expected:
                raise event.error
            self.tokens.setdefault(key, []).extend(event.tokens)
            if event.prompt_logprobs is not None:
                self.prompt_logprobs[event.request_id] = event.prompt_logprobs
            if event.finish_reason is not None:
                self.ends[key] = event

    def run(self, requests: Iterable[EngineRequest] = ()) -> Rig:
        """Until there is no work left, invariants proved after each step."""
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work:
            self.take(self.engine.step())
            self.engine.scheduler.check()
        assert self.engine.scheduler.pool.used == 0
        return self

    def run_to_errors(self, requests: Iterable[EngineRequest]) -> Rig:
        """The same; choices may end with an error."""
        self.errors_expected = True
        return self.run(requests)

    def ids(self, request_id: str, index: int = 0) -> list[int]:
        return [info.token_id for info in self.tokens[(request_id, index)]]


def load(path: Path, ops: Ops) -> LoadedModel:
    return load_model(path, ops)


def rig(
    loaded: LoadedModel,
    config: EngineConfig,
    num_blocks: int,
    executor: type[LocalExecutor] = LocalExecutor,
    num_states: int = 0,
    grammars: Grammars | None = None,
) -> Rig:
    groups = cache_groups(loaded.spec)
    dtype = "float32" if config.cache.dtype == "auto" else config.cache.dtype
    cache = loaded.decoder.new_cache(num_blocks, config.cache.block_size, dtype, num_states)
    runner = Runner(
        loaded.decoder,
        loaded.ops,
        cache,
        block_size=config.cache.block_size,
        num_groups=len(groups),
        context_length=CONTEXT,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_num_seqs=config.scheduler.max_num_seqs,
        grammars=grammars,
    )
    pool = make_pool(config.cache, num_blocks, [group.window for group in groups], CONTEXT, num_states)
    runs: Executor = executor(runner)
    return Rig(Engine(Scheduler(config.scheduler, pool, CONTEXT), runs), runner, cache.nbytes)


def request(name: str, prompt: Sequence[int], seed: int = 0, **params: Any) -> EngineRequest:
    resolved = SamplingParams(**params).over(SAMPLING_DEFAULTS)
    return EngineRequest(name, tuple(prompt), resolved, frozenset({EOS}), seed)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    chooser = random.Random(f"{length}/{seed}")
    return tuple(chooser.randrange(256) for _ in range(length))
