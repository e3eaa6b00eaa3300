"""A causal language model as transformers loads and runs it, and the executor that computes steps with it.

Owns how transformers is asked for a model, and which of its ways to continue texts are right for that model. Needs the
extra transformers. Must not know: requests, text, the engine's thread.

A prompt goes through the model by itself. Sequences that are to go on by a token go through it together where that
gives what each gives alone; else each has its turn in every step.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, modeling_gguf_pytorch_utils

from tramontane import platform
from tramontane.backends.transformers_batch import Past, Pasts, SideBySide, fits
from tramontane.engine.sampler import Sampler, token_info
from tramontane.engine.step import ScheduledSequence, SequenceResult, Step, StepResult, TokenInfo
from tramontane.errors import CorruptCheckpoint, MissingExtra, OutOfMemory, TramontaneError, UnsupportedModel
from tramontane.kernels import Ops
from tramontane.kernels.workspace import Workspace
from tramontane.loading.checkpoint import Checkpoint, GGUFCheckpoint, SafetensorsCheckpoint
from tramontane.loading.memory import LOGITS_ROWS, check_weights_fit
from tramontane.models.fallback.build import check_sizes, quiet
from tramontane.models.fallback.module import ordinary_tokens, rotary_by_length, stated_context
from tramontane.text.grammar import Grammars

log = logging.getLogger("tramontane")

Logits = NDArray[np.float32]
_KEPT = ("past_key_values", "cache_params", "state")
_TOKENS = "tokens"
_FOR_GGUF = ("accelerate", "gguf")
_PACKED = 16
"""Parameters that a number in a file may stand for: two bits each, in words of 32; the tied ones are not counted."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUGH = 5e-2
"""The tolerance of the other dtypes. Of the largest logit, as a part: what sums in another order may make."""


def use_threads(count: int) -> None:
    """torch's, for the whole process."""
    torch.set_num_threads(count)


