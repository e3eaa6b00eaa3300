"""/v1/models."""

from __future__ import annotations

from fastapi import Response

from tramontane.server.routes.common import Call, TheCall, router
from tramontane.server.schemas.models import ModelCard, ModelList
from tramontane.server.wire import JsonResponse

routes = router("models")


@routes.get("/v1/models", response_model=ModelList)
async def list_models(call: TheCall) -> Response:
    """The models that can be asked, by each of their names."""
    cards = [_card(call, name).dumped() for name in call.settings.names]
    return JsonResponse({"object": "list", "data": cards})


@routes.get("/v1/models/{model:path}", response_model=ModelCard)
async def retrieve_model(model: str, call: TheCall) -> Response:
    """One of them."""
    call.service.check_name(model)
    return JsonResponse(_card(call, model).dumped())


def _card(call: Call, name: str) -> ModelCard:
    capabilities = call.service.backend.capabilities()
    return ModelCard(
        id=name,
        object="model",
        created=call.service.created,
        owned_by="tramontane",
        root=call.settings.names[0],
        max_model_len=capabilities.context_length,
    )
