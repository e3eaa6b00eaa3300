"""Metrics for Prometheus, under vLLM's names where vLLM has them, so that dashboards work.

Owns what is counted and how it is named. Must not know: HTTP routes' work, schemas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tramontane.server.records import Record
from tramontane.types import Chunk, Stats

_SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_LONG = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)

# Of an engine's Stats: name, help, field; what only grows, and what goes up and down.
_GROWING = (
    ("vllm:prompt_tokens", "Prompt tokens processed.", "prompt_tokens"),
    ("vllm:generation_tokens", "Tokens generated.", "generated_tokens"),
    ("vllm:num_preemptions", "Sequences that had to start over.", "preemptions"),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prompt_tokens"),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", "cached_tokens"),
    ("tramontane:steps", "Steps of the engine.", "steps"),
)
_MOVING = (
    ("vllm:num_requests_running", "Sequences that are computed.", "running"),
    ("vllm:num_requests_waiting", "Sequences that wait for room.", "waiting"),
    ("tramontane:kv_blocks", "Blocks of the KV cache.", "blocks_total"),
    ("tramontane:kv_blocks_used", "Blocks in use.", "blocks_used"),
    ("tramontane:kv_blocks_cached", "Blocks that are free and remembered.", "blocks_cached"),
    ("tramontane:weight_bytes", "Bytes of weights.", "weight_bytes"),
    ("tramontane:cache_bytes", "Bytes of the KV cache.", "cache_bytes"),
    ("tramontane:workspace_bytes", "Bytes of the workspace.", "workspace_bytes"),
)


class Metrics:
    """A registry of its own for each server. `stats` gives the engine's, or None where there are none."""

    def __init__(self, model: str, stats: Callable[[], Stats | None], open_requests: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._model, self._stats, self._open = model, stats, open_requests
        by_model: Any = {"labelnames": ("model_name",), "registry": self.registry}

        def histogram(name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help_, buckets=buckets, **by_model).labels(model)

        self._first = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", _SHORT)
        self._between = histogram("vllm:inter_token_latency_seconds", "Between a choice's tokens.", _SHORT)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", _LONG)
        self._prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._generated = histogram("vllm:request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self._success = Counter(
            "vllm:request_success", "Choices that ended.", ("model_name", "finished_reason"), registry=self.registry
        )
        self._requests = Counter(
            "tramontane:http_requests", "Requests by path, status and key.", ("path", "status", "key"),
            registry=self.registry,
        )  # fmt: skip
        self._tokens = Counter(
            "tramontane:key_tokens", "Tokens by key and kind: prompt, cached (of the prompt), completion.",
            ("key", "kind"), registry=self.registry,
        )  # fmt: skip
        self.registry.register(_Engine(self._engine))

    def saw(self, record: Record, chunk: Chunk) -> None:
        """A chunk has come."""
        now = time.perf_counter()
        if chunk.token_ids:
            if record.first_token is None:
                record.first_token = now
                self._first.observe(now - record.started)
            last = record.last_tokens.get((chunk.request_id, chunk.index))
            if last is not None:
                self._between.observe((now - last) / len(chunk.token_ids))
            record.last_tokens[chunk.request_id, chunk.index] = now
        if chunk.finish_reason is not None:
            record.finish_reasons.append(chunk.finish_reason)
            self._success.labels(self._model, chunk.finish_reason).inc()

    def ended(self, record: Record, scope: MutableMapping[str, Any]) -> None:
        """A request has ended. Its path counts as the route's, so that nobody can make up names without end."""
        route = getattr(scope.get("route"), "path", "none")
        self._requests.labels(route, str(record.status or 499), record.key_name).inc()
        for kind, count in (
            ("prompt", record.prompt_tokens), ("cached", record.cached_tokens), ("completion", record.completion_tokens)
        ):  # fmt: skip
            if count:
                self._tokens.labels(record.key_name, kind).inc(count)
        if record.finish_reasons:
            self._whole.observe(time.perf_counter() - record.started)
            self._prompt.observe(record.prompt_tokens)
            self._generated.observe(record.completion_tokens)

    def shown(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)

    def _engine(self) -> Iterator[Metric]:
        opened = GaugeMetricFamily("tramontane:open_requests", "Prompts that are being answered or wait.")
        opened.add_metric([], self._open())
        yield opened
        stats = self._stats()
        if stats is None:
            return
        for name, help_, field in _GROWING:
            counter = CounterMetricFamily(name, help_, labels=["model_name"])
            counter.add_metric([self._model], getattr(stats, field))
            yield counter
        moving = [(name, help_, getattr(stats, field)) for name, help_, field in _MOVING]
        if stats.blocks_total:
            used = stats.blocks_used / stats.blocks_total
            moving.append(("vllm:kv_cache_usage_perc", "Part of the KV cache in use; 1 is all.", used))
        for name, help_, value in moving:
            gauge = GaugeMetricFamily(name, help_, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge


class _Engine:
    """What prometheus_client asks on each scrape."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self.collect = collect
