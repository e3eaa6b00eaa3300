"""/v1/models, and what operators ask: what comes back."""

from __future__ import annotations

from typing import Literal

from tramontane.server.schemas.base import Reply


class ModelCard(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """The first of the model's names."""
    max_model_len: int
    """Tokens that a prompt and its answer have together."""


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelCard]


class Health(Reply):
    status: Literal["ok", "failed"]


class Readiness(Reply):
    status: Literal["loading", "ready", "draining", "failed"]