def load(checkpoint: Checkpoint, device: str, dtype: str) -> CausalModel:
    """The model of a checkpoint, as transformers makes it. Its code must be transformers' own: none is fetched or run.

    Raises UnsupportedModel, CorruptCheckpoint, OutOfMemory or MissingExtra.
    """
    source = str(checkpoint.path)
    place = _place(checkpoint)
    if device == "cpu":
        itemsize = 4 if dtype == "float32" or place.get("gguf_file") else 2
        parameters = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
        check_weights_fit(parameters * itemsize, platform.available_memory())
    try:
        with quiet(), _no_bar():
            if "gguf_file" not in place:
                _check_described(checkpoint, **place)
            model, info = AutoModelForCausalLM.from_pretrained(
                **place,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        _check_loaded(info, source)
        return CausalModel(model.to(_torch_device(device)).eval(), source)
    except TramontaneError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(f"transformers does not load {source}: {error}") from error
    except Exception as error:
        raise UnsupportedModel(
            f"transformers does not run {source}: {type(error).__name__}: {str(error).strip()[:400]}",
            "Use another backend, or install what transformers asks for.",
        ) from error


def _check_described(checkpoint: Checkpoint, pretrained_model_name_or_path: str) -> None:
    """Refuses settings that describe a model far larger than the files, before memory is taken for it."""
    source, held = str(checkpoint.path), sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    check_sizes(checkpoint.config, len(checkpoint.tensors), source)
    config = AutoConfig.from_pretrained(pretrained_model_name_or_path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = sum(value.numel() for value in model.parameters())
    if wanted > _PACKED * held:
        raise CorruptCheckpoint(source, f"its settings describe {wanted} parameters, its files hold {held}")


def _check_loaded(info: dict[str, Any], source: str) -> None:
    """What a checkpoint lacks, transformers would make up."""
    if missing := sorted(info["missing_keys"]):
        raise CorruptCheckpoint(source, f"it lacks {len(missing)} parameters of the model, such as {missing[0]}")
    if unused := sorted(info["unexpected_keys"]):
        log.warning("transformers leaves %d tensors of %s unused, such as %s", len(unused), source, unused[0])


@contextmanager
def _no_bar() -> Iterator[None]:
    """Inside, reading a GGUF file draws no bar of progress on standard error, which transformers cannot be told."""
    before = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = before


def _place(checkpoint: Checkpoint) -> dict[str, Any]:
    """How transformers is told of a checkpoint."""
    if isinstance(checkpoint, GGUFCheckpoint):
        for name in _FOR_GGUF:
            if importlib.util.find_spec(name) is None:
                raise MissingExtra("transformers", "Reading GGUF files through transformers")
        return {"pretrained_model_name_or_path": str(checkpoint.path.parent), "gguf_file": checkpoint.path.name}
    if type(checkpoint) is not SafetensorsCheckpoint or checkpoint.folder is None:
        raise UnsupportedModel(
            f"transformers does not read {checkpoint.path}, which is {checkpoint.container}.",
            "Use the native backend.",
        )
    return {"pretrained_model_name_or_path": str(checkpoint.folder)}


def _torch_device(device: str) -> torch.device:
    return torch.device("mps" if device == "metal" else device)


class CausalModel:
    """A model that continues sequences. Not for several threads at once."""

    def __init__(self, model: Any, source: str) -> None:
        """Finds how the model goes on from what it keeps. Raises UnsupportedModel where it does not read from left to
        right."""
        self._model = model
        accepted = inspect.signature(model.forward).parameters
        self._kept = [name for name in _KEPT if name in accepted]
        self._taken = accepted.keys()
        self._takes_count = "logits_to_keep" in accepted
        self._way = "in pieces"
        self.batches = False
        """Whether `forward_together` gives what `forward` does."""
        self.context_length = stated_context(model.config)
        with torch.inference_mode():
            self.vocab_size = self._choose_way(source)

    @property
    def nbytes(self) -> int:
        """Of all parameters."""
        return sum(value.nbytes for value in self._model.parameters())

    def forward(self, past: Past, tokens: Sequence[int], rows: int) -> Logits:
        """Continue the sequence of `past`, which is {} at its beginning, by these tokens: `past` stands for them too
        then. Returns the logits float32 [rows, V] behind the last `rows` of them."""
        with torch.inference_mode():
            if self._way == "anew":
                past[_TOKENS] = [*past.get(_TOKENS, ()), *tokens]
                return self._host(self._run({}, past[_TOKENS], rows))
            if self._way == "in pieces" or not past:
                return self._host(self._run(past, tokens, rows))
            found = [self._run(past, [token], 1) for token in tokens]
            return self._host(torch.cat(found)[len(found) - rows :])

    def forward_together(self, batch: SideBySide, tokens: Sequence[int]) -> Logits:
        """Continue each sequence of the batch by one token. Returns the logits float32 [len(tokens), V] behind them."""
        with torch.inference_mode():
            inputs = batch.inputs(tokens, self._model.device)
            taken = {name: value for name, value in inputs.items() if name in self._taken}
            return self._host(self._model(**taken, **self._asked(1)).logits[:, -1])

    def _run(self, past: Past, tokens: Sequence[int], rows: int) -> torch.Tensor:
        output = self._model(input_ids=torch.tensor([tokens], device=self._model.device), **self._asked(rows), **past)
        past.update({name: kept for name in self._kept if (kept := getattr(output, name, None)) is not None})
        logits: torch.Tensor = output.logits[0]
        return logits[len(logits) - rows :]

    def _asked(self, rows: int) -> dict[str, Any]:
        """What a pass is told of which `rows` of logits are wanted."""
        return {"use_cache": True, **({"logits_to_keep": max(rows, 1)} if self._takes_count else {})}  # 0 would be all

    @staticmethod
    def _host(logits: torch.Tensor) -> Logits:
        found: Logits = logits.float().cpu().numpy()
        return found

    def _choose_way(self, source: str) -> int:
        """Try on a short text which way gives what the whole text gives; returns the width of the logits."""
        tokens = ordinary_tokens(self._model.config).tolist()
        whole = self._run({}, tokens, len(tokens))
        if self._differs(self._run({}, tokens[:6], 6), whole[:6]):
            raise UnsupportedModel(f"{source} does not read from left to right, so it cannot continue a text.")
        counts = [True, False] if self._takes_count else [False]  # with a number, some models drop tokens on the way
        for self._takes_count, self._way in product(counts, ("in pieces", "singly", "anew")):
            past: Past = {}
            last = [self.forward(past, tokens[a:b], 1) for a, b in ((0, 6), (6, 9), (9, 10))]
            if not self._differs(torch.from_numpy(np.concatenate(last)), whole[[5, 8, 9]]):
                break
        if self._way == "anew":
            log.warning("%s keeps nothing that it could go on from: each token computes the whole text anew", source)
        self.batches = self._way == "in pieces" and self._goes_together(tokens, whole)
        return int(whole.shape[1])

    def _goes_together(self, tokens: Sequence[int], whole: torch.Tensor) -> bool:
        """Whether beginnings of the short text that differ in length go on side by side as each does alone."""
        if "attention_mask" not in self._taken or rotary_by_length(self._model.modules()) is not None:
            return False
        counts, pasts = (6, 3, 4), [Past(), Past(), Past()]
        for past, count in zip(pasts, counts, strict=True):
            self.forward(past, tokens[:count], 1)
        if not all(map(fits, pasts)):
            return False
        batch, found = SideBySide(pasts, counts), []
        try:
            for step in range(3):
                found.append(self.forward_together(batch, [tokens[count + step] for count in counts]))
        except Exception as error:  # whatever a model makes of a mask that it does not expect
            log.info("sequences take turns, as they do not go through the model together: %r", error)
            return False
        wanted = whole[[count + step for step in range(3) for count in counts]]
        return not self._differs(torch.from_numpy(np.concatenate(found)), wanted)

    def _differs(self, logits: torch.Tensor, wanted: torch.Tensor) -> bool:
        difference = (logits.float().cpu() - wanted.float().cpu()).abs().max()
        tolerance = _TOLERANCE.get(self._model.dtype, _ROUGH) * wanted.abs().max().cpu()
        return not bool(difference <= tolerance)


class TransformersExecutor:
    """Computes steps of sequences whose only block stands for all that is kept of them. See `Executor`."""

    def __init__(self, model: CausalModel, ops: Ops, max_num_seqs: int, grammars: Grammars | None = None) -> None:
        """`ops`: of the CPU, where tokens are drawn."""
        self._model: CausalModel | None = model
        self._ops = ops
        self._pasts = Pasts()
        self._sampler = Sampler(ops, Workspace(ops, LOGITS_ROWS), max_histories=2 * max_num_seqs, grammars=grammars)

    @property
    def weight_bytes(self) -> int:
        return 0 if self._model is None else self._model.nbytes

    def submit(self, step: Step) -> StepResult:
        if self._model is None:
            raise RuntimeError("the executor is closed")
        for source, target in step.copies:
            self._pasts.copy(source, target)
        rows = step.rows()
        self._sampler.begin([row.draw for row in rows], [row.key for row in rows])
        logits = self._logits(self._model, step)
        return StepResult(step.id, tuple(self._result(one, logits[one.sequence_id]) for one in step.sequences))

    def close(self) -> None:
        self._model = None
        self._pasts = Pasts()

    def _logits(self, model: CausalModel, step: Step) -> dict[int, Logits]:
        """Of each sequence the logits [rows, V] that are wanted of it."""
        going_on = [one for one in step.sequences if one.start and len(one.tokens) == 1 and not one.targets]
        if not model.batches or len(going_on) < 2:
            going_on = []
        held = {_block(one) for one in step.sequences}  # every sequence that runs is in every step
        batch = self._pasts.arrange(held, [_block(one) for one in going_on], [one.start for one in going_on])
        logits: dict[int, Logits] = {}
        if batch is not None:
            found = model.forward_together(batch, [one.tokens[0] for one in going_on])
            logits = {one.sequence_id: found[i : i + 1] for i, one in enumerate(going_on)}
        for one in step.sequences:
            if one.sequence_id in logits:
                continue
            if not one.start:
                self._pasts.begin(_block(one))
            rows = len(one.tokens) if one.targets else min(len(one.draws), 1)
            logits[one.sequence_id] = model.forward(self._pasts.of(_block(one)), one.tokens, rows)
        return logits

    def _result(self, sequence: ScheduledSequence, logits: Logits) -> SequenceResult:
        return SequenceResult(
            sequence.sequence_id, self._draws(sequence, logits[-1:]), self._prompt_logprobs(sequence, logits)
        )

    def _draws(self, sequence: ScheduledSequence, last: Logits) -> tuple[TokenInfo, ...]:
        """The tokens drawn from the last row [1, V]."""
        found: list[TokenInfo] = []
        for at in range(0, len(sequence.draws), LOGITS_ROWS):
            draws = sequence.draws[at : at + LOGITS_ROWS]
            rows = self._ops.from_host(np.repeat(last, len(draws), axis=0))
            found += self._sampler.sample(rows, draws, [(sequence.sequence_id, at + i) for i in range(len(draws))])
        return tuple(found)

    def _prompt_logprobs(self, sequence: ScheduledSequence, logits: Logits) -> tuple[TokenInfo, ...]:
        if not sequence.targets:
            return ()
        out = self._ops.from_host(logits[: len(sequence.targets)])
        self._ops.log_softmax(out, out)
        each = zip(sequence.targets, self._ops.to_host(out), strict=True)
        return tuple(token_info(target, row, sequence.prompt_logprobs or 0) for target, row in each)


def _block(sequence: ScheduledSequence) -> int:
    return sequence.block_tables[0][0]
