"""The engine's promises: the trajectory does not depend on workers or stage, and bad steps change nothing.

These tests also fail when a DeepSpeed upgrade moves the partitions that dino_scale/training/zero.py reads.
"""

from __future__ import annotations

import pytest

from tests.support.processes import run_ranks
from tests.support.tiny_training import train_whole

STEPS = 8


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], dict[str, str], int]:
    return run_ranks(train_whole, 1, 0, STEPS)[0]


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 0), (2, 1), (2, 2), (2, 3), (3, 2)])
def test_losses_do_not_depend_on_workers_or_stage(alone, world: int, stage: int) -> None:
    results = run_ranks(train_whole, world, stage, STEPS)
    for losses, _, optimizer_steps in results:
        assert losses == pytest.approx(alone[0], rel=1e-5)
        assert optimizer_steps == STEPS


def test_same_topology_is_bitwise_equal() -> None:
    first = run_ranks(train_whole, 2, 1, STEPS)
    second = run_ranks(train_whole, 2, 1, STEPS)
    assert first == second
    assert first[0][1] == first[1][1], "ranks disagree about the state"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_step_with_nan_is_left_out_on_all_ranks(stage: int) -> None:
    losses, state, optimizer_steps = run_ranks(train_whole, 2, stage, 4, 3)[0]
    _, expected, _ = run_ranks(train_whole, 2, stage, 3)[0]
    assert losses[3] != losses[3], "the planted NaN did not reach the loss"
    assert optimizer_steps == 3
    assert state == expected
