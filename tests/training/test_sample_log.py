"""The record of which images each step has trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dino_scale.structures import Batch, Targets
from dino_scale.training.sample_log import SampleLog, forget_after, read_samples


def batch(*image_ids: int) -> Batch:
    count = len(image_ids)
    targets = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), (0,) * count)
    return Batch(
        torch.zeros(count, 3, 1, 1, dtype=torch.uint8),
        ((1, 1),) * count,
        ((1, 1),) * count,
        image_ids,
        image_ids,
        targets,
    )


def test_ranks_together_give_every_step_in_the_order_of_the_batch(tmp_path: Path) -> None:
    for step in (1, 2):
        SampleLog(tmp_path, 1, 2).write(step, 1, [batch(step * 10 + 3, step * 10 + 4)])
        SampleLog(tmp_path, 0, 2).write(step, 0, [batch(step * 10 + 1, step * 10 + 2)])
    assert read_samples(tmp_path) == [[11, 12, 13, 14], [21, 22, 23, 24]]


def test_steps_done_again_with_other_workers_count_once(tmp_path: Path) -> None:
    for rank in (0, 1):
        for step in (1, 2):
            SampleLog(tmp_path, rank, 2).write(step, rank, [batch(10 * step + rank)])
    with (tmp_path / "rank_00001.jsonl").open("a") as file:
        file.write('{"step": 3, "micro')  # killed while it wrote
    forget_after(tmp_path, 1)
    SampleLog(tmp_path, 0, 1).write(2, 0, [batch(20), batch(21)])
    assert read_samples(tmp_path) == [[10, 11], [20, 21]]


def test_a_gap_and_a_repetition_are_errors(tmp_path: Path) -> None:
    log = SampleLog(tmp_path, 0, 1)
    log.write(1, 0, [batch(1)])
    log.write(3, 0, [batch(3)])
    with pytest.raises(ValueError, match="steps are missing between 1 and 3"):
        read_samples(tmp_path)
    log.write(1, 0, [batch(1)])
    with pytest.raises(ValueError, match="microbatch 0 of step 1 is recorded twice"):
        read_samples(tmp_path)
