"""Which tokenizer and which templates a checkpoint has."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.checkpoints import write as write_tiny
from tests.loading.test_mistral import PARAMS, random_tensors, write
from tramontane.backends.language import template_of, templates_of, tokenizer_of
from tramontane.errors import ModelNotFound
from tramontane.llm import LLM
from tramontane.loading.checkpoint import open_checkpoint

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def tekken(folder: Path) -> None:
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)]
    content = {
        "config": {
            "pattern": r"[^\s]+|\s+",
            "num_vocab_tokens": 256,
            "default_vocab_size": 256 + len(special),
            "default_num_special_tokens": len(special),
            "version": "v11",
        },
        "vocab": vocab,
        "special_tokens": [{"rank": i, "token_str": s, "is_control": True} for i, s in enumerate(special)],
    }
    (folder / "tekken.json").write_text(json.dumps(content))


def sentencepiece(folder: Path) -> None:
    trainer = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    trainer.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "t"), vocab_size=290, model_type="bpe", byte_fallback=True
    )
    (folder / "t.model").rename(folder / "tokenizer.model.v3")


@pytest.mark.parametrize("write_tokenizer", [tekken, sentencepiece])
def test_it_writes_with_its_own_tokenizer(tmp_path: Path, write_tokenizer: Callable[[Path], None]) -> None:
    folder = write(tmp_path / "m", PARAMS, random_tensors())
    write_tokenizer(folder)
    with LLM(folder, context_length=64) as llm:
        result = llm.generate("the fox", max_tokens=5, temperature=0, ignore_eos=True)
        assert result.usage.completion_tokens == 5
        assert llm.tokenize("the fox")[0] == 1  # BOS
    with open_checkpoint(folder) as checkpoint:
        template = template_of(
            checkpoint, tokenizer_of(checkpoint), "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
        )
    assert template is not None
    assert template.render(MESSAGES) == "<s>hi</s>"


def test_without_a_tokenizer(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", PARAMS, random_tensors())
    with open_checkpoint(folder) as checkpoint, pytest.raises(ModelNotFound, match=r"no tokenizer\.json"):
        tokenizer_of(checkpoint)


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", template="plain")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].function.name }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    with open_checkpoint(folder) as checkpoint:
        assert templates_of(checkpoint) == {entry["name"]: entry["template"] for entry in named}
        template = template_of(checkpoint, tokenizer_of(checkpoint))
        assert template is not None
        assert template.render(MESSAGES) == "plain"
        assert template.render(MESSAGES, tools=TOOLS) == "add"
        override = template_of(checkpoint, tokenizer_of(checkpoint), "mine")
        assert override is not None
        assert override.render(MESSAGES, tools=TOOLS) == "mine"
    # chat_template.jinja and the folder beside it take the place of tokenizer_config.json's
    (folder / "chat_template.jinja").write_text("jinja")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }}")
    with open_checkpoint(folder) as checkpoint:
        template = template_of(checkpoint, tokenizer_of(checkpoint))
    assert template is not None
    assert (template.render(MESSAGES), template.render(MESSAGES, tools=TOOLS)) == ("jinja", "1")
