import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import BLOCK, WINDOW, Draws, SampleStream, epoch_order

modes = st.sampled_from(["permutation", "windowed"])


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 9000), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40), mode=modes)
def test_every_sample_once_per_epoch(n, seed, epoch, mode) -> None:
    order = epoch_order(n, seed, epoch, mode)
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(order, epoch_order(n, seed, epoch, mode))


@pytest.mark.parametrize("mode", ["permutation", "windowed"])
def test_epochs_and_seeds_differ(mode) -> None:
    orders = [epoch_order(1000, seed, epoch, mode) for seed in (0, 1, 2**64) for epoch in range(3)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).mean() < 0.02


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    assert epoch_order(10, 0, 0).tolist() == [8, 7, 4, 2, 6, 5, 9, 0, 1, 3]
    assert epoch_order(10, 2**65 + 1, 7).tolist() == [0, 4, 2, 1, 6, 7, 8, 9, 5, 3]
    assert Draws(1, 2, 3).integer(0, 10**9) == 411695842


def test_windows_keep_neighbours_together() -> None:
    n = 4 * BLOCK * WINDOW
    order = epoch_order(n, 5, 1, "windowed")
    for window in order.reshape(4, -1):
        assert len(np.unique(window // BLOCK)) == WINDOW
    permuted = epoch_order(n, 5, 1)
    assert len(np.unique(permuted[: BLOCK * WINDOW] // BLOCK)) > 2 * WINDOW


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 50), cuts=st.lists(st.integers(0, 200), max_size=5), mode=modes)
def test_a_stream_cut_anywhere_is_the_same_stream(n, cuts, mode) -> None:
    whole = SampleStream(n, 9, mode).take(0, 200)
    assert [epoch for _, epoch in whole] == [place // n for place in range(200)]
    assert [sample for sample, epoch in whole if epoch == 2][:n] == epoch_order(n, 9, 2, mode).tolist()[
        : max(0, 200 - 2 * n)
    ]
    places = [0, *sorted(cuts), 200]
    parts = [SampleStream(n, 9, mode).take(a, b) for a, b in itertools.pairwise(places)]
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
