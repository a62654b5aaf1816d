"""The command line on a cluster of hosts that are killed, cut off, drained, slowed down and given back.

Each host is a set of Linux namespaces, see tests/support/hosts.py. The seconds that a run took until its first new step
are recorded as properties of the tests (`--junitxml` writes them to a file).
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.support.host_runs import (
    ENDLESS,
    EVERY,
    FAULT_STEP,
    STEPS,
    Job,
    assert_each_step_once,
    stop,
    train,
    write_chain,
)
from tests.support.hosts import Host, RayHosts, ray_hosts, why_not

NO_HOSTS = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))]

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHosts]:
    with ray_hosts(workers=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def data(tiny_data: Path) -> Path:
    return tiny_data / "objects"


@pytest.fixture(scope="module")
def chain(cluster: RayHosts, tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_chain(tmp_path_factory.mktemp("hosts") / "chain.yaml", cluster, data)


def give_back(cluster: RayHosts, host: Host) -> None:
    """A host after a restart."""
    host.reconnect()
    host.kill()
    host.restart()
    cluster.join(host)


@pytest.fixture(scope="module")
def undisturbed(cluster: RayHosts, chain: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = train(cluster.head, chain, tmp_path_factory.mktemp("undisturbed") / "run")
    job.end(0)
    assert_each_step_once(job, data)
    assert {line["world_size"] for line in job.lines()} == {2} and len(job.lines()) == STEPS
    return job


def assert_same_trajectory(job: Job, undisturbed: Job, data: Path) -> None:
    """Up to the order in which numbers are added up, which training magnifies: early steps are judged strictly."""
    assert_each_step_once(job, data)
    pairs = [(line["loss"], other["loss"]) for line, other in zip(job.lines(), undisturbed.lines(), strict=False)]
    assert len(pairs) > FAULT_STEP + EVERY
    assert [one for one, _ in pairs[:50]] == pytest.approx([other for _, other in pairs[:50]], rel=1e-3)
    assert [one for one, _ in pairs] == pytest.approx([other for _, other in pairs], rel=0.05)


def test_a_host_is_killed_and_comes_back(
    cluster: RayHosts, chain: Path, data: Path, undisturbed: Job, tmp_path: Path, record_property: Record
) -> None:
    job = train(cluster.head, chain, tmp_path / "run", ENDLESS)
    job.wait_for_step(FAULT_STEP)
    fault = time.time()
    cluster.workers[0].kill()
    record_property("host killed, seconds", job.seconds_to_new_step(fault, world=1))
    cluster.workers[0].restart()
    back = time.time()
    cluster.join(cluster.workers[0])
    joined = time.time()
    record_property("of the following, seconds of ray start", round(joined - back, 1))
    record_property("host comes back, seconds from ray start", job.seconds_to_new_step(back, world=2))
    stop(job)
    worlds = [line["world_size"] for line in job.lines()]
    assert [world for world, _ in itertools.groupby(worlds)] == [2, 1, 2]
    assert worlds.index(1) % EVERY == 0, "it did not continue from a checkpoint"
    assert_same_trajectory(job, undisturbed, data)


def test_a_host_is_cut_off_the_job_is_stopped_and_everything_is_lost(
    cluster: RayHosts, chain: Path, data: Path, undisturbed: Job, tmp_path: Path, record_property: Record
) -> None:
    job = train(cluster.head, chain, tmp_path / "run")
    job.wait_for_step(FAULT_STEP)
    fault = time.time()
    cluster.workers[1].cut_off()
    record_property("host cut off, seconds", job.seconds_to_new_step(fault, world=1))
    assert "cannot be reached" in job.output
    stop(job)
    give_back(cluster, cluster.workers[1])
    job = Job(cluster.head, job.run, "resume", str(job.run))
    fault = time.time()
    record_property("resume, seconds", job.seconds_to_new_step(fault, world=2))
    cluster.lose_everything()
    job.process.wait(60)
    fault = time.time()
    job = Job(cluster.head, job.run, "resume", str(job.run))
    record_property("resume after everything was lost, seconds", job.seconds_to_new_step(fault, world=2))
    job.end(0)
    assert len(job.lines()) == STEPS
    assert_same_trajectory(job, undisturbed, data)
    assert_same_result(job, undisturbed)
    one, other = (flat_weights(each.run) for each in (job, undisturbed))
    distance = float((one - other).norm() / other.norm())
    record_property("relative distance of the final weights", distance)
    assert distance < 1e-2


def assert_same_result(job: Job, undisturbed: Job) -> None:
    """Final COCO numbers, loss of the last epoch, and how sure both detectors are of what they find."""
    one, other = (evaluation(each) for each in (job, undisturbed))
    assert one["metrics"] == pytest.approx(other["metrics"], abs=0.02)
    first, second = (statistics.mean(line["loss"] for line in each.lines()[-4:]) for each in (job, undisturbed))
    assert first == pytest.approx(second, rel=0.02)
    first, second = (sorted(found["score"] for found in each["detections"]) for each in (one, other))
    assert len(first) > 100 and first[-1] > 0 and first == pytest.approx(second, rel=0.05)


def evaluation(job: Job) -> dict:
    stem = job.run / "only" / "evaluation" / f"step_{STEPS:08d}"
    metrics = json.loads(stem.with_suffix(".json").read_text())["metrics"]
    return {"metrics": metrics, "detections": json.loads(Path(f"{stem}_detections.json").read_text())}


def flat_weights(run: Path) -> torch.Tensor:
    tensors = load_file(run / "only" / "weights.safetensors")
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])


def test_a_killed_raylet_is_a_lost_host(
    cluster: RayHosts, chain: Path, tmp_path: Path, record_property: Record
) -> None:
    job = train(cluster.head, chain, tmp_path / "run", "launch.retries=1", ENDLESS)
    job.wait_for_step(FAULT_STEP)
    fault = time.time()
    (raylet,) = [process for process in cluster.workers[0].processes("raylet") if process.name() == "raylet"]
    raylet.kill()
    record_property("raylet killed, seconds", job.seconds_to_new_step(fault, world=1))
    stop(job)
    give_back(cluster, cluster.workers[0])


def test_a_host_is_drained_then_another_gives_notice(
    cluster: RayHosts, chain: Path, tmp_path: Path, record_property: Record
) -> None:
    job = train(cluster.head, chain, tmp_path / "run", "launch.patience_minutes=5", ENDLESS)
    job.wait_for_step(FAULT_STEP)
    fault = time.time()
    drain(cluster, cluster.workers[1])
    record_property("host drained, seconds", job.seconds_to_new_step(fault, world=1))
    assert "is about to be taken away" in job.output and "starting again" not in job.output
    assert [line["step"] for line in job.lines()] == list(range(1, len(job.lines()) + 1))
    give_back(cluster, cluster.workers[1])
    job.seconds_to_new_step(time.time(), world=2)
    fault = time.time()
    cluster.workers[0].run("touch", f"{cluster.network.ray_folder}/notice")
    record_property("notice file, seconds", job.seconds_to_new_step(fault, world=1))
    assert "starting again" not in job.output
    stop(job)
    give_back(cluster, cluster.workers[0])


def drain(cluster: RayHosts, host: Host) -> None:
    """As a cloud's preemption notice makes an autoscaler do it."""
    code = (
        "import ray; ray.init('auto', logging_level='CRITICAL', log_to_driver=False);"
        f"print([n['NodeID'] for n in ray.nodes() if n['Alive'] and n['NodeManagerAddress'] == '{host.address}'][0])"
    )
    node = cluster.head.run(sys.executable, "-c", code).split()[-1]
    ray = str(Path(sys.executable).with_name("ray"))
    reason = (
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "notice",
        "--deadline-remaining-seconds=60",
    )
    cluster.head.run(ray, "drain-node", f"--address={cluster.address}", f"--node-id={node}", *reason)


def test_a_slow_worker_is_named_and_a_hung_one_replaced(
    cluster: RayHosts, chain: Path, tmp_path: Path, record_property: Record
) -> None:
    job = train(cluster.head, chain, tmp_path / "run", "launch.patience_minutes=0.2", ENDLESS)
    job.wait_for_step(FAULT_STEP)
    host = cluster.workers[1]
    (worker,) = host.processes("ray::WorkerProcess")
    slow = f"worker 1 on {host.address} is slow"
    fault = time.time()
    job.wait_until(lambda: slow in job.output or doze(worker), "line about the slow worker")
    record_property("slow worker named, seconds", round(time.time() - fault, 1))
    fault = time.time()
    worker.suspend()
    record_property("hung worker, patience 12 s, seconds", job.seconds_to_new_step(fault + 5, world=2) + 5)
    assert f"worker 1 on {host.address} has done no step for" in job.output
    stop(job)


def doze(process: psutil.Process) -> None:
    """A moment of a machine that is busy with something else most of the time."""
    process.suspend()
    time.sleep(0.3)
    process.resume()
    time.sleep(0.02)  # less than a step, so that each has its share
