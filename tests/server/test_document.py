"""The OpenAPI document: schemathesis finds nothing in it that the server does not keep to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import Live, live
from tramontane.backends.mock import MockBackend
from tramontane.server.keys import ApiKey
from tramontane.server.schemas.chat import ChatRequest
from tramontane.server.schemas.completions import CompletionRequest
from tramontane.server.schemas.reading import EmbeddingsRequest, RerankRequest
from tramontane.server.schemas.tokens import DetokenizeRequest, TokenizeRequest

PATHS = {
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/v1/models", "/v1/models/{model}",
    "/tokenize", "/detokenize", "/health", "/ready", "/metrics",
}  # fmt: skip


def test_the_document_has_every_endpoint_and_no_error_that_is_never_sent(mock: Live) -> None:
    document = mock.get("/openapi.json").json()
    assert document["paths"].keys() == PATHS
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["description"], path
            assert "422" not in operation["responses"]
            assert operation["responses"]["4XX"]["content"]["application/json"]["schema"] == {
                "$ref": "#/components/schemas/ErrorReply"
            }
    assert {"ChatChunk", "ChunkChoice", "Delta"} <= document["components"]["schemas"].keys()


def test_the_page_of_the_document_needs_nobody_else(mock: Live) -> None:
    page = mock.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert all(path in page.text for path in PATHS)
    assert "max_completion_tokens" in page.text


def test_every_field_of_the_published_schemas_is_known() -> None:
    chat = pytest.importorskip("openai.types.chat.completion_create_params")
    others = pytest.importorskip("openai.types")
    published: list[tuple[type, Any]] = [
        (ChatRequest, chat.CompletionCreateParamsStreaming),
        (CompletionRequest, others.completion_create_params.CompletionCreateParamsStreaming),
        (EmbeddingsRequest, others.EmbeddingCreateParams),
    ]
    for ours, theirs in published:
        known = {field.alias or name for name, field in ours.model_fields.items()}  # type: ignore[attr-defined]
        names = {name for kind in theirs.__mro__ for name in getattr(kind, "__annotations__", ())}
        names |= set(theirs.__annotations__)
        assert len(names) > 4
        assert not names - known, ours


def test_keys_are_in_the_document_where_there_are_any(mock: Live) -> None:
    assert "security" not in mock.get("/openapi.json").json()
    with live(MockBackend(), keys=(ApiKey("a", "a-long-secret"),)) as server:
        document = server.get("/openapi.json").json()
    assert document["security"] == [{"key": []}]
    assert document["paths"]["/health"]["get"]["security"] == []


DOCS = Path(__file__).parents[2] / "docs"
needs_docs = pytest.mark.skipif(not DOCS.is_dir(), reason="this copy of the sources has no documents")


@needs_docs
def test_every_endpoint_and_field_is_explained(mock: Live) -> None:
    text = (DOCS / "server.md").read_text(encoding="utf-8")
    assert all(path.replace("{model}", "{id}") in text for path in PATHS)
    for kind in (ChatRequest, CompletionRequest, EmbeddingsRequest, RerankRequest, TokenizeRequest, DetokenizeRequest):
        for name in set(kind.model_fields) - {"max_chunks_per_doc"}:
            assert f"`{name}" in text, name


@needs_docs
def test_every_metric_is_explained_and_the_dashboard_shows_what_there_is(mock: Live) -> None:
    mock.chat()
    shown = mock.get("/metrics").text
    names = set(re.findall(r"^# TYPE (\S+) (?:counter|gauge|histogram)$", shown, re.MULTILINE))
    names = {name for name in names if not name.endswith("_created")}
    text = (DOCS / "operations.md").read_text(encoding="utf-8")
    assert {name for name in names if f"`{name}`" not in text} == set()
    absent = {"vllm:kv_cache_usage_perc"}  # of a backend without a cache
    panels = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))["panels"]
    for expression in (target["expr"] for panel in panels for target in panel["targets"]):
        for name in re.findall(r"(?:vllm|tramontane):\w+", expression):
            assert name.removesuffix("_bucket") in names | absent, name


@pytest.mark.slow
@pytest.mark.parametrize("keys", [(), (ApiKey("a", "a-long-secret"),)], ids=["open", "keys"])
def test_schemathesis_finds_nothing(keys: tuple[ApiKey, ...], tmp_path: Path) -> None:
    """But that valid bodies may be refused: a schema does not hold what fields have to do with each other, nor what a
    model can."""
    pytest.importorskip("schemathesis")
    with live(MockBackend("The wind is up."), keys=keys) as server:
        program = "from schemathesis.cli import schemathesis; schemathesis()"
        command = [sys.executable, "-c", program, "run", f"{server.url}/openapi.json", "--no-color"]
        command += ["--max-examples", "30", "--exclude-checks", "positive_data_acceptance"]
        command += ["--header", "Authorization: Bearer a-long-secret"] if keys else []
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert server.get("/health").status_code == 200
