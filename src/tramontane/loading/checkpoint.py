"""Checkpoint: one face over a GGUF file and a folder of safetensors, read without loading weights.

Owns which files a checkpoint is made of, and what they say besides tensors. Must not know: how a model is computed,
tokenizers, templates: their files and values are handed on as they are.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tramontane.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from tramontane.kernels import BLOCKS
from tramontane.loading import mistral, uqff
from tramontane.loading.binding import Binding, bind
from tramontane.loading.ggml import GGMLFile, is_old_ggml
from tramontane.loading.ggml_types import FILE_TYPES
from tramontane.loading.gguf import GGUFFile
from tramontane.loading.mapped import read_small
from tramontane.loading.quantized import Matrix, Method, collect, method_of, mistral_method
from tramontane.loading.safetensors import SafetensorsFolder
from tramontane.loading.tensors import TensorEntry as TensorEntry
from tramontane.models.families import GGUFTensors, gguf_names, hf_names, spec_from_gguf, spec_from_hf
from tramontane.models.mistral_params import spec_from_params
from tramontane.models.names import MISTRAL_NAMES, NameMap
from tramontane.models.parameters import wanted_parameters
from tramontane.models.spec import ModelSpec

_MAX_TEXT = 64 << 20
"""Bytes of a configuration file; a tokenizer_config.json with thousands of added tokens has some hundred thousand."""

_SLICE = 1 << 22
"""Elements that are compared at a time."""

_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
"""GGUF keys -> the names of generation_config.json."""

_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Checkpoint(ABC):
    """An open checkpoint; a context manager. Arrays given out stay valid after `close`."""

    kind: Literal["gguf", "safetensors", "uqff"]
    path: Path
    config: Mapping[str, Any]
    """config.json, or params.json of Mistral's layout; empty for GGUF."""
    metadata: Mapping[str, Any]
    """GGUF's metadata, or the headers' notes of safetensors files."""
    tensors: Mapping[str, TensorEntry]
    folder: Path | None = None
    """Where the files beside the weights lie, such as the tokenizer's; None for GGUF, which has all in itself."""
    tokenizer_config: Mapping[str, Any]
    """tokenizer_config.json; empty for GGUF or without one."""
    chat_template: str | None = None
    """The text of chat_template.jinja. Templates in `tokenizer_config` and `metadata` stay there."""
    additional_templates: Mapping[str, str]
    """Those of the folder additional_chat_templates, by name."""
    generation_config: Mapping[str, Any]
    """As in generation_config.json; empty where the checkpoint has no wishes."""
    quantization: str = ""
    """How its matrices are quantized, for people, where the checkpoint says so."""
    container: str
    """What kind of files it is made of, for people."""

    @abstractmethod
    def spec(self, architecture: str = "auto") -> ModelSpec:
        """What the checkpoint's settings describe; see `models.families`."""

    @abstractmethod
    def names(self, architecture: str = "auto") -> NameMap:
        """What its tensors are called."""

    def bindings(self, spec: ModelSpec, architecture: str = "auto") -> dict[str, Binding]:
        """Canonical parameter name -> the tensors that it is made of. Raises UnsupportedModel for tensors nobody
        knows."""
        return bind(self.names(architecture), self.tensors, spec, str(self.path))

    @abstractmethod
    def array(self, name: str) -> NDArray[Any]:
        """A tensor as a read-only view on the map: numbers in their dtype and shape, blocks as uint8 rows.

        KeyError for a matrix that several tensors make up.
        """

    def parts(self, name: str) -> Mapping[str, NDArray[Any]]:
        """What a matrix's weight is made from; see `Weight.from_tensors`. Repacked where the file has it otherwise."""
        return {"blocks" if self.tensors[name].format in BLOCKS else "weight": self.array(name)}

    @abstractmethod
    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system; views stay valid and are read again on use."""

    def release_all(self) -> None:
        """The same of all of them: reading one brings back some of its neighbours."""
        for name in self.tensors:
            self.release(name)

    def forget_tokens(self) -> None:
        """Let go of the lists in `metadata` that a tokenizer is made from, once it is made."""
        self.metadata = {
            key: value
            for key, value in self.metadata.items()
            if not (key.startswith("tokenizer.ggml.") and isinstance(value, list))
        }

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class GGUFCheckpoint(Checkpoint):
    """A GGUF file, or an older one told in GGUF's terms."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        """Raises ModelNotFound, CorruptCheckpoint or UnsupportedModel, as `GGUFFile.open` and `GGMLFile.open`."""
        self._file: GGUFFile | GGMLFile = GGMLFile.open(path) if is_old_ggml(path) else GGUFFile.open(path)
        self.path = path
        self.config = {}
        self.container = self._file.container
        self.metadata = self._file.metadata
        stated = self.metadata.get("general.file_type")
        self.quantization = FILE_TYPES.get(stated, "") if isinstance(stated, int) else ""
        self.tensors = {
            name: TensorEntry(tensor.shape, tensor.format, tensor.nbytes) for name, tensor in self._file.tensors.items()
        }
        self.tokenizer_config, self.additional_templates = {}, {}
        self.generation_config = _gguf_generation(self.metadata)

    def spec(self, architecture: str = "auto") -> ModelSpec:
        if self.metadata.get("general.architecture") == "clip" or self.metadata.get("general.type") == "mmproj":
            raise UnsupportedModel(
                f"{self.path} is an mmproj file: the part of a multimodal model that reads images or sound.",
                "Pass the GGUF file of the language model itself.",
            )
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        long, short = self._factors("rope_factors_long.weight"), self._factors("rope_factors_short.weight")
        tensors = GGUFTensors(shapes, self._factors("rope_freqs.weight"), long or (), short or ())
        return spec_from_gguf(self.metadata, tensors, architecture, str(self.path))

    def names(self, architecture: str = "auto") -> NameMap:
        return gguf_names(self.metadata, architecture, str(self.path))

    def _factors(self, name: str) -> tuple[float, ...] | None:
        """The values of a tensor of rotary divisors, where the file has it."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if tensor.format != "F32" or len(tensor.shape) != 1:
            raise CorruptCheckpoint(str(self.path), f"{name} is not a vector of F32")
        return tuple(float(value) for value in self.array(name))

    def array(self, name: str) -> NDArray[Any]:
        return self._file.data(name)

    def release(self, name: str) -> None:
        self._file.release(name)

    def release_all(self) -> None:
        self._file.release_all()

    def forget_tokens(self) -> None:
        super().forget_tokens()
        self._file.metadata = self.metadata

    def close(self) -> None:
        self._file.close()


class SafetensorsCheckpoint(Checkpoint):
    kind: Literal["safetensors", "uqff"] = "safetensors"
    _settings = "config.json"
    _layout = "safetensors"

    def __init__(self, path: Path) -> None:
        """`path`: a folder with config.json, or a .safetensors file beside one."""
        folder = path if path.is_dir() else path.parent
        self.folder = folder
        if not (folder / self._settings).is_file():
            raise ModelNotFound(str(path), f"there is no {self._settings} in {folder}")
        self.path = path
        self.config = read_json(folder / self._settings)
        self._folder = self._open_tensors(path)
        self.metadata = self._folder.metadata
        files = len({info.file for info in self._folder.tensors.values()})
        self.container = f"{self._layout}{f', {files} files' if files > 1 else ''}"
        stored = {name: TensorEntry(info.shape, info.dtype, info.nbytes) for name, info in self._folder.tensors.items()}
        self._refusal: UnsupportedModel | None = None
        self._matrices: Mapping[str, Matrix] = {}
        self._zero_biases = False
        try:
            self._gather(stored)
        except UnsupportedModel as error:  # what the files hold can be told all the same
            self._refusal, self.tensors = error, stored
        self.tokenizer_config = optional_json(folder / "tokenizer_config.json")
        if (folder / "chat_template.jinja").is_file():
            self.chat_template = _read_text(folder / "chat_template.jinja")
        additional = sorted(folder.glob("additional_chat_templates/*.jinja"))
        self.additional_templates = {path.stem: _read_text(path) for path in additional}
        # Without the file the model's own configuration says how texts begin and end, as in transformers.
        own = {key: self.config[key] for key in _ENDS if self.config.get(key) is not None}
        self.generation_config = optional_json(folder / "generation_config.json") or own

    def _open_tensors(self, path: Path) -> SafetensorsFolder:
        return SafetensorsFolder.open(path)

    def _method(self) -> Method | None:
        config = self.config
        if "quantization_config" not in config:  # GPTQ's settings had a file of their own once
            own = optional_json(self.folder / "quantize_config.json") if self.folder is not None else {}
            config = {**config, "quantization_config": {"quant_method": "gptq", **own}} if own else config
        return method_of(config, str(self.path))

    def _gather(self, stored: Mapping[str, TensorEntry]) -> None:
        """Tell each quantized module as one matrix."""
        method = self._method()
        if method is None:
            self.tensors = stored
            return
        self.quantization = method.label
        self.tensors, self._matrices = collect(method, stored, self._folder.data, str(self.path))
        self._zero_biases = method.zero_biases

    def spec(self, architecture: str = "auto") -> ModelSpec:
        self.check_readable()
        return spec_from_hf(self.config, architecture, str(self.path))

    def check_readable(self) -> None:
        """Raises UnsupportedModel where tensors are stored in a way that this build does not read."""
        if self._refusal is not None:
            raise self._refusal

    def names(self, architecture: str = "auto") -> NameMap:
        return hf_names(self.config, architecture, str(self.path))

    def bindings(self, spec: ModelSpec, architecture: str = "auto") -> dict[str, Binding]:
        found = super().bindings(spec, architecture)
        wanted = wanted_parameters(spec)
        if spec.tied_embeddings and "head" in found:
            self._check_tied(found.pop("head"), found.get("embedding"))
        if self._zero_biases:
            for name in [name for name in found if name not in wanted]:
                if self._is_zero_bias(found[name]):
                    del found[name]
        return found

    def _is_zero_bias(self, binding: Binding) -> bool:
        """Whether this is a quantized module's bias, all zeros: some methods write one where the model has none."""
        tensor = binding.tensor
        matrix = f"{tensor.removesuffix('bias')}weight"
        return tensor.endswith(".bias") and matrix in self._matrices and not self.array(tensor).any()

    def _check_tied(self, head: Binding, embedding: Binding | None) -> None:
        """Some checkpoints store a tied head a second time; another head would contradict the configuration."""
        stored, same = self.parts(head.tensor), False
        if embedding is not None:
            table = self.parts(embedding.tensor)
            same = stored.keys() == table.keys() and all(_equal(stored[key], table[key]) for key in stored)
        self.release(head.tensor)
        if not same:
            raise UnsupportedModel(
                f"{self.path} says that tie_word_embeddings is true, but its {head.tensor} is not the embedding.",
                "Set tie_word_embeddings to false in config.json if the stored head is meant.",
            )

    def array(self, name: str) -> NDArray[Any]:
        if name in self._matrices:
            raise KeyError(name)
        return self._folder.data(name)

    def parts(self, name: str) -> Mapping[str, NDArray[Any]]:
        return self._matrices[name].load() if name in self._matrices else super().parts(name)

    def release(self, name: str) -> None:
        for part in self._matrices[name].sources if name in self._matrices else (name,):
            self._folder.release(part)

    def close(self) -> None:
        self._folder.close()


