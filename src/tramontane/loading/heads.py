"""What a checkpoint says of embedding and scoring: sentence-transformers' files, classification heads, GGUF's keys.

Owns the names of these files, modules, keys and tensors. What they ask for is honoured or refused by name. Must not
know: how states are computed, requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from tramontane.errors import CorruptCheckpoint, UnsupportedModel
from tramontane.loading.checkpoint import Checkpoint, optional_json, read_list
from tramontane.loading.repofiles import plain
from tramontane.loading.safetensors import SafetensorsFolder
from tramontane.models.families.base import ACTIVATIONS as HF_ACTIVATIONS
from tramontane.models.fields import POSITIONS, Fields
from tramontane.models.heads import Dense, EmbeddingHead, Floats, Layer, Norm, ScoringHead
from tramontane.models.spec import ModelSpec
from tramontane.records import dataclass
from tramontane.types import Pooling

_MODES: tuple[Pooling, ...] = get_args(Pooling)
# The order in which several are joined is sentence-transformers'.
_OLD_MODES: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_GGUF_MODES: Mapping[int, Pooling] = {1: "mean", 2: "cls", 3: "lasttoken"}
"""llama.cpp's numbers; 0 is none, 4 a scoring head."""
_GGUF_RANK = 4
_TORCH_ACTIVATIONS: Mapping[str, str] = {
    "linear.Identity": "identity",
    "activation.Tanh": "tanh",
    "activation.Sigmoid": "sigmoid",
    "activation.ReLU": "relu",
    "activation.GELU": "gelu",
    "activation.SiLU": "silu",
}
_DEFAULT_EPS = 1e-5
"""Of torch's LayerNorm."""
_STATE = "sentence_embedding"
"""sentence-transformers' name for what its modules hand on."""


@dataclass(frozen=True)
class EmbeddingSettings:
    """How a model's texts are meant to be embedded."""

    head: EmbeddingHead
    max_length: int | None = None
    """Tokens of a text, those at its ends included, where the checkpoint names fewer than its context has."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    include_prompt: bool = True
    """Whether a prompt's tokens are pooled."""
    lowercase: bool = False
    stated: bool = False
    """Whether the checkpoint says that it embeds, or any of this is only what is done where nothing is said."""


def embedding_settings(checkpoint: Checkpoint, spec: ModelSpec) -> EmbeddingSettings:
    """As the checkpoint says; where it does not, as sentence-transformers does: the last token's state of a model that
    writes, else the mean, not normalized.

    Raises CorruptCheckpoint, or UnsupportedModel naming what this build lacks.
    """
    default: Pooling = "lasttoken" if spec.generates else "mean"
    if checkpoint.folder is None:
        stated = _gguf_pooling(checkpoint)
        pooling = _GGUF_MODES.get(-1 if stated is None else stated)
        # llama.cpp leaves normalizing to its callers, all of which do.
        layers = _gguf_layers(checkpoint, spec.hidden_size)
        head = EmbeddingHead((pooling or default,), layers, normalize=pooling is not None)
        return EmbeddingSettings(head, stated=pooling is not None)
    return _Folder(checkpoint.folder, spec.hidden_size, default).settings(checkpoint.tokenizer_config)


def scoring_head(checkpoint: Checkpoint, spec: ModelSpec) -> ScoringHead | None:
    """The classification head of a cross-encoder, or None. Raises as `embedding_settings`."""
    if checkpoint.folder is None:
        return _gguf_scoring(checkpoint, spec.hidden_size)
    classes = checkpoint.config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else ""
    if not isinstance(name, str) or not name.endswith("ForSequenceClassification"):
        return None
    read = _CLASSIFIERS.get(name.removesuffix("ForSequenceClassification"), _score)
    fields = Fields(checkpoint.config, str(checkpoint.path))
    tensors = _Tensors(checkpoint.tensors, checkpoint.array, str(checkpoint.path))
    pooling, layers = read(fields, tensors)
    _check_widths(layers, spec.hidden_size, str(checkpoint.path))
    activation = _score_activation(checkpoint, layers[-1].width)
    return ScoringHead(pooling, tuple(layers), activation)


# ---- tensors --------------------------------------------------------------------------------------------------


