"""The order that plans sizes: exact, reproducible, and almost without padding."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.index import Index
from data_pipeline.loader import sample_stream
from data_pipeline.order import Draws, SampleStream, Stream
from data_pipeline.size_order import SizePlannedStream
from data_pipeline.transforms import sample_plan
from dino_scale.config.schema import AugmentationConfig, BatchConfig

OFFICIAL = AugmentationConfig()
# Width and height of photographs as both sets have them: mostly 640 on the long side, some odd.
COMMON = ((640, 480), (480, 640), (640, 427), (427, 640), (640, 425), (640, 360), (500, 375), (612, 612), (1024, 768))


def photograph(sample: int) -> tuple[int, int]:
    draws = Draws(77, 0, sample)
    if draws.uniform() < 0.7:
        return COMMON[draws.integer(0, len(COMMON) - 1)]
    return draws.integer(300, 640), draws.integer(300, 640)


def planned(sample: int, epoch: int) -> tuple[int, int]:
    width, height = photograph(sample)
    return sample_plan(width, height, OFFICIAL, Draws(1, epoch, sample)).size


def simple(sample: int, epoch: int) -> tuple[int, int]:
    return 10 + sample * 7 % 13, 10 + (sample + epoch) * 5 % 17


def padding(stream: Stream, microbatch: int, samples: int) -> float:
    """Padded over real pixels, less 1."""
    sizes = np.array([planned(*pair) for pair in stream.take(0, samples)]).reshape(-1, microbatch, 2)
    return float((sizes.max(axis=1).prod(axis=1) * microbatch).sum() / sizes.prod(axis=2).sum() - 1)


def test_padding_is_at_most_five_percent_at_microbatch_four() -> None:
    assert padding(SizePlannedStream(4096, 3, 4, planned), 4, 4096) < 0.05
    assert padding(SampleStream(4096, 3), 4, 4096) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("microbatch", "most"), [(1, 0.0), (2, 0.01), (4, 0.05), (8, 0.05)])
def test_padding_over_three_epochs(microbatch: int, most: float) -> None:
    assert padding(SizePlannedStream(5003, 9, microbatch, planned), microbatch, 15008) <= most


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(0, 2**64), microbatch=st.integers(1, 9), epochs=st.integers(1, 4))
def test_every_sample_once_per_epoch(n: int, seed: int, microbatch: int, epochs: int) -> None:
    taken = SizePlannedStream(n, seed, microbatch, simple).take(0, n * epochs)
    for epoch in range(epochs):
        part = taken[n * epoch : n * (epoch + 1)]
        assert sorted(part) == [(sample, epoch) for sample in range(n)]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 120),
    microbatch=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 300), max_size=5),
    seed=st.integers(0, 9),
)
def test_a_stream_cut_anywhere_is_the_same_stream(n: int, microbatch: int, cuts: list[int], seed: int) -> None:
    whole = SizePlannedStream(n, seed, microbatch, simple).take(0, 300)
    places = [0, *sorted(cuts), 300]
    parts = [SizePlannedStream(n, seed, microbatch, simple).take(a, b) for a, b in itertools.pairwise(places)]
    assert list(itertools.chain(*parts)) == whole


def test_windows_are_many_and_the_runs_lie_on_the_microbatches_of_the_stream() -> None:
    """Also where an epoch does not end with a microbatch: only the ones over an epoch's end and a window's rest mix."""
    stream = SizePlannedStream(4999, 4, 4, planned)
    pairs = stream.take(0, 10_000)
    areas = []
    for start in range(0, 10_000, 4):
        sizes = np.array([planned(*pair) for pair in pairs[start : start + 4]])
        areas.append(sizes.max(axis=0).prod() * 4 / sizes.prod(axis=1).sum())
    assert np.mean(np.array(areas) > 1.3) < 0.03


def test_sizes_of_steps_stay_mixed() -> None:
    """Runs are shuffled: neighbouring microbatches are not of neighbouring sizes."""
    pairs = SizePlannedStream(4096, 3, 4, planned).take(0, 4096)
    heights = np.array([planned(*pair)[0] for pair in pairs]).reshape(-1, 4).mean(axis=1)
    assert abs(np.corrcoef(heights[:-1], heights[1:])[0, 1]) < 0.15


def test_the_stream_of_an_index_travels_between_processes(scenes: Index) -> None:
    augmentation = AugmentationConfig(scales=(64, 80, 96), max_size=128, crop_resize=(72, 88), crop_min=48, crop_max=72)
    stream = sample_stream(scenes, 5, augmentation, BatchConfig(16, 4), "size_planned")
    assert pickle.loads(pickle.dumps(stream)).take(0, 200) == stream.take(0, 200)