class UQFFCheckpoint(SafetensorsCheckpoint):
    """A folder of .uqff files: safetensors with layouts of their own."""

    kind = "uqff"
    _layout = "UQFF"

    def _open_tensors(self, path: Path) -> SafetensorsFolder:
        return SafetensorsFolder.of(path, dict.fromkeys(uqff.files(path)))

    def _method(self) -> Method:
        stored = {name: TensorEntry(info.shape, info.dtype, info.nbytes) for name, info in self._folder.tensors.items()}
        uqff.check_version(stored, self._folder.data, str(self.path))
        return uqff.METHOD


class MistralCheckpoint(SafetensorsCheckpoint):
    """A folder in Mistral's own layout, with names and settings of its own."""

    _settings = mistral.SETTINGS
    _layout = "safetensors in Mistral's own layout"

    def _open_tensors(self, path: Path) -> SafetensorsFolder:
        return SafetensorsFolder.of(path, mistral.files(path))

    def _method(self) -> Method | None:
        return mistral_method(self.config, str(self.path))

    def spec(self, architecture: str = "auto") -> ModelSpec:
        if self._refusal is not None:
            raise self._refusal
        if architecture not in ("auto", "llama"):
            raise UnsupportedModel(f"{self.path} is in Mistral's own layout, a llama.", "Use architecture='auto'.")
        return spec_from_params(self.config, str(self.path))

    def names(self, architecture: str = "auto") -> NameMap:
        return MISTRAL_NAMES


