"""What checkpoints say of embedding and scoring: every file read, every wish honoured or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.engine import checkpoints
from tramontane.errors import CorruptCheckpoint, TramontaneError, UnsupportedModel
from tramontane.loading.checkpoint import open_checkpoint
from tramontane.loading.heads import EmbeddingSettings, embedding_settings
from tramontane.models.heads import Dense, Norm

HIDDEN = 32
POOLING = "sentence_transformers.models.Pooling"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "model")


def write(folder: Path, **files: Any) -> None:
    """JSON files by name, `__` standing for a slash."""
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))


def modules(*kinds: str, package: str = "sentence_transformers.models") -> list[dict[str, Any]]:
    paths = ["" if kind == "Transformer" else f"{place}_{kind}" for place, kind in enumerate(kinds)]
    return [
        {"idx": i, "name": str(i), "path": path, "type": f"{package}.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]


def dense(folder: Path, place: int, inputs: int, outputs: int, bias: bool = True, **config: Any) -> dict[str, Any]:
    settings = {"in_features": inputs, "out_features": outputs, "bias": bias, **config}
    write(folder, **{f"{place}_Dense__config": settings})
    tensors = {"linear.weight": np.arange(inputs * outputs, dtype=np.float32).reshape(outputs, inputs)}
    if bias:
        tensors["linear.bias"] = np.ones(outputs, np.float16)
    save_file(tensors, folder / f"{place}_Dense" / "model.safetensors")
    return tensors


def read(folder: Path, head: bool = True) -> EmbeddingSettings:
    with open_checkpoint(folder) as checkpoint:
        return embedding_settings(checkpoint, replace(checkpoint.spec(), head=head))


def test_without_a_word_the_last_token_or_the_mean(folder: Path) -> None:
    settings = read(folder)
    assert (settings.head.pooling, settings.head.normalize, settings.stated) == (("lasttoken",), False, False)
    assert (settings.prompts, settings.default_prompt, settings.max_length) == ({}, "", None)
    assert read(folder, head=False).head.pooling == ("mean",)


def test_all_files(folder: Path) -> None:
    write(
        folder,
        modules=modules("Transformer", "Pooling", "Dense", "Dense", "LayerNorm", "Normalize"),
        **{
            "1_Pooling__config": {
                "word_embedding_dimension": HIDDEN,
                "pooling_mode_lasttoken": True,
                "include_prompt": False,
            }
        },
        sentence_bert_config={"max_seq_length": 77, "do_lower_case": True},
        config_sentence_transformers={
            "prompts": {"query": "Q: ", "document": "", "other": None},
            "default_prompt_name": "query",
        },
    )
    first = dense(folder, 2, HIDDEN, 8, activation_function="torch.nn.modules.linear.Identity")
    dense(folder, 3, 8, 4, bias=False)
    write(folder, **{"4_LayerNorm__config": {"dimension": 4}})
    save_file(
        {"norm.weight": np.ones(4, np.float32), "norm.bias": np.zeros(4, np.float32)},
        folder / "4_LayerNorm/model.safetensors",
    )
    settings = read(folder)
    assert settings.stated
    assert (settings.head.pooling, settings.head.normalize, settings.include_prompt) == (("lasttoken",), True, False)
    assert (settings.max_length, settings.lowercase) == (77, True)
    assert (settings.prompts, settings.default_prompt) == ({"query": "Q: ", "document": ""}, "Q: ")
    one, two, three = settings.head.layers
    assert isinstance(one, Dense)
    assert isinstance(two, Dense)
    assert isinstance(three, Norm)
    assert (one.activation, two.activation) == ("identity", "tanh")
    np.testing.assert_array_equal(one.weight, first["linear.weight"])
    assert one.bias is not None
    assert one.bias.dtype == np.float32
    assert two.bias is None
    assert settings.head.width(HIDDEN) == 4


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ("mean",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode": "weightedmean"}, ("weightedmean",)),
        ({"pooling_mode": ["max", "cls"]}, ("max", "cls")),
    ],
)
def test_pooling_old_and_new(folder: Path, config: dict[str, Any], expected: tuple[str, ...]) -> None:
    package = "sentence_transformers.sentence_transformer.modules"
    write(folder, modules=modules("Transformer", "Pooling", package=package), **{"1_Pooling__config": config})
    assert read(folder).head.pooling == expected


def test_the_tokenizers_length_holds_where_no_other_does(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder, tokenizer_config={**config, "model_max_length": 50})
    assert read(folder).max_length == 50
    write(folder, sentence_bert_config={"max_seq_length": 60})
    assert read(folder).max_length == 60
    write(folder, sentence_bert_config={"max_seq_length": None})
    assert read(folder).max_length == 50
    write(folder, tokenizer_config={**config, "model_max_length": 1e30})
    assert read(folder).max_length is None


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"modules": modules("Transformer", "Pooling", "CNN")}, "'CNN'"),
        ({"modules": modules("Pooling", "Transformer")}, "'Pooling' in place 0"),
        ({"modules": modules("Transformer", "Pooling", "Normalize", "Dense")}, "'Normalize' in place 2"),
        ({"modules": modules("Transformer", "Pooling", package="custom_st")}, "'custom_st.Transformer'"),
        ({"modules": {"a": 1}}, "not a list"),
        ({"modules": [{"type": POOLING}]}, "a type or a path"),
        ({"modules": [{"type": POOLING, "path": "../x"}]}, "a type or a path"),
        ({"modules": [{"type": POOLING, "path": "/etc"}]}, "a type or a path"),
        ({"modules": [{"type": POOLING, "path": "a\0b"}]}, "a type or a path"),
        (
            {"modules": modules("Transformer", "Pooling"), "1_Pooling__config": {"pooling_mode": "median"}},
            "pooling_mode",
        ),
        ({"modules": modules("Transformer", "Pooling", "Dense"), "2_Dense__config": {}}, "no .safetensors"),
        ({"config_sentence_transformers": {"prompts": {"a": 3}}}, "prompts"),
        ({"config_sentence_transformers": {"prompts": {}, "default_prompt_name": "a"}}, "default_prompt_name"),
        ({"sentence_bert_config": {"do_lower_case": 3}}, "do_lower_case"),
        ({"sentence_bert_config": {"max_seq_length": "many"}}, "max_seq_length"),
    ],
)
def test_what_is_not_understood_is_named(folder: Path, files: dict[str, Any], word: str) -> None:
    write(folder, **files)
    with pytest.raises((UnsupportedModel, CorruptCheckpoint)) as error:
        read(folder)
    assert word in str(error.value)


@pytest.mark.parametrize(
    ("inputs", "config", "word"),
    [
        (HIDDEN + 1, {}, "takes 33 elements where there are 32"),
        (HIDDEN, {"activation_function": "os.system"}, "activation_function"),
        (HIDDEN, {"use_residual": True}, "use_residual"),
        (HIDDEN, {"module_output_name": "scores"}, "module_output_name"),
    ],
)
def test_layers_that_do_not_fit(folder: Path, inputs: int, config: dict[str, Any], word: str) -> None:
    write(folder, modules=modules("Transformer", "Pooling", "Dense"))
    dense(folder, 2, inputs, 8, **config)
    with pytest.raises(TramontaneError) as error:
        read(folder)
    assert word in str(error.value)


def test_layers_without_their_tensors(folder: Path) -> None:
    write(folder, modules=modules("Transformer", "Pooling", "Dense"))
    dense(folder, 2, HIDDEN, 8)
    for tensors in ({"other": np.ones(3, np.float32)}, {"linear.weight": np.ones(3, np.float32)}):
        save_file(tensors, folder / "2_Dense" / "model.safetensors")
        with pytest.raises(CorruptCheckpoint, match=r"linear\.weight"):
            read(folder)
    save_file({"linear.weight": np.ones((8, HIDDEN), np.int8)}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="I8"):
        read(folder)
