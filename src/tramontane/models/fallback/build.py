"""From a checkpoint's settings and tensors to a model of transformers that holds our weights.

Owns how transformers is made to load what we give it. Must not know: files, attention, requests.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as chatter

from tramontane.errors import CorruptCheckpoint, UnsupportedModel
from tramontane.kernels import Array, Ops
from tramontane.models.fallback.tensors import WeightTensor, to_tensor
from tramontane.weights import Weight, make_weight

log = logging.getLogger("tramontane")

_FORMATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NOT_OURS = (
    *("quantization_config", "auto_map", "fusion_config", "torch_dtype", "dtype"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
)
"""Keys of a configuration that say how to load a model instead of what it is."""
_SIZE = (1 << 31) - 1
_SLACK = 1 << 20
_FEW, _HEADS, _MANY = 64, 1 << 12, 1 << 14
"""As many layers are made in any case, as many heads and experts at most."""


def build(
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    weights: Mapping[str, Sequence[Weight]],
    ops: Ops,
    source: str,
) -> Any:
    """The model of a config.json, in eval mode on the device of `ops`: activations are float32, matrices stay what
    they are, vectors become float32.

    `tensors`, on the host, and `weights`, each a matrix or those of a stack: by the checkpoint's names. Raises
    UnsupportedModel or CorruptCheckpoint.
    """
    check_sizes(config, len(tensors) + len(weights), source)
    with quiet():
        settings, kind = _class_of(config, source)
        turned = _checked(settings, kind, tensors, weights, source)
        try:
            state = {name: _state(array, ops) for name, array in tensors.items()}
            for name, held in weights.items():
                flipped = _ends(name, turned)
                state[name] = WeightTensor([[one] for one in held], stacked=len(held) > 1, transposed=flipped)
            model, info = kind.from_pretrained(
                None,
                config=settings,
                state_dict=state,
                dtype=torch.float32,
                attn_implementation="eager",
                experts_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise UnsupportedModel(f"transformers does not load {source}: {str(error)[:400]}.") from error
    if missing := sorted(info["missing_keys"]):
        raise CorruptCheckpoint(source, f"it lacks parameters of its model: {', '.join(missing[:4])}")
    unused = [name for name in sorted(info["unexpected_keys"]) if name not in tensors or tensors[name].any()]
    if unused:  # zeros are biases that some quantizers write where the model has none
        log.warning("%s has tensors that its model does not use: %s", source, ", ".join(unused[:4]))
    _turn(model)
    device = to_tensor(ops.zeros((1,), "float32")).device
    for part in model.modules():
        for value in (*part._parameters.values(), *part._buffers.values()):
            if value is not None and not isinstance(value, WeightTensor):
                value.data = value.data.to(device)
    return model.requires_grad_(False)


def knows(config: Mapping[str, Any]) -> bool:
    """Whether transformers has a causal language model for this config.json."""
    model_type = config.get("model_type")
    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING


def check_sizes(config: Mapping[str, Any], tensors: int, source: str) -> None:
    """Refuse what would take hours before a tensor is looked at: modules are made as the settings say.

    `tensors`: how many there are, of which each layer has one at least.
    """
    limits = {
        "(layers?|blocks|stack|depths?)$": max(_FEW, tensors),
        "heads?$": _HEADS,
        "(experts|groups)$": _MANY,
    }
    for key, value in _leaves(config):
        most = next((most for ends, most in limits.items() if re.search(ends, key)), _SIZE)
        if isinstance(value, int) and value > most:
            raise CorruptCheckpoint(source, f"{key} is {value}, too many for {tensors} tensors")


def _leaves(value: Any, key: str = "config.json") -> Iterator[tuple[str, Any]]:
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        yield from _leaves(part, name if isinstance(name, str) else key)
    yield key, value


def _own(value: Any) -> Any:
    """What a configuration says of the model, with the numbers that JSON has not, which transformers writes as
    objects."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {name: _own(part) for name, part in value.items() if name not in _NOT_OURS}
    return [_own(part) for part in value] if isinstance(value, list) else value