def _equal(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two arrays are the same, told in slices: a comparison makes a byte of each element."""
    if one.shape != other.shape:
        return False
    one, other = one.reshape(-1), other.reshape(-1)
    starts = range(0, one.size, _SLICE)
    return all(np.array_equal(one[at : at + _SLICE], other[at : at + _SLICE]) for at in starts)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .gguf file (any part of a split one), a llama .bin file of GGML's from before GGUF, a folder with
    config.json and .safetensors or .uqff files (or Mistral's params.json and consolidated.safetensors), or a
    .safetensors or .uqff file of such a folder.

    Reads headers and settings only. Raises ModelNotFound, CorruptCheckpoint or UnsupportedModel.
    """
    path = Path(path)
    if path.suffix == ".uqff" or uqff.is_folder(path):
        return UQFFCheckpoint(path)
    if mistral.is_mistral(path):
        return MistralCheckpoint(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path)
    return GGUFCheckpoint(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CorruptCheckpoint."""
    value = _json(path)
    if not isinstance(value, dict):
        raise CorruptCheckpoint(str(path), f"it holds a {type(value).__name__}, not an object")
    return value


def optional_json(path: Path) -> dict[str, Any]:
    """The same, empty where there is no such file."""
    return read_json(path) if path.is_file() else {}


def read_list(path: Path) -> list[Any]:
    """A JSON list from a file. Raises CorruptCheckpoint."""
    value = _json(path)
    if not isinstance(value, list):
        raise CorruptCheckpoint(str(path), f"it holds a {type(value).__name__}, not a list")
    return value


def _json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(str(path), f"it is not JSON ({str(error)[:200]})") from error


def _read_text(path: Path) -> str:
    try:
        return read_small(path, _MAX_TEXT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptCheckpoint(str(path), "it is not UTF-8") from error


def _gguf_generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling that the file recommends. Floats are stored with 24 bits: six digits undo their widening."""
    found = {name: metadata[key] for key, name in _SAMPLING.items() if key in metadata}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}
