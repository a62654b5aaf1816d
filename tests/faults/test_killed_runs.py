"""A run that was killed and resumed is the run that was not: the same pictures, the same weights.

Real processes under Ray, SIGKILL, and `dino-scale resume` by hand; the undisturbed run trains in processes without Ray.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

from dino_scale.config.dump import dump_chain
from dino_scale.config.schema import CheckpointConfig, LaunchConfig
from tests.support import trajectory
from tests.support.killing import Kill, Victim, command, finish, run_until_killed, settings_of
from tests.support.trajectory import Topology, different_bits, largest_change, loss_difference

KINDS = ("fp32", "exp_avg", "exp_avg_sq", "ema")
TWO = Topology(workers=2, zero_stage=2)
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-5  # as in tests/distributed/test_trajectory.py


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trajectory.pack_pictures(tmp_path_factory.mktemp("pictures"))


def write_chain(shards: Path, folder: Path, steps: int) -> Path:
    """A chain that Ray runs and that a lost worker ends, saving every third step."""
    config = trajectory.chain(shards, 0, 0, steps, checkpoint=CheckpointConfig(every_steps=3, keep_last=2))
    explicit = {"retries": 0} if "retries" in {one.name for one in fields(LaunchConfig)} else {}
    path = folder / "chain.yaml"
    path.write_text(dump_chain(replace(config, launch=LaunchConfig(engine="ray", workers=1, **explicit))))
    return path


def run_through(chain: Path, run: Path, kills: list[Kill], topologies: list[Topology]) -> None:
    """Attempt i runs on topology i and ends with kill i; the last one ends by itself."""
    for attempt, (kill, topology) in enumerate(zip([*kills, None], topologies, strict=True)):
        verb, target = ("train", chain) if attempt == 0 else ("resume", run)
        arguments = command(verb, target, settings_of(topology))
        arguments += ["--run-dir", str(run)] if verb == "train" else []
        if kill is None:
            finish(arguments)
        else:
            run_until_killed(arguments, run, kill)


def undisturbed(shards: Path, folder: Path, topology: Topology, steps: int) -> Path:
    [run] = trajectory.run_all(shards, folder, [topology], 0, steps)
    return run


def test_a_run_whose_workers_were_killed_ends_with_the_same_bits(shards: Path, tmp_path: Path) -> None:
    """All at once here; a killed driver is in tests/launch/test_end_to_end.py, every kind in the slow proof below."""
    steps = 8
    run, reference = tmp_path / "run", undisturbed(shards, tmp_path / "undisturbed", TWO, steps)
    run_through(write_chain(shards, tmp_path, steps), run, [Kill(4, "all workers")], [TWO] * 2)
    assert trajectory.samples(run) == trajectory.expected_samples(shards, steps)
    assert trajectory.losses(run) == trajectory.losses(reference)
    for kind in KINDS:
        assert different_bits(trajectory.state(run, kind), trajectory.state(reference, kind)) == [], kind
    assert different_bits(trajectory.weights(run), trajectory.weights(reference)) == []


WHOLE = 24
VICTIMS: tuple[Victim, ...] = ("one worker", "all workers", "the driver", "one worker", "all workers")
ELSEWHERE = tuple(Topology(workers, stage) for workers in (1, 2, 4) for stage in range(4))


def kills_at_random(draw: random.Random) -> list[Kill]:
    """Each of the victims once, in any order, at any steps but the last ones, which may pass before the signal."""
    steps = sorted(draw.sample(range(1, WHOLE - 4), len(VICTIMS)))
    return [Kill(step, victim) for step, victim in zip(steps, draw.sample(VICTIMS, len(VICTIMS)), strict=True)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("everywhere", [False, True], ids=["one-topology", "another-topology-each-time"])
def test_kills_at_random_change_nothing(shards: Path, tmp_path: Path, everywhere: bool) -> None:
    seed = int(os.environ.get("DINO_SCALE_TEST_SEED", time.time_ns() % 10**6))
    draw = random.Random(seed)
    kills = kills_at_random(draw)
    topologies = draw.sample(ELSEWHERE, len(kills) + 1) if everywhere else [TWO] * (len(kills) + 1)
    print(f"DINO_SCALE_TEST_SEED={seed}: {kills} on {topologies}")
    run, reference = tmp_path / "run", undisturbed(shards, tmp_path / "undisturbed", TWO, WHOLE)
    run_through(write_chain(shards, tmp_path, WHOLE), run, kills, topologies)
    assert trajectory.samples(run) == trajectory.expected_samples(shards, WHOLE)
    print(f"losses {loss_difference(run, reference):.1e}, weights {largest_change(run, reference):.1e}")
    if everywhere:
        assert loss_difference(run, reference) < LOSS_TOLERANCE
        assert largest_change(run, reference) < WEIGHT_TOLERANCE
    else:
        assert trajectory.losses(run) == trajectory.losses(reference)
        for kind in KINDS:
            assert different_bits(trajectory.state(run, kind), trajectory.state(reference, kind)) == [], kind
