"""Cross-encoders against transformers' AutoModelForSequenceClassification: pairs, token types, heads, activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.encoders import TinyEncoder, text
from tramontane import LLM, ContextLengthExceeded, CorruptCheckpoint, UnsupportedModel

OPTIONS: dict[str, Any] = {"kernels": "reference", "threads": 1, "max_num_batched_tokens": 48, "device": "cpu"}
QUERY = text(7, 1)
DOCUMENTS = [text(length, length) for length in (1, 3, 9, 20, 40, 41, 70, 90)]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {}),
    "xlm-roberta": ("xlm-roberta", {}),
    "distilbert": ("distilbert", {}),
    "modernbert": ("modernbert", {}),
    "modernbert-mean": ("modernbert", {"classifier_pooling": "mean", "classifier_bias": True, "norm_bias": True}),
}


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def by_index(found: Any) -> Any:
    return np.array([one.score for one in sorted(found.results, key=lambda one: one.index)])


@pytest.mark.parametrize("name", CASES)
def test_scores_are_transformers(tmp_path: Path, name: str) -> None:
    case, settings = CASES[name]
    encoder = TinyEncoder(case, tmp_path, "ForSequenceClassification", num_labels=1, **settings)
    fit = [document for document in DOCUMENTS if len(document.split()) <= 70]
    logits = encoder.logits(QUERY, fit)[:, 0]
    with LLM(encoder.path, **OPTIONS) as llm:
        assert llm.capabilities().reranks
        found = llm.rerank(QUERY, fit)
        np.testing.assert_allclose(by_index(found), sigmoid(logits), atol=1e-4)
        assert [one.index for one in found.results] == list(np.argsort(-logits))
        assert found.results[:3] == llm.rerank(QUERY, fit, top_n=3).results
        for index, document in enumerate(fit):
            (alone,) = llm.rerank(QUERY, [document]).results
            assert alone.score == pytest.approx(by_index(found)[index], abs=1e-6)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_what_is_too_long_is_cut_as_transformers_cuts_it(tmp_path: Path, name: str) -> None:
    encoder = TinyEncoder(name, tmp_path, "ForSequenceClassification", num_labels=1)
    longest = 94 if name == "roberta" else 96
    for query in (QUERY, text(60, 3), text(120, 4)):
        logits = encoder.logits(query, DOCUMENTS, truncation="longest_first", max_length=longest)[:, 0]
        with LLM(encoder.path, **OPTIONS) as llm:
            found = llm.rerank(query, DOCUMENTS)
            np.testing.assert_allclose(by_index(found), sigmoid(logits), atol=1e-4)
            lengths = [len(query.split()) + len(document.split()) for document in DOCUMENTS]
            ends = 4 if name == "roberta" else 3
            cut = {one.index: one.truncated for one in found.results}
            assert [cut[index] for index in range(len(DOCUMENTS))] == [n + ends > longest for n in lengths]
            with pytest.raises(ContextLengthExceeded):
                llm.rerank(query, DOCUMENTS, truncate=False)


def test_token_types_matter(tmp_path: Path) -> None:
    """Guards the tests above against a model to which the second text's type makes no difference."""
    encoder = TinyEncoder("bert", tmp_path, "ForSequenceClassification", num_labels=1)
    typed = encoder.logits(QUERY, DOCUMENTS[:3])
    encoder.typed = False
    assert np.abs(encoder.logits(QUERY, DOCUMENTS[:3]) - typed).max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, lambda x: x),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, lambda x: x),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"}, np.tanh),
    ],
)
def test_the_activation_is_as_sentence_transformers_has_it(tmp_path: Path, changes: Any, activation: Any) -> None:
    encoder = TinyEncoder("bert", tmp_path, "ForSequenceClassification", num_labels=1)
    encoder.configure(**changes)
    logits = encoder.logits(QUERY, DOCUMENTS[:4])[:, 0]
    with LLM(encoder.path, **OPTIONS) as llm:
        np.testing.assert_allclose(by_index(llm.rerank(QUERY, DOCUMENTS[:4])), activation(logits), atol=1e-4)
    beside = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
    (encoder.path / "config_sentence_transformers.json").write_text(json.dumps(beside))
    with LLM(encoder.path, **OPTIONS) as llm:
        np.testing.assert_allclose(by_index(llm.rerank(QUERY, DOCUMENTS[:4])), sigmoid(logits), atol=1e-4)


def test_a_classifier_of_several_classes_does_not_rank_but_embeds(tmp_path: Path) -> None:
    encoder = TinyEncoder("bert", tmp_path, "ForSequenceClassification", num_labels=3)
    with LLM(encoder.path, **OPTIONS) as llm:
        assert not llm.capabilities().reranks
        with pytest.raises(UnsupportedModel, match="3 classes"):
            llm.rerank(QUERY, DOCUMENTS)
        with encoder.torch.no_grad():
            states = encoder.model.bert(**encoder.inputs(QUERY)).last_hidden_state[0]
        np.testing.assert_allclose(llm.embed(QUERY).vector, states.mean(0).numpy(), atol=1e-4)


def test_heads_that_are_not_whole(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    encoder = TinyEncoder("bert", tmp_path, "ForSequenceClassification", num_labels=1)
    tensors = load_file(encoder.path / "model.safetensors")
    for broken, word in (
        ({name: t for name, t in tensors.items() if name != "classifier.weight"}, r"classifier\.weight"),
        ({**tensors, "classifier.weight": np.ones((1, 47), np.float32)}, "takes 47"),
    ):
        save_file(broken, encoder.path / "model.safetensors")
        with pytest.raises(CorruptCheckpoint, match=word):
            LLM(encoder.path, **OPTIONS)
    save_file(tensors, encoder.path / "model.safetensors")
    encoder.configure(sbert_ce_default_activation_function="evil.module.Function")
    with pytest.raises(UnsupportedModel, match=r"evil\.module"):
        LLM(encoder.path, **OPTIONS)


def test_a_decoder_with_a_score(tmp_path: Path) -> None:
    """The texts stand side by side, and the last token's state is scored."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.models.cases import CASES as DECODERS
    from tests.models.encoders import VOCAB, write_tokenizer
    from tests.models.tiny import randomize

    case = DECODERS["qwen2"]
    config = transformers.AutoConfig.for_model(case.model_type, **case.settings, num_labels=1, pad_token_id=1)
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    randomize(torch, model, seed=1)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    assert config.vocab_size == VOCAB
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    with LLM(tmp_path, **OPTIONS) as llm, torch.no_grad():
        assert not llm.capabilities().generates
        logits = [
            model(torch.tensor([tokenizer(QUERY, document)["input_ids"]])).logits[0, 0].item()
            for document in DOCUMENTS[:5]
        ]
        np.testing.assert_allclose(by_index(llm.rerank(QUERY, DOCUMENTS[:5])), sigmoid(np.array(logits)), atol=1e-4)
