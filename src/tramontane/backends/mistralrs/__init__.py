"""mistral.rs as a backend, by its official wheel (the extra `mistralrs`).

Owns what it declares and how it is opened. Importing this imports no wheel.
"""

from __future__ import annotations

from tramontane.backends.base import Backend
from tramontane.backends.declared import Declared, Opening
from tramontane.backends.mistralrs.options import OPTION_NAMES
from tramontane.backends.mistralrs.requests import REQUEST_TAKEN, SAMPLING_FIELDS


def open_mistralrs(opening: Opening) -> Backend:
    """The backend with the model in it; see `MistralRSBackend` for the errors."""
    from tramontane.backends.mistralrs.backend import MistralRSBackend

    return MistralRSBackend(
        opening.model,
        opening.options,
        opening.sampling,
        chat_template=opening.chat_template,
        progress=opening.progress,
    )


DECLARED = Declared(
    name="mistralrs",
    summary="mistral.rs by its official wheel: its quantizations, adapters and multimodal models",
    open=open_mistralrs,
    sampling_fields=SAMPLING_FIELDS,
    request_fields=REQUEST_TAKEN,
    abilities=frozenset({"generate", "chat", "tokenize", "embed", "adapt"}),
    options=OPTION_NAMES,
    modules=("mistralrs",),
    extra="mistralrs",
)
