"""For operators: /health, /ready, /metrics."""

from __future__ import annotations

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST

from tramontane.server.routes.common import TheCall, router
from tramontane.server.schemas.models import Health, Readiness
from tramontane.server.wire import JsonResponse

routes = router("operations")


@routes.get("/health", response_model=Health, responses={503: {"model": Health}})
async def health(call: TheCall) -> Response:
    """Whether the server lives: 200 also while it loads or drains, 503 once its engine has failed."""
    failed = call.service.phase == "failed"
    return JsonResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)


@routes.get("/ready", response_model=Readiness, responses={503: {"model": Readiness}})
async def ready(call: TheCall) -> Response:
    """Whether requests are taken: 503 while the model loads, while the server drains, and when it has failed."""
    phase = call.service.phase
    return JsonResponse({"status": phase}, 200 if phase == "ready" else 503)


@routes.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def metrics(call: TheCall) -> Response:
    """For Prometheus."""
    return Response(call.metrics.shown(), headers={"Content-Type": CONTENT_TYPE_LATEST})
