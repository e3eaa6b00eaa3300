"""A module with the wheel's face and a scripted model, which refuses a second caller as the wheel does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace as Told
from typing import Any

from tramontane.text.tokenizer import Tokenizer

BOS = 256


class Panic(BaseException):
    """As PyO3 raises what Rust panics with."""


Panic.__name__ = "PanicException"


class Recorded:
    """A class whose instances keep what they were made with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


def kinds(*names: str) -> Any:
    return type("Kinds", (), {name: type(name, (Recorded,), {}) for name in names})


class LoraAdapterError(ValueError):
    pass


def chunk(
    content: str | None,
    raw: bytes | None = None,
    finish: str | None = None,
    *,
    logprob: float = -0.5,
    top: tuple[tuple[int, float, str], ...] = (),
    **more: Any,
) -> Told:
    """One of the wheel's chunks."""
    alternatives = [Told(token=id_, logprob=value, bytes=text) for id_, value, text in top]
    told = raw and Told(token=raw.decode("utf-8", "replace"), bytes=raw, logprob=logprob, top_logprobs=alternatives)
    delta = Told(content=content, tool_calls=more.get("calls"), reasoning_content=more.get("reasoning"))
    choice = Told(
        index=0, delta=delta, logprobs=told or None, finish_reason=finish, stop_sequence=more.get("stop_sequence")
    )
    return Told(choices=[choice], usage=more.get("usage"))


def call(name: str, arguments: str) -> Told:
    return Told(id="call-1", function=Told(name=name, arguments=arguments))


Script = Callable[[dict[str, Any]], Iterator[Any]]


def spoken(text: str = " Hello", finish: str = "stop") -> Script:
    """A character a chunk, the first one's white space stripped; then the end."""

    def script(_: dict[str, Any]) -> Iterator[Any]:
        for i, letter in enumerate(text):
            yield chunk(letter.lstrip() if i == 0 else letter, letter.encode())
        yield chunk("", finish=finish, usage=Told(prompt_tokens=3, completion_tokens=len(text) + 1))

    return script


class Wheel:
    """Stands in `sys.modules` for the wheel."""

    ChatCompletionRequest = EmbeddingRequest = LoraAdapter = Recorded
    LoraAdapterError = LoraAdapterError
    ToolChoice = Told(Auto="auto", NoTools="none")
    ModelDType = Told(Auto="auto", F32="f32", F16="f16", BF16="bf16")
    Which = kinds("Plain", "Lora", "XLora", "GGUF", "XLoraGGUF", "GGML", "XLoraGGML", "MultimodalPlain", "Embedding")
    Architecture = EmbeddingArchitecture = MultimodalArchitecture = kinds("Llama", "Qwen3")

    def __init__(self, folder: Path, script: Script | None = None) -> None:
        self.script = script or spoken()
        self.asked: list[dict[str, Any]] = []
        self.opened: dict[str, Any] = {}
        self.template = ""
        self.closed_streams = 0
        self._tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
        self._borrowed = threading.Lock()
        self._reading = threading.Lock()

    def Runner(self, **kwargs: Any) -> Wheel:  # the wheel's name
        self.opened = kwargs
        self.template = Path(kwargs["jinja_explicit"]).read_text()
        os.write(1, b"\x1b[2m2026-01-01T00:00:00Z\x1b[0m \x1b[33m WARN\x1b[0m mistralrs_core::x: loading\nplain\n")
        return self

    def _call(self, result: Callable[[], Any]) -> Any:
        if not self._borrowed.acquire(blocking=False):
            raise RuntimeError("Already borrowed")
        try:
            time.sleep(0.001)
            return result()
        finally:
            self._borrowed.release()

    def max_sequence_length(self) -> int:
        return 160

    def tokenize_text(self, text: str, special: bool, _: None) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return self._call(lambda: [BOS] * special + ids)  # type: ignore[no-any-return]

    def detokenize_text(self, ids: list[int], skip: bool) -> str:
        return str(self._call(lambda: self._tokenizer.decode(ids, skip_special_tokens=skip)))

    def send_chat_completion_request(self, request: Recorded) -> Iterator[Any]:
        self.asked.append(request.kwargs)
        return self._call(lambda: self._told(request.kwargs))  # type: ignore[no-any-return]

    def _told(self, asked: dict[str, Any]) -> Iterator[Any]:
        if not self._reading.acquire(blocking=False):
            raise ValueError("input tensor is not contiguous Layout { ... }\n   0: <candle_core::error::Error>::bt")
        try:
            script = self.script(asked)
            first = next(script)
            time.sleep(0.001)
        finally:
            self._reading.release()
        try:
            yield first
            yield from script
        finally:
            self.closed_streams += 1

    def send_embedding_request(self, request: Recorded) -> list[list[float]]:
        return [[0.6, 0.8, 0.0] for _ in request.kwargs["input"]]

    def load_lora_adapter(self, alias: str, folder: str, *, load_inplace: bool) -> None:
        if alias == "taken" and not load_inplace:
            raise LoraAdapterError("adapter alias `taken` is already loaded")

    def list_lora_adapters(self) -> list[Any]:
        return [Told(alias="b"), Told(alias="a")]

    def unload_lora_adapter(self, alias: str) -> None:
        raise LoraAdapterError(f"adapter alias `{alias}` is not registered.")
