"""The readers as functions of bytes, for a fuzzer: each ends in a value or in an error of the family.

Owns how bytes become the files that a reader wants, and the sound inputs to begin from. Must not know: the fuzzer.
"""

from __future__ import annotations

import atexit
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

from tests.hostile import sound
from tests.loading.old_ggml import llama_tensors, plain, vocabulary, write
from tests.text.hostile import sentencepiece_model, tekken_file
from tests.text.test_template import FEATURES, MESSAGES, PARTS, PLAIN, TOOLS
from tramontane.errors import TramontaneError
from tramontane.loading.build import checked_plan
from tramontane.loading.checkpoint import open_checkpoint
from tramontane.loading.gguf import GGUFFile
from tramontane.text.template import ChatTemplate
from tramontane.text.tokenizer import Tokenizer

_CUT = b"\xff\xfe\xff"
"""Between the two texts of an input that is two files; no UTF-8 holds it."""


@dataclass(frozen=True)
class Target:
    """`read` takes any bytes. `seeds`: sound inputs. `words`: what the fuzzer may put in."""

    read: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    words: tuple[str, ...] = ()


@cache
def _folder() -> Path:
    """A folder of this process, in memory where the system has such a place."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _open(path: Path) -> None:
    """Open, describe, and take every parameter as loading would."""
    with open_checkpoint(path) as checkpoint:
        plan = checked_plan(checkpoint)
        for tensor in {piece.tensor for binding in plan.bindings.values() for piece in binding.pieces}:
            checkpoint.parts(tensor)
        if checkpoint.kind == "gguf":
            Tokenizer.from_gguf(checkpoint.metadata).encode("hi é")


def _gguf(data: bytes) -> None:
    """`data` is all before the tensors' bytes, which are zeros: a fuzzer would waste its time on them."""
    _open(_written("fuzz.gguf", data + bytes(1 << 18)))


def _gguf_seed(model: str) -> bytes:
    content = sound.gguf(model)["model.gguf"]
    with GGUFFile.open(_written("seed.gguf", content)) as file:
        return content[: min(tensor.offset for tensor in file.tensors.values())]


def _ggjt_seed() -> bytes:
    words = vocabulary()
    return write(
        plain(llama_tensors(len(words), hidden=8, inner=8, heads=2, kv_heads=2, layers=1)),
        words,
        hidden=8,
        heads=2,
        layers=1,
    )


def _split(weights: bytes) -> tuple[bytes, bytes]:
    """The header and the data of a safetensors file."""
    size = 8 + int.from_bytes(weights[:8], "little")
    return weights[8:size], weights[size:]


class _Headers:
    """Folders whose config.json and safetensors header are the input, before the data of sound ones.

    An input is the number of a sound model, its config.json and its header, whose size is put before it.
    """

    def __init__(self, name: str, *models: Callable[[], sound.Files]) -> None:
        self._name = name
        self._models = models

    @cached_property
    def _sound(self) -> list[tuple[bytes, bytes, bytes]]:
        return [(files["config.json"], *_split(files[self._name])) for files in (make() for make in self._models)]

    def seeds(self) -> list[bytes]:
        return [bytes([i]) + config + _CUT + header for i, (config, header, _) in enumerate(self._sound)]

    def read(self, data: bytes) -> None:
        config, _, header = data[1:].partition(_CUT)
        body = self._sound[data[0] % len(self._sound)][2] if data else b""
        folder = _folder() / self._name.replace(".", "-")
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_bytes(config)
        (folder / self._name).write_bytes(struct.pack("<Q", len(header)) + header + body)
        _open(folder)


def _tokenizer(name: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        tokenizer = Tokenizer.from_file(_written(name, data))
        tokenizer.decode(tokenizer.encode("hi é"))

    return read


def _template(data: bytes) -> None:
    template = ChatTemplate(data.decode("utf-8", "replace"), bos_token="<s>")
    template.render(MESSAGES, tools=TOOLS, documents=[{"title": "t", "text": "x"}], extra="x")


_JINJA = (
    "{{", "}}", "{%", "%}", "{#", "#}", "{%-", "-%}", " for x in ", " endfor ", " if ", " else ", " endif ", " set ",
    " macro m(x) ", " endmacro ", " call ", " endcall ", " filter ", " endfilter ", " raw ", " endraw ", " in ", " is ",
    " not ", "defined", "namespace(", "range(", "loop", "loop(", ".index", "recursive", "messages", "message", "tools",
    "['content']", ".role", "| tojson", "| join", "| map(", "| attr(", "| list", "| replace(", "| format(", "| sort",
    "| groupby(", "| unique", "| sum(", "| batch(", "| select(", "| xmlattr", "| string", "| int", ".format(", "** 9",
    "__class__", "__globals__", "__init__", "'%s' % ", "~ ", "[::-1]", "self", "cycler(", "joiner(", "lipsum",
    "strftime_now(", "raise_exception(", " generation ", "caller()", " import ", " include ", "dict(",
)  # fmt: skip
_CONFIG = ("quantization_config", "quant_method", "config_groups", "data_offsets", "dtype", "shape", "NaN")

_PLAIN = _Headers("model.safetensors", sound.folder)
_QUANTIZED = _Headers("model.safetensors", *(partial(sound.quantized, method) for method in sound.QUANTIZED))
_UQFF = _Headers("model-0.uqff", partial(sound.uqff, shards=1))

TARGETS: Mapping[str, Target] = {
    "gguf": Target(_gguf, lambda: [_gguf_seed("llama"), _gguf_seed("gpt2")]),
    "ggjt": Target(lambda data: _open(_written("fuzz.bin", data)), lambda: [_ggjt_seed()]),
    "safetensors": Target(_PLAIN.read, _PLAIN.seeds, _CONFIG),
    "quantized": Target(_QUANTIZED.read, _QUANTIZED.seeds, _CONFIG),
    "uqff": Target(_UQFF.read, _UQFF.seeds, _CONFIG),
    "sentencepiece": Target(_tokenizer("tokenizer.model"), lambda: [sentencepiece_model(1), sentencepiece_model(2)]),
    "tekken": Target(_tokenizer("tekken.json"), lambda: [tekken_file()]),
    "tokenizer_json": Target(_tokenizer("tokenizer.json"), lambda: [sound.tokenizer_json()]),
    "template": Target(_template, lambda: [text.encode() for text in (PLAIN, PARTS, FEATURES, sound.TEMPLATE)], _JINJA),
}


def _written(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def read(name: str, data: bytes) -> bool:
    """Feed one input to one target. Whether it was sound; anything but an error of the family passes through."""
    try:
        TARGETS[name].read(data)
    except TramontaneError:
        return False
    return True
