"""Tramontane: open language models, fast, on the machine at hand."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tramontane.errors import (
        AuthenticationRequired,
        ContextLengthExceeded,
        CorruptCheckpoint,
        DeviceNotAvailable,
        DownloadFailed,
        EngineClosed,
        InvalidRequest,
        MissingExtra,
        ModelNotFound,
        OutOfMemory,
        Overloaded,
        RequestCancelled,
        RequestTimeout,
        TemplateError,
        TramontaneError,
        UnsupportedModel,
    )
    from tramontane.llm import LLM, AsyncLLM, load_gguf_hf
    from tramontane.loading.sources import ModelSource
    from tramontane.types import (
        AudioPart,
        Choice,
        Chunk,
        Embedding,
        EmbedRequest,
        Grammar,
        ImagePart,
        Message,
        NamedTool,
        Ranked,
        Request,
        RerankRequest,
        RerankResult,
        Result,
        SamplingParams,
        Score,
        Stats,
        TextPart,
        TokenLogprob,
        Tool,
        ToolCall,
        ToolCallDelta,
        Usage,
    )

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "AudioPart",
    "AuthenticationRequired",
    "Choice",
    "Chunk",
    "ContextLengthExceeded",
    "CorruptCheckpoint",
    "DeviceNotAvailable",
    "DownloadFailed",
    "EmbedRequest",
    "Embedding",
    "EngineClosed",
    "Grammar",
    "ImagePart",
    "InvalidRequest",
    "Message",
    "MissingExtra",
    "ModelNotFound",
    "ModelSource",
    "NamedTool",
    "OutOfMemory",
    "Overloaded",
    "Ranked",
    "Request",
    "RequestCancelled",
    "RequestTimeout",
    "RerankRequest",
    "RerankResult",
    "Result",
    "SamplingParams",
    "Score",
    "Stats",
    "TemplateError",
    "TextPart",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "TramontaneError",
    "UnsupportedModel",
    "Usage",
    "__version__",
    "load_gguf_hf",
]


def __getattr__(name: str) -> Any:
    # A name is imported when it is first used: `import tramontane` itself costs next to nothing.
    if name in __all__:
        for home in ("errors", "types", "llm", "loading.sources"):
            value = getattr(import_module(f"tramontane.{home}"), name, None)
            if value is not None:
                globals()[name] = value
                return value
    raise AttributeError(f"module 'tramontane' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
