"""The kernel modules under test, one a parameter."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.modules import DETERMINISTIC, MODULES, make
from tramontane.kernels import Ops


@pytest.fixture(params=MODULES, scope="module")
def ops(request: pytest.FixtureRequest) -> Ops:
    return make(request.param)


@pytest.fixture(params=DETERMINISTIC, scope="module")
def fixed(request: pytest.FixtureRequest) -> Ops:
    return make(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)
