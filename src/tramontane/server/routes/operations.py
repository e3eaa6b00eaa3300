"""For operators: /health, /ready, /metrics; and /docs."""

from __future__ import annotations

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST

from tramontane.server.document import PAGE_HEADERS, page
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


@routes.get("/docs", include_in_schema=False)
async def docs(call: TheCall) -> Response:
    """The OpenAPI document as a page."""
    return Response(page(call.http.app.openapi()), headers=PAGE_HEADERS, media_type="text/html")
