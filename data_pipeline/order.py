"""The order of samples: a pure function of (seed, epoch, index), and the endless stream made of it.

Only raw Philox words are used, whose sequence numpy guarantees for ever; its shuffles may change between versions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

WINDOW = 4  # shards whose samples are mixed with one another
ORDER, AUGMENTATION, RUNS = 1, 2, 3  # purposes that keep the random words of one seed apart
_WORD = 2**64


def philox(seed: int, purpose: int, epoch: int, sample: int = 0) -> np.random.Philox:
    """Random words that depend on the arguments alone."""
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed is {seed} and epoch is {epoch}: expected 0 or more")
    counter = np.array([0, sample, epoch, purpose], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=np.array([seed % _WORD, seed // _WORD % _WORD], dtype=np.uint64))


def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """(n,) sample ids of an epoch, each once.

    Ties between random words (probability about n^2 / 2^65) keep their order: the result is still exact.
    """
    return np.argsort(philox(seed, ORDER, epoch).random_raw(n), kind="stable")


def windowed_order(shards: NDArray[Any], seed: int, epoch: int) -> NDArray[np.int64]:
    """(n,) sample ids of an epoch, each once, so that only WINDOW shards are needed at a time and each for one window.

    shards: (n,) number of each sample's shard. Every epoch puts other shards together and mixes the samples of a window
    anew. Good for object stores and caches of shards.
    """
    words = philox(seed, ORDER, epoch)
    count = int(shards.max()) + 1
    place = np.empty(count, dtype=np.int64)
    place[np.argsort(words.random_raw(count), kind="stable")] = np.arange(count)
    return np.lexsort((words.random_raw(len(shards)), (place // WINDOW)[shards]))


class Stream(Protocol):
    """An endless sequence of (sample id, epoch), a pure function of position."""

    def take(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(sample id, epoch) of the positions start, start + 1, ..., stop - 1."""


class SampleStream:
    """The epochs' orders one after another: position p is sample `p % n` of epoch `p // n`."""

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"a stream of {n} samples: expected at least 1")
        self.n, self.seed = n, seed
        self._orders: dict[int, NDArray[np.int64]] = {}  # of the last two epochs asked for

    def take(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(sample id, epoch) of the positions start, start + 1, ..., stop - 1."""
        return [(int(self._order(p // self.n)[p % self.n]), p // self.n) for p in range(start, stop)]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = self._make(epoch)
        return self._orders[epoch]

    def _make(self, epoch: int) -> NDArray[np.int64]:
        return epoch_order(self.n, self.seed, epoch)


class WindowedStream(SampleStream):
    """As `SampleStream`, of `windowed_order`. shards: gives the number of each sample's shard."""

    def __init__(self, n: int, seed: int, shards: Callable[[], NDArray[Any]]) -> None:
        super().__init__(n, seed)
        self.shards = shards

    def _make(self, epoch: int) -> NDArray[np.int64]:
        return windowed_order(self.shards(), self.seed, epoch)


class Draws:
    """The random draws of one sample's augmentation: a function of (seed, epoch, sample id) alone."""

    def __init__(self, seed: int, epoch: int, sample: int) -> None:
        self._words = philox(seed, AUGMENTATION, epoch, sample)

    def uniform(self) -> float:
        """In [0, 1)."""
        return float(int(self._words.random_raw()) >> 11) * 2.0**-53

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return low + (int(self._words.random_raw()) * (high - low + 1) >> 64)

    def choice(self, values: Sequence[int]) -> int:
        return values[self.integer(0, len(values) - 1)]

    def offset(self, most: int) -> int:
        """Of a crop: from 0 to most, both included."""
        return self.integer(0, most)
