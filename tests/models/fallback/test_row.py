"""Masks of transformers as windows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils as masks  # noqa: E402

from tramontane.models.fallback.passes import Refused  # noqa: E402
from tramontane.models.fallback.row import window_of  # noqa: E402

LEFT = torch.zeros(1, dtype=torch.long)


@pytest.mark.parametrize("context", [8, 128, 131072])
@pytest.mark.parametrize("window", [1, 2, 9, 4096])
def test_windows_are_read_off_masks(window: int, context: int) -> None:
    assert window_of(masks.causal_mask_function, context) is None
    expected = window if max(100, context) >= window else None
    assert window_of(masks.sliding_window_causal_mask_function(window), context) == expected


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (masks.bidirectional_mask_function, "not causal"),
        (masks.sliding_window_bidirectional_mask_function(9), "not causal"),
        (masks.chunked_causal_mask_function(9, LEFT), "chunks"),
        (masks.and_masks(masks.causal_mask_function, lambda b, h, q, k: k != 3), "leaves tokens out"),
        (masks.or_masks(masks.causal_mask_function, lambda b, h, q, k: k < 200), "not causal"),
    ],
)
def test_other_masks_are_refused(mask: Any, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        window_of(mask, 1024)


def test_embeddings_that_depend_on_the_batch_are_not_run_as_one_row(tmp_path: Any) -> None:
    from tests.kernels.modules import make
    from tests.models import zoo
    from tests.models.fallback.test_fallback import load

    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    zoo.save_tiny("cwm", tmp_path, rope_parameters=scaling)
    assert load(tmp_path, make("cpu")).model.way.name == "sequence by sequence"
