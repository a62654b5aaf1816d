"""The detector learns the same on any number of workers and ZeRO stage, also in steps where no image has a box.

Stage 3 applies an old gradient to a parameter that took no part in a step (DeepSpeed 0.19.8); the states would part.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.detector_training import DECAY, average_and_poison, train_detector
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


@pytest.fixture(scope="module")
def poisoned() -> list[dict[str, Any]]:
    return run_ranks(average_and_poison, 2, 2)


def test_average_counts_shared_heads_once(poisoned: list[dict[str, Any]]) -> None:
    """One step moves the average by exactly 1 - decay of what the weights moved.

    The heads serve every decoder layer; the official code averages them once per name in its state dict, 12 times.
    """
    before, after = poisoned[0]["before"], poisoned[0]["after"]
    for name, start in before.items():
        expected = torch.lerp(start, after["fp32"][name], 1 - DECAY)
        assert torch.equal(after["ema"][name], expected), name
    for head in ("decoder.class_head.weight", "decoder.box_head.layers.2.weight"):
        assert not torch.equal(after["ema"][head], before[head]), head


def test_step_with_nan_in_one_rank_changes_nothing_on_any(poisoned: list[dict[str, Any]]) -> None:
    for result in poisoned:
        assert result["applied"] == (True, False)
        assert result["loss"] != result["loss"], "the planted NaN did not reach the loss"
        for kind, tensors in result["after"].items():
            for name, tensor in tensors.items():
                assert torch.equal(result["state"][kind][name], tensor), (kind, name)
