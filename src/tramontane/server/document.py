"""What the server says of itself: the OpenAPI document, and a page that shows it.

Owns what FastAPI's document lacks, and the page. Must not know: endpoints' work.

The page is whole in itself: a browser that shows it asks nobody else for anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from fastapi import FastAPI

from tramontane.server.keys import OPEN_PATHS
from tramontane.server.schemas.chat import ChatChunk, ChatRequest
from tramontane.server.schemas.completions import CompletionRequest
from tramontane.server.settings import ServerSettings

Document = dict[str, Any]


def describe(app: FastAPI, settings: ServerSettings, made: Callable[[], Document]) -> Document:
    """FastAPI's document, with the schema of what only streams hold, the keys and the limits of this server."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = made()
    schemas = document["components"]["schemas"]
    chunk = ChatChunk.model_json_schema(ref_template="#/components/schemas/{model}")
    for name, part in {**chunk.pop("$defs", {}), ChatChunk.__name__: chunk}.items():
        schemas.setdefault(name, part)
    _drop_discriminators(document)
    for name in (ChatRequest.__name__, CompletionRequest.__name__):
        for field in ("n", "best_of", "beam_width"):
            schemas[name]["properties"][field]["anyOf"][0]["maximum"] = settings.limits.n
    if settings.keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in OPEN_PATHS & document["paths"].keys():
            document["paths"][path]["get"]["security"] = []
    return document


def _drop_discriminators(part: Any) -> None:
    """The members of our unions tell themselves by constants. A mapping beside them adds nothing, and whoever reads it
    may take a member with several constants for several members."""
    if isinstance(part, dict):
        if "oneOf" in part:
            part.pop("discriminator", None)
        for inner in part.values():
            _drop_discriminators(inner)
    elif isinstance(part, list):
        for inner in part:
            _drop_discriminators(inner)


PAGE_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{font-size:.9em}table{border-collapse:collapse;width:100%}"
    "td{border-top:1px solid #8884;padding:.3rem .6rem .3rem 0;vertical-align:top}summary{cursor:pointer}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}a{color:#9cf}}"
)


def page(document: Document) -> str:
    """The document as HTML: each endpoint, and the fields of its body."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    parts = [
        _endpoint(path, method, operation, document["components"]["schemas"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{escape(document['info']['description'])} "
        f'The whole as <a href="openapi.json">openapi.json</a>.</p>{"".join(parts)}</html>'
    )


def _endpoint(path: str, method: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    text = f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['description'])}</p>"
    body = operation.get("requestBody")
    if body is None:
        return text
    schema = schemas[body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]]
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{' (required)' if name in required else ''}</td>"
        f"<td><code>{escape(_type(field))}</code></td><td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema["properties"].items()
    )
    return f"{text}<details><summary>Fields</summary><table>{rows}</table></details>"


def _type(schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return " | ".join(dict.fromkeys(_type(one) for one in schema[name]))
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema or "enum" in schema:
        return " | ".join(repr(one) for one in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"[{_type(schema.get('items', {}))}]"
    return str(schema.get("type", "any"))
