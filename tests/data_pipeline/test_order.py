import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import WINDOW, Draws, SampleStream, WindowedStream, epoch_order, windowed_order

sizes = st.integers(1, 9000)
shard_lists = st.lists(st.integers(1, 40), min_size=1, max_size=30)  # samples in each shard


def shards_of(samples: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(samples), dtype=np.int32), samples)


TEN = shards_of([100] * 10)


@settings(max_examples=80, deadline=None)
@given(n=sizes, samples=shard_lists, seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40))
def test_every_sample_once_per_epoch(n, samples, seed, epoch) -> None:
    order = epoch_order(n, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(order, epoch_order(n, seed, epoch))
    windowed = windowed_order(shards_of(samples), seed, epoch)
    assert np.array_equal(np.sort(windowed), np.arange(sum(samples)))
    assert np.array_equal(windowed, windowed_order(shards_of(samples), seed, epoch))


@pytest.mark.parametrize("make", [lambda s, e: epoch_order(1000, s, e), lambda s, e: windowed_order(TEN, s, e)])
def test_epochs_and_seeds_differ(make) -> None:
    orders = [make(seed, epoch) for seed in (0, 1, 2**64) for epoch in range(3)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).mean() < 0.02


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    assert epoch_order(10, 0, 0).tolist() == [8, 7, 4, 2, 6, 5, 9, 0, 1, 3]
    assert epoch_order(10, 2**65 + 1, 7).tolist() == [0, 4, 2, 1, 6, 7, 8, 9, 5, 3]
    assert windowed_order(shards_of([2] * 5), 3, 1).tolist() == [4, 3, 5, 1, 7, 6, 2, 0, 8, 9]
    assert Draws(1, 2, 3).integer(0, 10**9) == 411695842


@settings(max_examples=60, deadline=None)
@given(samples=shard_lists, epoch=st.integers(0, 99))
def test_each_shard_is_needed_for_one_window_only(samples, epoch) -> None:
    """So a cache that holds the shards of two windows copies each shard once per epoch."""
    shards = shards_of(samples)
    visited = shards[windowed_order(shards, 5, epoch)]
    first = [int(np.flatnonzero(visited == shard)[0]) for shard in range(len(samples))]
    last = [int(np.flatnonzero(visited == shard)[-1]) for shard in range(len(samples))]
    for place in range(len(visited)):
        assert sum(a <= place <= b for a, b in zip(first, last, strict=True)) <= WINDOW


def test_windows_mix_other_shards_in_every_epoch() -> None:
    orders = [TEN[windowed_order(TEN, 5, epoch)] for epoch in range(2)]
    together = [frozenset(np.unique(order[: 100 * WINDOW]).tolist()) for order in orders]
    assert all(len(shards) == WINDOW for shards in together) and together[0] != together[1]
    window = orders[0][: 100 * WINDOW]
    assert (window[1:] != window[:-1]).mean() > 0.6, "samples of a window are mixed"


@settings(max_examples=50, deadline=None)
@given(samples=st.lists(st.integers(1, 9), min_size=1, max_size=8), cuts=st.lists(st.integers(0, 200), max_size=5))
def test_a_stream_cut_anywhere_is_the_same_stream(samples, cuts) -> None:
    n, shards = sum(samples), shards_of(samples)
    for make, order in (
        (lambda: SampleStream(n, 9), epoch_order(n, 9, 2)),
        (lambda: WindowedStream(n, 9, lambda: shards), windowed_order(shards, 9, 2)),
    ):
        whole = make().take(0, 200)
        assert [epoch for _, epoch in whole] == [place // n for place in range(200)]
        assert [sample for sample, epoch in whole if epoch == 2] == order.tolist()[: max(0, 200 - 2 * n)]
        places = [0, *sorted(cuts), 200]
        parts = [make().take(a, b) for a, b in itertools.pairwise(places)]
        assert list(itertools.chain(*parts)) == whole


def test_draws_depend_on_seed_epoch_and_sample_alone() -> None:
    first = [Draws(1, 2, 3).uniform() for _ in range(2)]
    assert first[0] == first[1]
    others = {Draws(s, e, i).uniform() for s in range(4) for e in range(4) for i in range(4)}
    assert len(others) == 64


def test_draws_are_even_and_stay_in_range() -> None:
    draws = Draws(0, 0, 0)
    counts = np.bincount([draws.integer(3, 7) for _ in range(5000)], minlength=9)
    assert counts[:3].sum() == counts[8] == 0
    assert (np.abs(counts[3:8] - 1000) < 150).all()
    uniform = np.array([draws.uniform() for _ in range(5000)])
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02
    assert {draws.choice([4, 9]) for _ in range(50)} == {4, 9}
    assert {draws.offset(2) for _ in range(100)} == {0, 1, 2}


def test_senseless_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="stream of 0 samples"):
        SampleStream(0, 0)
    with pytest.raises(ValueError, match="seed is -1"):
        epoch_order(5, -1, 0)
