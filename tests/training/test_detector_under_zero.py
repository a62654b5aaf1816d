"""The detector learns the same on any number of workers and ZeRO stage, also in steps where no image has a box.

Stage 3 applies an old gradient to a parameter that took no part in a step (DeepSpeed 0.19.8); the states would part.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.detector_training import train_detector
from tests.support.processes import run_ranks


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], dict[str, Tensor]]:
    return run_ranks(train_detector, 1, 0)[0]


@pytest.mark.parametrize(("world", "stage"), [(2, 2), (2, 3), (1, 3)])
def test_detector_does_not_depend_on_workers_or_stage(
    alone: tuple[list[float], dict[str, Tensor]], world: int, stage: int
) -> None:
    losses, state = alone
    for other_losses, other_state in run_ranks(train_detector, world, stage):
        assert other_losses == pytest.approx(losses, rel=1e-4)
        assert other_state.keys() == state.keys()
        for name, value in state.items():
            # Adam's first steps turn gradients of rounding size into whole steps of 1e-3: single values may differ.
            differing = (other_state[name] - value).abs() > 1e-4
            assert float(differing.float().mean()) < 0.02, name
            torch.testing.assert_close(other_state[name], value, rtol=0, atol=6e-3)