class _Tensors:
    """Small tensors by name, as float32 copies."""

    def __init__(self, names: Mapping[str, Any], read: Callable[[str], NDArray[Any]], source: str) -> None:
        self._names, self._read, self._source = names, read, source

    def get(self, name: str, dims: int) -> Floats:
        found = self.find(name, dims)
        if found is None:
            raise CorruptCheckpoint(self._source, f"the tensor {name} is missing")
        return found

    def find(self, name: str, dims: int) -> Floats | None:
        if name not in self._names:
            return None
        if self._names[name].format not in ("F64", "F32", "F16", "BF16"):
            raise UnsupportedModel(
                f"Tensor {name} of {self._source} is stored as {self._names[name].format}; heads are read as floats.",
                "Use the checkpoint in float32, float16 or bfloat16.",
            )
        array = self._read(name)
        if array.ndim != dims or 0 in array.shape:
            raise CorruptCheckpoint(self._source, f"the tensor {name} has the shape {list(array.shape)}")
        return np.array(array, np.float32)

    def dense(self, name: str, activation: str) -> Dense:
        return Dense(self.get(f"{name}.weight", 2), self._bias(name), activation)

    def norm(self, name: str, eps: float) -> Norm:
        return Norm(self.get(f"{name}.weight", 1), self._bias(name), eps)

    def _bias(self, name: str) -> Floats | None:
        return self.find(f"{name}.bias", 1)


def _check_widths(layers: Sequence[Layer], width: int, source: str) -> None:
    """Each layer takes what the one before it gives; the first takes `width`."""
    for layer in layers:
        takes = layer.weight.shape[-1]
        bias = layer.bias
        if takes != width or (bias is not None and len(bias) != layer.width):
            raise CorruptCheckpoint(source, f"a layer over its vectors takes {takes} elements where there are {width}")
        width = layer.width


def _torch_activation(fields: Fields, key: str, default: str) -> str:
    """The class by which torch calls an activation."""
    name = fields.text(key, default)
    known = {f"torch.nn.modules.{name}": ours for name, ours in _TORCH_ACTIVATIONS.items()}
    if name not in known:
        raise fields.unsupported(key, f"This build has {', '.join(known)}.")
    return known[name]


# ---- sentence-transformers ------------------------------------------------------------------------------------


