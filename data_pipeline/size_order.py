"""An order in which the images of a microbatch have nearly the same size after augmentation, so that little is padding.

What the augmentation will make of a sample is known before it is read. Inside windows of the epoch's permutation the
samples are sorted by planned size, cut into runs of one microbatch, and the runs are shuffled. Every sample still
comes once per epoch; which samples share a microbatch is no longer even chance, so this order is off by default.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from data_pipeline.order import RUNS, epoch_order, philox

WINDOW_SAMPLES = 4096  # sorted together; more would save no more padding but mix less
STRIPS = 16  # a window is cut into strips of like height, which are sorted by width


class SizePlannedStream:
    """As `order.SampleStream`; position p is of epoch p // n.

    Microbatches are the slices of the whole stream, so one may reach over the end of an epoch; its samples are left
    where the permutation put them. size_of: (height, width) of (sample id, epoch).
    """

    def __init__(self, n: int, seed: int, microbatch: int, size_of: Callable[[int, int], tuple[int, int]]) -> None:
        if n < 1 or microbatch < 1:
            raise ValueError(f"a stream of {n} samples in microbatches of {microbatch}: expected at least 1 of each")
        self.n, self.seed, self.microbatch, self.size_of = n, seed, microbatch, size_of
        self.window = max(1, WINDOW_SAMPLES // microbatch) * microbatch
        self._permutations: dict[int, NDArray[np.int64]] = {}
        self._windows: dict[tuple[int, int], NDArray[np.int64]] = {}

    def take(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(sample id, epoch) of the positions start, start + 1, ..., stop - 1."""
        return [self._at(position) for position in range(start, stop)]

    def _at(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.n)
        head = self._head(epoch)
        if place < head:
            return int(self._permutation(epoch)[place]), epoch
        number, inside = divmod(place - head, self.window)
        return int(self._window(epoch, number)[inside]), epoch

    def _head(self, epoch: int) -> int:
        """Samples at the start of an epoch that belong to a microbatch begun in the one before."""
        return min(self.n, -epoch * self.n % self.microbatch)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._permutations:
            _drop_oldest(self._permutations)
            self._permutations[epoch] = epoch_order(self.n, self.seed, epoch)
        return self._permutations[epoch]

    def _window(self, epoch: int, number: int) -> NDArray[np.int64]:
        key = (epoch, number)
        if key not in self._windows:
            _drop_oldest(self._windows)
            start = self._head(epoch) + number * self.window
            samples = self._permutation(epoch)[start : start + self.window]
            sizes = np.array([self.size_of(sample, epoch) for sample in samples.tolist()])
            words = philox(self.seed, RUNS, epoch, number)
            self._windows[key] = samples[planned_order(sizes, self.microbatch, words)]
        return self._windows[key]


def planned_order(sizes: NDArray[np.int64], microbatch: int, words: np.random.Philox) -> NDArray[np.int64]:
    """(k,) places of a window, like sizes in one run of `microbatch`, the runs shuffled; a shorter rest comes last."""
    count = len(sizes)
    order = np.lexsort((sizes[:, 1], sizes[:, 0]))
    strip = -(-count // (STRIPS * microbatch)) * microbatch
    pieces = [order[start : start + strip] for start in range(0, count, strip)]
    order = np.concatenate([piece[np.lexsort((sizes[piece, 0], sizes[piece, 1]))] for piece in pieces])
    full = count // microbatch
    runs = order[: full * microbatch].reshape(full, microbatch)
    shuffled = runs[np.argsort(words.random_raw(full), kind="stable")]
    return np.concatenate([shuffled.reshape(-1), order[full * microbatch :]])


def _drop_oldest(cache: dict) -> None:
    while len(cache) > 1:
        del cache[next(iter(cache))]
