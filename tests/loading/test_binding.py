"""Which tensors make up a parameter, and what is refused of them."""

from __future__ import annotations

import pytest

from tests.loading.checkpoints import CONFIG
from tramontane.errors import UnsupportedModel
from tramontane.loading.binding import bind
from tramontane.loading.tensors import TensorEntry
from tramontane.models.families import hf_names, spec_from_hf

MIXTRAL = {
    **CONFIG,
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
EXPERT = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"


def bound(*names: str) -> tuple[str, ...]:
    entry = TensorEntry((CONFIG["intermediate_size"], CONFIG["hidden_size"]), "F32", 4)
    tensors = dict.fromkeys(names, entry)
    bindings = bind(hf_names(MIXTRAL), tensors, spec_from_hf(MIXTRAL), "here")
    return tuple(piece.tensor for piece in bindings["layers.0.moe.experts.gate"].pieces)


def test_experts_stand_in_the_order_of_their_numbers() -> None:
    names = [EXPERT.format(number) for number in (2, 0, 1)]
    assert bound(*names) == tuple(sorted(names))


@pytest.mark.parametrize("numbers", [(1,), (0, 2), (1, 2)])
def test_missing_experts_are_told_from_tensors_that_claim_one_place(numbers: tuple[int, ...]) -> None:
    shown = ", ".join(map(str, numbers))
    with pytest.raises(UnsupportedModel, match=f"numbered {shown}: some are missing"):
        bound(*map(EXPERT.format, numbers))
    with pytest.raises(UnsupportedModel, match="several tensors for"):
        bound(EXPERT.format(0), EXPERT.format(0).removeprefix("model."))
