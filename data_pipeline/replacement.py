"""What takes the place of a sample that cannot be read.

The sample at a position of the stream is replaced by the first one after it in the stream that can be read. Nothing
else moves. So what a step trains on is a function of the order and of which samples are bad, and of nothing else: the
same for any number of workers, loader processes and restarts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.collate import Sample
from data_pipeline.order import Stream
from dino_scale.errors import DataError

MOST_TRIES = 64  # samples in a row that cannot be read: the store is gone, not a sample


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read. position: in the stream. replaced_by: image id of what took its place."""

    position: int
    sample_id: int
    image_id: int
    file_name: str
    shard: str
    reason: str
    replaced_by: int


def find_replacement(stream: Stream, position: int, read: Callable[[int, int], Sample], error: DataError) -> Sample:
    """The sample that stands at `position` instead of the one that failed with `error`.

    read: makes the sample of (sample id, epoch). Raises DataError where MOST_TRIES in a row fail.
    """
    for later in range(position + 1, position + MOST_TRIES):
        [(sample, epoch)] = stream.take(later, later + 1)
        try:
            return read(sample, epoch)
        except DataError:
            continue
    raise DataError(f"{error} ({MOST_TRIES} samples in a row cannot be read)")