def _class_of(config: Mapping[str, Any], source: str) -> tuple[Any, Any]:
    """The configuration, and the class of its causal language model."""
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"{source} is a {model_type!r:.60} model, which transformers {transformers.__version__} does not know."
        )
    try:
        settings = CONFIG_MAPPING[model_type].from_dict(_own(config))
    except Exception as error:
        raise CorruptCheckpoint(source, f"transformers refuses its config.json: {str(error)[:300]}") from error
    if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"{source} is a {model_type} model, which is no causal language model in transformers.")
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    if kind.config_class is settings.sub_configs.get("text_config"):
        settings = settings.get_text_config()
    return settings, kind


def _checked(
    settings: Any, kind: Any, tensors: Mapping[str, Array], weights: Mapping[str, Sequence[Weight]], source: str
) -> list[str]:
    """The names of the modules that want their matrices turned. Refuses a model larger than its tensors before memory
    is taken for it."""
    try:
        with torch.device("meta"):
            model = kind(settings)
    except Exception as error:
        raise UnsupportedModel(f"transformers does not make the model of {source}: {str(error)[:400]}.") from error
    held = sum(array.size for array in tensors.values())
    held += sum(math.prod(one.shape) for each in weights.values() for one in each)
    wanted = sum(value.numel() for value in model.parameters())
    kept = max((value.numel() for value in model.buffers()), default=0)
    # Tied matrices may count twice; buffers follow from the settings and are in no file.
    if wanted > 2 * held + _SLACK or kept > _SIZE:
        raise CorruptCheckpoint(source, f"its settings describe {wanted} parameters, its files hold {held}")
    return [name for name, part in model.named_modules() if isinstance(part, Conv1D)]


def _state(array: Array, ops: Ops) -> Any:
    """A tensor of the checkpoint: matrices, and stacks of them, as weights; what is left as a copy, since some models
    write to their parameters when they are loaded."""
    if array.dtype.name not in _FORMATS or array.ndim not in (2, 3):
        return to_tensor(array.copy())
    matrices = array if array.ndim == 3 else array[None]
    return WeightTensor([[_dense(ops, matrix)] for matrix in matrices], stacked=array.ndim == 3)


def _dense(ops: Ops, matrix: Array) -> Weight:
    rows, columns = matrix.shape
    return make_weight(ops, _FORMATS[matrix.dtype.name], (rows, columns), {"weight": matrix})


def _ends(name: str, modules: list[str]) -> bool:
    """Whether a tensor is one of these modules' weight, whatever prefix either has."""
    module = name.rpartition(".")[0]
    return any(f".{module}".endswith(f".{other}") or f".{other}".endswith(f".{module}") for other in modules)


def _turn(model: Any) -> None:
    """Lay matrices that modules want as [K, N] the way that our products want them."""
    for part in model.modules():
        wanted = isinstance(part, Conv1D) or getattr(part, "is_transposed", False)
        for name, value in list(part._parameters.items()):
            if wanted and isinstance(value, WeightTensor) and not value.transposed:
                matrices = [np.concatenate([held.tensors()["weight"] for held in parts]) for parts in value.weights]
                ops = value.weights[0][0].ops
                held = [[_dense(ops, np.ascontiguousarray(matrix.T))] for matrix in matrices]
                setattr(part, name, nn.Parameter(value.like(held, transposed=True), requires_grad=False))


def settle(model: Any) -> None:
    """Keep the values of weights that the model does not use as matrices, so that no step computes them again."""
    for part in model.modules():
        for name, value in list(part._parameters.items()):
            if isinstance(value, WeightTensor) and value.asked:
                setattr(part, name, nn.Parameter(value.dense(), requires_grad=False))


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers prints no progress and no warnings."""
    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()
