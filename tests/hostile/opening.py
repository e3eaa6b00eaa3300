"""What opening a model means: all that `tramontane inspect` and a first chat do with a stranger's files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.hostile.templates import ESCAPED
from tramontane import LLM, Message
from tramontane.backends.native import NativeBackend
from tramontane.cli.inspect import examine
from tramontane.errors import TramontaneError
from tramontane.text.tokenizer import Tokenizer, tokenizer_file

TEXT = "hi <s> é🙂 [INST] \u0947\u3000 <0xC3> x"


def target(folder: Path, names: Iterable[str]) -> Path:
    """What of these files is handed to the program: a lone file, or the folder."""
    lone = [name for name in names if name.endswith((".gguf", ".bin"))]
    return folder / min(lone) if lone else folder


def open_model(path: Path) -> list[str]:
    """Inspect the model, read its tokenizer, load it, answer a chat. What was refused; anything else passes through."""
    refusals = []
    for use in (_inspect, _tokenize, _chat):
        try:
            use(path)
        except TramontaneError as error:
            refusals.append(f"{use.__name__[1:]}: {type(error).__name__}: {error}")
    return refusals


def _inspect(path: Path) -> None:
    examine(str(path))


def _tokenize(path: Path) -> None:
    """Every kind of file that may hold a folder's tokenizer."""
    file = tokenizer_file(path) if path.is_dir() else None
    if file is None:
        return
    tokenizer = Tokenizer.from_file(file)
    ids = tokenizer.encode(TEXT)
    tokenizer.encode(TEXT, parse_special=False)
    tokenizer.decode(ids)
    b"".join(map(tokenizer.id_to_bytes, ids))


def _chat(path: Path) -> None:
    with LLM(path, device="cpu", threads=1, memory_bytes=4 << 20, max_num_seqs=2, max_tokens=2, seed=0) as llm:
        backend = llm.backend
        assert isinstance(backend, NativeBackend)
        prompt = backend.render([Message("user", TEXT)]) if llm.capabilities().chat else TEXT
        assert ESCAPED not in prompt, "the template got hold of what it must not have"
        llm.generate(prompt)
