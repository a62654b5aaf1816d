"""Fixtures of the parity tests: one thread, so that sums are made in one order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dino_scale.model.dino import Dino
from tests.support.goldens import Case, read_arrays, read_case


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def components() -> dict[str, np.ndarray]:
    return read_arrays("components")


@pytest.fixture(scope="module", params=["small", "small5"])
def case(request: pytest.FixtureRequest) -> Case:
    return read_case(request.param)


@pytest.fixture(scope="module")
def model(case: Case) -> Dino:
    return case.model()
