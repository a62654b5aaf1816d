"""The contract: what a run learns depends on its configuration, not on how many workers did it (docs/determinism.md).

The whole detector, from shards to the weights file, on real process groups. The default suite has two topologies and a
dozen steps; the slow proof has all of them and fifty steps, and writes down what it measured.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from dino_scale.config.schema import BackboneConfig
from tests.support import trajectory
from tests.support.trajectory import (
    Topology,
    different_bits,
    largest_change,
    loss_difference,
    loss_differences,
    run_all,
)

STEPS, WHOLE = 12, 50
ALONE = Topology(workers=1, zero_stage=0)
EVERY = tuple(Topology(workers, stage) for workers, stage in product((1, 2, 4), range(4)))
LOSS_TOLERANCE = 1e-4  # relative, each step
WEIGHT_TOLERANCE = 1e-5  # L2 norm of the difference relative to that of the weights, all tensors together


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trajectory.pack_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def few(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Short runs: alone, with two workers, and with two workers again, read by loader processes."""
    folder = tmp_path_factory.mktemp("few")
    two = Topology(workers=2, zero_stage=2)
    runs = {}
    for name, topology, loader_workers in (("alone", ALONE, 0), ("two", two, 0), ("again", two, 2)):
        [runs[name]] = run_all(shards, folder / name, [topology], loader_workers, STEPS)
    return runs


def test_a_run_has_everything_that_could_depend_on_workers(few: dict[str, Path], shards: Path) -> None:
    run = few["alone"]
    assert min(trajectory.gradient_norms(run)) > trajectory.STAGE_CONFIG.optimizer.clip_norm, "clipping never acted"
    counts = trajectory.box_counts(shards)
    assert 0 in counts and max(counts) >= 3, "images with several boxes and with none"
    average, weights = trajectory.state(run, "ema"), trajectory.state(run, "fp32")
    assert different_bits(average, weights), "the average is no more than the weights"


def test_one_worker_and_two_follow_one_trajectory(few: dict[str, Path], shards: Path) -> None:
    alone, two = few["alone"], few["two"]
    assert trajectory.samples(alone) == trajectory.samples(two) == trajectory.expected_samples(shards, STEPS)
    assert loss_difference(two, alone) < LOSS_TOLERANCE
    assert largest_change(two, alone) < WEIGHT_TOLERANCE


def test_the_same_topology_repeats_bit_by_bit_whoever_reads_the_pictures(few: dict[str, Path]) -> None:
    two, again = few["two"], few["again"]
    assert trajectory.samples(two) == trajectory.samples(again)
    assert trajectory.losses(two) == trajectory.losses(again)
    for kind in ("fp32", "exp_avg", "exp_avg_sq", "ema"):
        assert different_bits(trajectory.state(two, kind), trajectory.state(again, kind)) == []
    assert different_bits(trajectory.weights(two), trajectory.weights(again)) == []


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Topology, list[Path]]:
    """Every topology twice, first without and then with loader processes, in processes of their own."""
    folder = tmp_path_factory.mktemp("whole")
    runs: dict[Topology, list[Path]] = {}
    for workers, loader_workers in product((1, 2, 4), (0, 2)):
        topologies = [topology for topology in EVERY if topology.workers == workers]
        out = folder / f"{workers}-{loader_workers}"
        for topology, run in zip(topologies, run_all(shards, out, topologies, loader_workers, WHOLE), strict=True):
            runs.setdefault(topology, []).append(run)
    return runs


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_topology_follows_one_trajectory(whole: dict[Topology, list[Path]], shards: Path) -> None:
    reference = whole[ALONE][0]
    expected = trajectory.expected_samples(shards, WHOLE)
    for topology, (run, again) in whole.items():
        losses, weights = loss_difference(run, reference), largest_change(run, reference)
        print(f"{topology.workers} x {8 // topology.workers}, ZeRO {topology.zero_stage}: {losses:.1e} {weights:.1e}")
        assert trajectory.samples(run) == trajectory.samples(again) == expected
        assert losses < LOSS_TOLERANCE, topology
        assert weights < WEIGHT_TOLERANCE, topology
        assert trajectory.losses(run) == trajectory.losses(again), topology
        assert different_bits(trajectory.weights(run), trajectory.weights(again)) == [], topology


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backbone", [trajectory.SWIN, trajectory.CONVNEXT], ids=["swin", "convnext"])
def test_other_backbones_see_the_same_and_repeat_bit_by_bit(
    backbone: BackboneConfig, shards: Path, tmp_path: Path
) -> None:
    """How far their losses drift apart between topologies is printed, not promised: docs/determinism.md."""
    model = replace(trajectory.MODEL, backbone=backbone)
    expected = trajectory.expected_samples(shards, WHOLE)
    runs = {}
    for name, topology, loader_workers in (
        ("alone", ALONE, 0),
        ("two", Topology(workers=2, zero_stage=2), 0),
        ("again", Topology(workers=2, zero_stage=2), 2),
    ):
        [runs[name]] = run_all(shards, tmp_path / name, [topology], loader_workers, WHOLE, model)
        assert trajectory.samples(runs[name]) == expected
    drift = loss_differences(runs["two"], runs["alone"])
    beyond = sum(difference > LOSS_TOLERANCE for difference in drift)
    weights = largest_change(runs["two"], runs["alone"])
    print(f"{backbone.name}: losses within {max(drift):.1e}, {beyond} steps beyond, weights within {weights:.1e}")
    assert drift[0] < LOSS_TOLERANCE, "before anything was learned nothing can have drifted"
    assert trajectory.losses(runs["two"]) == trajectory.losses(runs["again"])
    assert different_bits(trajectory.weights(runs["two"]), trajectory.weights(runs["again"])) == []
