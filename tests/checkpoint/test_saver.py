"""Saving beside training: what is saved is the moment of the call; a rank that cannot write is heard by all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dino_scale.checkpoint.manifest import Best
from tests.support.processes import run_ranks
from tests.support.saving import fail_on_one_rank, save_and_train_on


@pytest.fixture(scope="module")
def overlapped(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(save_and_train_on, 2, 1, str(tmp_path_factory.mktemp("overlapped") / "checkpoints"))


def test_training_goes_on_beside_a_save_and_does_not_change_it(overlapped: list[dict[str, Any]]) -> None:
    for seen in overlapped:
        assert seen["trained"] != seen["saved"]
        assert seen["newest"] in ("step_00000004", "best_00000002")  # the last save was left to end by itself
        expected = "trained" if seen["newest"] == "step_00000004" else "saved"
        assert seen["loaded"] == seen[expected]


def test_the_best_is_kept_apart_and_stands_in_the_manifest(overlapped: list[dict[str, Any]]) -> None:
    assert {"best_00000002", "step_00000002"} <= set(overlapped[0]["found"])
    assert overlapped[0]["best"] == Best("AP", 0.25, 1)


def test_the_same_position_is_not_written_twice(overlapped: list[dict[str, Any]]) -> None:
    assert not overlapped[0]["rewritten"] and overlapped[0]["said"] == []


def test_memory_is_taken_once_and_shared_with_nobody(overlapped: list[dict[str, Any]]) -> None:
    first, second = (seen["copies"] for seen in overlapped)
    assert first == {"reused": True, "apart": True, "common": True, "exact": True}
    assert second == first | {"common": False}


def test_one_rank_that_cannot_write_is_heard_by_all(tmp_path: Path) -> None:
    """A periodic save that fails is told and the run goes on; one that must not fail is an error on every rank."""
    for seen in run_ranks(fail_on_one_rank, 2, 1, str(tmp_path / "checkpoints")):
        assert seen["noticed"] == [False, True]
        assert len(seen["said"]) == 1
        assert seen["said"][0].startswith("SAVING FAILED: step_00000002 could not be written (rank 1: ")
        assert "file too large" in seen["said"][0]
        assert seen["said"][0].endswith("the newest checkpoint is step_00000001, training goes on")
        assert seen["losses"] == 2
        assert "step_00000003 could not be written (rank 1: " in seen["error"]
        assert "the newest checkpoint is step_00000001" in seen["error"] and "dino-scale resume" in seen["error"]
        assert seen["after_failures"] == ["step_00000001"]
        assert seen["found"] == ["step_00000001", "step_00000004"]
