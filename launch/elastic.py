"""How many workers a stage may have, and how often it may start again: arithmetic without any machine."""

from __future__ import annotations

from data_pipeline.loader import microbatches_per_rank
from dino_scale.config.schema import BatchConfig, WorkerRange
from dino_scale.errors import ConfigError, WorkerLostError

_LONGEST_PAUSE_SECONDS = 60.0


def worker_counts(batch: BatchConfig, workers: WorkerRange) -> list[int]:
    """The numbers of workers among which the global batch divides, largest first; ConfigError where there is none."""
    counts = [count for count in range(workers.max, workers.min - 1, -1) if _divides(batch, count)]
    if counts:
        return counts
    if workers.min == workers.max:
        microbatches_per_rank(batch, workers.max)  # raises, and says what to change
    raise ConfigError(
        f"batch.global_size is {batch.global_size} and batch.microbatch {batch.microbatch}: they divide among no "
        f"number of workers from {workers.min} to {workers.max} (launch.workers): change one of them"
    )


def largest_fitting(counts: list[int], room: int) -> int | None:
    """The largest of `counts` (descending) that is at most `room`; None when even the smallest is not."""
    return next((count for count in counts if count <= room), None)


def _divides(batch: BatchConfig, count: int) -> bool:
    return batch.global_size % (batch.microbatch * count) == 0


class Retries:
    """Counts failures in a row; a new checkpoint between two of them is progress, and the count begins anew."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.failures = 0
        self._newest: str | None = None

    def pause_after(self, loss: str, newest: str | None) -> float:
        """Seconds to wait before the next try: none after the first failure, then 2, 4, 8 ... 60.

        newest: name of the newest checkpoint. WorkerLostError, beginning with `loss`, when there were too many.
        """
        if newest != self._newest:
            self.failures, self._newest = 0, newest
        self.failures += 1
        if self.failures > self.limit:
            times = f"{self.failures} times in a row" if self.failures > 1 else "once"
            since = f"since checkpoint {newest}" if newest else "before the first checkpoint"
            raise WorkerLostError(f"{loss}; the workers failed {times} {since}, launch.retries is {self.limit}")
        return 0.0 if self.failures == 1 else min(_LONGEST_PAUSE_SECONDS, 2.0 ** (self.failures - 1))
