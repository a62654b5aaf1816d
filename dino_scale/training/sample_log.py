"""Which images every optimizer step has trained on: one JSON object per microbatch, in R/STAGE/samples/.

    {"step": 12, "microbatch": 3, "images": [397133], "replaced": 0, "world_size": 2}

`step` counts from 1, as in metrics.jsonl; `microbatch` is the number within the global batch; `images` are the raw ids
of the annotation file. The files of all ranks together hold every (step, microbatch) once, whatever was killed and
resumed in between: who resumes a stage first drops the records of steps that it will do again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dino_scale.structures import Batch
from dino_scale.training import distributed
from dino_scale.training.metrics import keep_until

_PATTERN = "rank_*.jsonl"


class SampleLog:
    """The record of one rank."""

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank_{rank:05d}.jsonl"
        self.world = world

    def write(self, step: int, first: int, microbatches: Sequence[Batch]) -> None:
        """The images that step `step` trains on here; `first`: number of the first of these microbatches."""
        lines = [
            json.dumps(
                {
                    "step": step,
                    "microbatch": number,
                    "images": list(batch.image_ids),
                    "replaced": batch.replaced,
                    "world_size": self.world,
                }
            )
            for number, batch in enumerate(microbatches, start=first)
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))


def open_log(folder: Path, step: int, wanted: bool) -> SampleLog | None:
    """This rank's log for the steps after `step`, None unless it is wanted. Call on every rank."""
    distributed.on_rank_zero(lambda: forget_after(folder, step))
    return SampleLog(folder, distributed.rank(), distributed.world_size()) if wanted else None


def forget_after(folder: Path, step: int) -> None:
    """Drop the records, of all ranks that ever were, of steps after `step`. Call on one rank, before any writes."""
    for path in sorted(folder.glob(_PATTERN)):
        keep_until(path, step)


def read_samples(folder: Path) -> list[list[int]]:
    """The image ids of step 1, 2, ..., each in the order of the global batch.

    Raises ValueError where a microbatch is recorded twice or a step is missing.
    """
    steps: dict[int, dict[int, list[int]]] = {}
    for path in sorted(folder.glob(_PATTERN)):
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            microbatches = steps.setdefault(line["step"], {})
            if line["microbatch"] in microbatches:
                raise ValueError(f"{path}: microbatch {line['microbatch']} of step {line['step']} is recorded twice")
            microbatches[line["microbatch"]] = line["images"]
    if sorted(steps) != list(range(1, len(steps) + 1)):
        raise ValueError(f"{folder}: steps are missing between 1 and {max(steps)}")
    return [[image for number in sorted(steps[step]) for image in steps[step][number]] for step in sorted(steps)]