class _Folder:
    """The files that sentence-transformers keeps beside a model."""

    def __init__(self, folder: Path, hidden_size: int, default: Pooling) -> None:
        self._folder = folder
        self._width = hidden_size
        self._default = default

    def settings(self, tokenizer_config: Mapping[str, Any]) -> EmbeddingSettings:
        own, model = self._fields("sentence_bert_config.json"), self._fields("config_sentence_transformers.json")
        modules = self._modules()
        prompts = self._prompts(model)
        name = model.get("default_prompt_name")
        if name is not None and name not in prompts:
            raise model.corrupt("default_prompt_name", f"is {name!r:.60}, which is no prompt of the model")
        longest = tokenizer_config.get("model_max_length")
        if own.get("max_seq_length") is not None:
            longest = own.integer("max_seq_length", high=POSITIONS)
        pooling, include_prompt, layers, normalize = self._read(modules)
        return EmbeddingSettings(
            EmbeddingHead(pooling, layers, normalize),
            max_length=longest if type(longest) is int and longest > 0 else None,
            prompts=prompts,
            default_prompt=prompts[name] if name is not None else "",
            include_prompt=include_prompt,
            lowercase=own.boolean("do_lower_case", False),
            stated=bool(modules),
        )

    def _fields(self, name: str) -> Fields:
        path = self._folder / name
        return Fields(optional_json(path), str(path))

    def _prompts(self, model: Fields) -> dict[str, str]:
        prompts = {name: text for name, text in model.mapping("prompts").items() if text is not None}
        if not all(isinstance(text, str) for text in prompts.values()):
            raise model.corrupt("prompts", "is not an object of texts")
        return prompts

    def _modules(self) -> list[tuple[str, str]]:
        """The kind and path of each of the model's modules, in order."""
        path = self._folder / "modules.json"
        if not path.is_file():
            return []
        found: list[tuple[str, str]] = []
        for module in read_list(path):
            kind, place = (module.get(key) for key in ("type", "path")) if isinstance(module, dict) else (None, None)
            if not isinstance(kind, str) or not isinstance(place, str) or not (place in ("", ".") or plain(place)):
                raise CorruptCheckpoint(str(path), "a module lacks a type or a path inside the folder")
            if not kind.startswith("sentence_transformers."):
                raise UnsupportedModel(f"{path} names the module {kind!r:.80}, which is code of the model's own.")
            found.append((kind.rpartition(".")[2], place))
        return found

    def _read(self, modules: Sequence[tuple[str, str]]) -> tuple[tuple[Pooling, ...], bool, tuple[Layer, ...], bool]:
        """Pooling, whether it counts prompts, the layers after it, and whether their vector is normalized."""
        pooling: tuple[Pooling, ...] = (self._default,)
        include_prompt, normalize = True, False
        layers: list[Layer] = []
        for place, (kind, path) in enumerate(modules):
            fields = self._fields(f"{path}/config.json")
            if kind == "Transformer" and place == 0 and path in ("", "."):
                continue
            if kind == "Pooling" and place == 1:
                pooling, include_prompt = self._pooling(fields), fields.boolean("include_prompt", True)
            elif kind in ("Dense", "LayerNorm") and place > 1 and not normalize:
                layers.append(self._layer(kind, path, fields))
            elif kind == "Normalize" and place == len(modules) - 1:
                fields.only(module_input_name=_STATE, module_output_name=_STATE)
                normalize = True
            elif kind != "Dropout":
                raise UnsupportedModel(
                    f"{self._folder}/modules.json has a module {kind!r:.60} in place {place}, which this build lacks.",
                    "It has Transformer, Pooling, Dense, LayerNorm and Normalize, in this order.",
                )
        _check_widths(layers, self._width * len(pooling), str(self._folder))
        return pooling, include_prompt, tuple(layers), normalize

    def _pooling(self, fields: Fields) -> tuple[Pooling, ...]:
        stated = fields.get("pooling_mode")
        modes: Any = [stated] if isinstance(stated, str) else stated
        if stated is None:
            modes = [mode for key, mode in _OLD_MODES.items() if fields.boolean(key, False)] or ["mean"]
        if not isinstance(modes, list) or not modes or any(mode not in _MODES for mode in modes):
            raise fields.unsupported("pooling_mode", f"This build has {', '.join(_MODES)}.")
        return tuple(modes)

    def _layer(self, kind: str, path: str, fields: Fields) -> Layer:
        folder = self._folder / path
        if not any(folder.glob("*.safetensors")):
            raise UnsupportedModel(
                f"{folder} holds no .safetensors file; PyTorch pickles are not read: they can run code.",
                "Convert its pytorch_model.bin to model.safetensors.",
            )
        with SafetensorsFolder.open(folder) as files:
            tensors = _Tensors(
                {name: _Entry(info.dtype) for name, info in files.tensors.items()}, files.data, str(folder)
            )
            if kind == "LayerNorm":
                return tensors.norm("norm", _DEFAULT_EPS)
            names = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
            fields.only(use_residual=False, **names)
            return tensors.dense(
                "linear", _torch_activation(fields, "activation_function", "torch.nn.modules.activation.Tanh")
            )


@dataclass(frozen=True)
class _Entry:
    format: str


# ---- classification heads -------------------------------------------------------------------------------------

_Classifier = tuple[Pooling, list[Layer]]


def _bert(fields: Fields, tensors: _Tensors) -> _Classifier:
    return "cls", [tensors.dense("bert.pooler.dense", "tanh"), tensors.dense("classifier", "identity")]


def _roberta(fields: Fields, tensors: _Tensors) -> _Classifier:
    return "cls", [tensors.dense("classifier.dense", "tanh"), tensors.dense("classifier.out_proj", "identity")]


def _distilbert(fields: Fields, tensors: _Tensors) -> _Classifier:
    return "cls", [tensors.dense("pre_classifier", "relu"), tensors.dense("classifier", "identity")]


