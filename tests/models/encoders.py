"""Tiny random encoders, made and computed by transformers, with a tokenizer of words beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from tests.models.tiny import randomize

SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
WORDS = [f"w{number}" for number in range(93)]
VOCAB = len(SPECIAL) + len(WORDS)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "layer_norm_eps": 0.05,
}
_MODERN: dict[str, Any] = {
    **{key: value for key, value in _SHAPE.items() if key != "layer_norm_eps"},
    "num_hidden_layers": 5,
    "norm_eps": 0.05,
    "local_attention": 12,
    **{f"{part}_token_id": None for part in ("bos", "eos", "pad", "cls", "sep")},
    "pad_token_id": 1,
}
_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 700.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}

# name -> (model_type, settings): lengths in the tests lie on both sides of the windows.
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _SHAPE),
    "bert-relu": ("bert", {**_SHAPE, "hidden_act": "relu", "type_vocab_size": 3}),
    "roberta": ("roberta", {**_SHAPE, "pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": ("xlm-roberta", {**_SHAPE, "pad_token_id": 1, "type_vocab_size": 1, "hidden_act": "gelu_new"}),
    "distilbert": (
        "distilbert",
        {
            "vocab_size": VOCAB,
            "dim": 48,
            "hidden_dim": 80,
            "n_layers": 3,
            "n_heads": 4,
            "max_position_embeddings": 96,
            "activation": "relu",
            "pad_token_id": 1,
        },
    ),
    "nomic_bert": (
        "nomic_bert",
        {**_SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 70.0}},
    ),
    "modernbert": ("modernbert", {**_MODERN, "rope_parameters": _ROPES}),
    "modernbert-biases": (
        "modernbert",
        {
            **_MODERN,
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "hidden_activation": "silu",
            "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "full", "sliding", "full")],
        },
    ),
}


def write_tokenizer(folder: Path, *, pairs: str = "bert") -> None:
    """Words by spaces; texts between [CLS] and [SEP], pairs as BERT or as RoBERTa has them."""
    vocab = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    pair = {"bert": "[CLS] $A [SEP] $B:1 [SEP]:1", "roberta": "[CLS] $A [SEP] [SEP] $B [SEP]"}[pairs]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def text(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


class TinyEncoder:
    """A case, as what `kind` of model: `Model` or `ForSequenceClassification`."""

    def __init__(self, name: str, folder: Path, kind: str = "Model", **settings: Any) -> None:
        torch = pytest.importorskip("torch", reason="torch is not installed")
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        model_type, own = CASES[name]
        self.torch, self.transformers, self.path = torch, transformers, folder / f"{name}-{kind}-{len(settings)}"
        config = transformers.AutoConfig.for_model(model_type, **{**own, **settings})
        make = getattr(transformers, f"AutoModel{kind.removeprefix('Model')}")
        self.model = make.from_config(config, attn_implementation="eager").float().eval()
        randomize(torch, self.model, seed=len(name))
        self.model.save_pretrained(self.path)
        roberta = "roberta" in model_type
        write_tokenizer(self.path, pairs="roberta" if roberta else "bert")
        self.typed = model_type in ("bert", "nomic_bert")
        self.load_tokenizer()

    def load_tokenizer(self) -> None:
        """From its file, as it is now."""
        named = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        file = str(self.path / "tokenizer.json")
        self.tokenizer = self.transformers.PreTrainedTokenizerFast(tokenizer_file=file, **named)

    def inputs(self, *texts: Any, **options: Any) -> Any:
        options = {"return_tensors": "pt", "padding": True, "return_token_type_ids": self.typed, **options}
        return self.tokenizer(*texts, **options)

    def states(self, given: str) -> Any:
        """float32 [T,H] of one text's tokens."""
        with self.torch.no_grad():
            return self.model(**self.inputs(given)).last_hidden_state[0]

    def logits(self, query: str, documents: Sequence[str], **options: Any) -> Any:
        """float32 [N,labels] of pairs, padded together."""
        with self.torch.no_grad():
            return self.model(**self.inputs([query] * len(documents), list(documents), **options)).logits.numpy()

    def configure(self, **changes: Any) -> None:
        """Change config.json."""
        path = self.path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TinyEncoders:
    """CASES by name, each made once."""

    def __init__(self, folder: Path) -> None:
        self.get = cache(lambda name: TinyEncoder(name, folder))
