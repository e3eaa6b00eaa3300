"""One forward pass: what the attention and mask functions that we register with transformers do while it runs.

Owns the registered functions and the pass that is current. Must not know: what a pass is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "tramontane"
"""The name of our attention among those of transformers."""


class Refused(Exception):
    """What the model does cannot be done our way; the message says what, with the model as "it"."""


class Pass(Protocol):
    """What happens where a model attends."""

    def mask(self, allowed: Callable[..., Any]) -> Any:
        """What the model hands on as its mask; `allowed(batch, head, query, key)` says who sees whom."""
        ...

    def attend(self, q: Any, k: Any, v: Any, mask: Any, options: Mapping[str, Any]) -> Any:
        """[1,T,H,D] of q, k, v [1,H,T,D]."""
        ...


_CURRENT: ContextVar[Pass] = ContextVar("current pass")


@contextmanager
def running(current: Pass) -> Iterator[None]:
    """Forward passes inside are `current`."""
    token = _CURRENT.set(current)
    try:
        with torch.inference_mode():
            yield
    finally:
        _CURRENT.reset(token)


def _attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **options: Any) -> Any:
    return _CURRENT.get().attend(query, key, value, attention_mask, options), None


def _mask(*, mask_function: Callable[..., Any], **_: Any) -> Any:
    return _CURRENT.get().mask(mask_function)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _mask)