def _modernbert(fields: Fields, tensors: _Tensors) -> _Classifier:
    pooling = fields.text("classifier_pooling", "cls")
    activation = HF_ACTIVATIONS.get(fields.text("classifier_activation", "gelu"))
    if pooling not in ("cls", "mean"):
        raise fields.unsupported("classifier_pooling", "This build has cls and mean.")
    if activation is None:
        raise fields.unsupported("classifier_activation", f"This build has {', '.join(HF_ACTIVATIONS)}.")
    norm = tensors.norm("head.norm", fields.number("norm_eps", 1e-5, high=1.0))
    layers: list[Layer] = [tensors.dense("head.dense", activation), norm, tensors.dense("classifier", "identity")]
    return ("cls" if pooling == "cls" else "mean"), layers


def _score(fields: Fields, tensors: _Tensors) -> _Classifier:
    """Of decoders: one matrix over the last token's state."""
    return "lasttoken", [tensors.dense("score", "identity")]


_CLASSIFIERS: Mapping[str, Callable[[Fields, _Tensors], _Classifier]] = {
    "Bert": _bert,
    "Roberta": _roberta,
    "XLMRoberta": _roberta,
    "Camembert": _roberta,
    "DistilBert": _distilbert,
    "ModernBert": _modernbert,
}
"""transformers' classes, without their ending; all others score as decoders do."""


def _score_activation(checkpoint: Checkpoint, labels: int) -> str:
    """What sentence-transformers' CrossEncoder applies: as the files say, else a sigmoid over a single label."""
    default = "linear.Identity" if labels > 1 else "activation.Sigmoid"
    places = [(checkpoint.config, "sbert_ce_default_activation_function")]
    inner = checkpoint.config.get("sentence_transformers")
    if isinstance(inner, Mapping):
        places.insert(0, (inner, "activation_fn"))
    if checkpoint.folder is not None:
        places.insert(0, (optional_json(checkpoint.folder / "config_sentence_transformers.json"), "activation_fn"))
    for values, key in places:
        if values.get(key) is not None:
            return _torch_activation(Fields(values, str(checkpoint.path)), key, "")
    return _TORCH_ACTIVATIONS[default]


# ---- GGUF -----------------------------------------------------------------------------------------------------


def _gguf_pooling(checkpoint: Checkpoint) -> int | None:
    """llama.cpp's number of the kind of pooling."""
    key = f"{checkpoint.metadata.get('general.architecture')}.pooling_type"
    stated = checkpoint.metadata.get(key)
    if stated is not None and (not isinstance(stated, int) or not 0 <= stated <= _GGUF_RANK):
        raise CorruptCheckpoint(str(checkpoint.path), f"{key} is {stated!r:.40}, not a number from 0 to {_GGUF_RANK}")
    return stated


def _gguf_layers(checkpoint: Checkpoint, hidden_size: int) -> tuple[Layer, ...]:
    """Those that sentence-transformers keeps in the folders 2_Dense and 3_Dense."""
    tensors = _Tensors(checkpoint.tensors, checkpoint.array, str(checkpoint.path))
    names = [name for name in ("dense_2", "dense_3") if f"{name}.weight" in checkpoint.tensors]
    layers = tuple(tensors.dense(name, "identity") for name in names)
    _check_widths(layers, hidden_size, str(checkpoint.path))
    return layers


def _gguf_scoring(checkpoint: Checkpoint, hidden_size: int) -> ScoringHead | None:
    if _gguf_pooling(checkpoint) != _GGUF_RANK:
        return None
    source = str(checkpoint.path)
    if "cls.norm.weight" in checkpoint.tensors:
        raise UnsupportedModel(
            f"{source} has a classifier with a norm (cls.norm), of which GGUF does not say how it is computed.",
            "Use the model as safetensors.",
        )
    tensors = _Tensors(checkpoint.tensors, checkpoint.array, source)
    layers: list[Layer] = []
    if "cls.weight" in checkpoint.tensors:
        layers.append(tensors.dense("cls", "tanh"))
    layers.append(tensors.dense("cls.output", "identity"))
    _check_widths(layers, hidden_size, source)
    return ScoringHead("cls", tuple(layers), "sigmoid" if layers[-1].width == 1 else "identity")
