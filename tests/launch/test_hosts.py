"""The command line on a cluster of hosts that are killed, cut off, drained, slowed down and given back.

Each host is a set of Linux namespaces, see tests/support/hosts.py. The seconds that a run took until its first new step
are recorded as properties of the tests (`--junitxml` writes them to a file).
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.support.hosts import Host, RayHosts, ray_hosts, why_not

NO_HOSTS = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))]

STEPS, FAULT_STEP, EVERY = 120, 12, 10
ENDLESS = "stages.only.schedule.steps=100000"
CHAIN = """
name: hosts
model: {{extends: {configs}/model/small.yaml, hidden: 32, heads: 2, feedforward: 32}}
launch: {{workers: {{min: 1, max: 2}}, address: "{address}", notice_file: {notice}}}
stages:
  only:
    extends: {configs}/stage/small_images.yaml
    data: {{train: {shards}}}
    batch: {{global_size: 4, microbatch: 2}}
    schedule: {{steps: {steps}}}
    checkpoint: {{every_steps: {every}}}
    log_every_steps: 1
    precision: fp32
"""
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHosts]:
    with ray_hosts(workers=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def chain(cluster: RayHosts, tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    path = tmp_path_factory.mktemp("hosts") / "chain.yaml"
    text = CHAIN.format(
        configs=Path(__file__).parents[2] / "configs",
        address=cluster.address,
        notice=f"{cluster.network.ray_folder}/notice",  # that folder is each host's own
        shards=tiny_data / "objects" / "train",
        steps=STEPS,
        every=EVERY,
    )
    path.write_text(text)
    return path


class Job:
    """`python -m launch` on the head, and what is known of its run."""

    def __init__(self, cluster: RayHosts, run: Path, *arguments: str) -> None:
        self.run, self._output = run, run.with_suffix(".out")
        command = [sys.executable, "-m", "launch", *arguments]
        with self._output.open("a") as file:
            self.process = cluster.head.popen(command, stdout=file, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self._output.read_text()

    def lines(self) -> list[dict]:
        """Of metrics.jsonl; the last one may still be half written."""
        path = self.run / "only" / "metrics.jsonl"
        texts = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(text) for text in texts]

    def wait_until(self, holds: Callable[[], object], what: str, seconds: float = 150.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, f"ended while waiting for {what}:\n{self.output[-3000:]}"
            assert time.monotonic() < deadline, f"no {what} in {seconds} s:\n{self.output[-3000:]}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: any(line["step"] >= step for line in self.lines()), f"step {step}")

    def seconds_to_new_step(self, fault: float, world: int) -> float:
        """From the moment `fault` to the first step that `world` workers did after it."""

        def new() -> list[float]:
            return [line["time"] for line in self.lines() if line["time"] > fault and line["world_size"] == world]

        self.wait_until(new, f"step by {world} worker(s)")
        return round(min(new()) - fault, 1)

    def python(self) -> psutil.Process:
        """The driver itself, below nsenter."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if "launch" in child.cmdline())

    def end(self, code: int) -> None:
        self.process.wait(200)
        assert self.process.returncode == code, self.output[-3000:]


def train(cluster: RayHosts, chain: Path, run: Path, *overrides: str) -> Job:
    sets = [part for override in overrides for part in ("--set", override)]
    return Job(cluster, run, "train", str(chain), "--run-dir", str(run), *sets)


def stop(job: Job) -> None:
    """By SIGTERM, as a batch system does it; the run must say that it can be resumed."""
    job.python().send_signal(signal.SIGTERM)
    job.end(4)
    assert f"dino-scale resume {job.run}" in job.output
    assert json.loads((job.run / "chain.json").read_text())["stages"]["only"]["state"] == "interrupted"


def give_back(cluster: RayHosts, host: Host) -> None:
    """A host after a restart."""
    host.reconnect()
    host.kill()
    host.restart()
    cluster.join(host)


def assert_each_step_once(job: Job) -> None:
    """The log holds every step of the trajectory once, each with as many samples as the batch says."""
    done = range(1, len(job.lines()) + 1)
    assert [(line["step"], line["samples_seen"]) for line in job.lines()] == [(step, 4 * step) for step in done]


@pytest.fixture(scope="module")
def undisturbed(cluster: RayHosts, chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = train(cluster, chain, tmp_path_factory.mktemp("undisturbed") / "run")
    job.end(0)
    assert_each_step_once(job)
    assert {line["world_size"] for line in job.lines()} == {2} and len(job.lines()) == STEPS
    return job


def assert_same_trajectory(job: Job, undisturbed: Job) -> None:
    """Up to the order in which numbers are added up, which training magnifies: early steps are judged strictly."""
    assert_each_step_once(job)
    pairs = [(line["loss"], other["loss"]) for line, other in zip(job.lines(), undisturbed.lines(), strict=False)]
    assert len(pairs) > FAULT_STEP + EVERY
    assert [one for one, _ in pairs[:50]] == pytest.approx([other for _, other in pairs[:50]], rel=1e-3)
    assert [one for one, _ in pairs] == pytest.approx([other for _, other in pairs], rel=0.05)


def test_a_host_is_killed_and_comes_back(
    cluster: RayHosts, chain: Path, undisturbed: Job, tmp_path: Path, record_property: Record
) -> None:
    job = train(cluster, chain, tmp_path / "run", ENDLESS)
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
    assert_same_trajectory(job, undisturbed)


def test_a_host_is_cut_off_the_job_is_stopped_and_everything_is_lost(
    cluster: RayHosts, chain: Path, undisturbed: Job, tmp_path: Path, record_property: Record
) -> None:
    job = train(cluster, chain, tmp_path / "run")
    job.wait_for_step(FAULT_STEP)
    fault = time.time()
    cluster.workers[1].cut_off()
    record_property("host cut off, seconds", job.seconds_to_new_step(fault, world=1))
    assert "cannot be reached" in job.output
    stop(job)
    give_back(cluster, cluster.workers[1])
    job = Job(cluster, job.run, "resume", str(job.run))
    fault = time.time()
    record_property("resume, seconds", job.seconds_to_new_step(fault, world=2))
    cluster.lose_everything()
    job.process.wait(60)
    fault = time.time()
    job = Job(cluster, job.run, "resume", str(job.run))
    record_property("resume after everything was lost, seconds", job.seconds_to_new_step(fault, world=2))
    job.end(0)
    assert len(job.lines()) == STEPS
    assert_same_trajectory(job, undisturbed)
    one, other = (flat_weights(each.run) for each in (job, undisturbed))
    distance = float((one - other).norm() / other.norm())
    record_property("relative distance of the final weights", distance)
    assert distance < 1e-2


def flat_weights(run: Path) -> torch.Tensor:
    tensors = load_file(run / "only" / "weights.safetensors")
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])


def test_a_killed_raylet_is_a_lost_host(
    cluster: RayHosts, chain: Path, tmp_path: Path, record_property: Record
) -> None:
    job = train(cluster, chain, tmp_path / "run", "launch.retries=1", ENDLESS)
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
    job = train(cluster, chain, tmp_path / "run", "launch.patience_minutes=5", ENDLESS)
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
    job = train(cluster, chain, tmp_path / "run", "launch.patience_minutes=0.2", ENDLESS)
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
    assert "has done no step for" in job.output
    stop(job)


def doze(process: psutil.Process) -> None:
    """A moment of a machine that is busy with something else most of the time."""
    process.suspend()
    time.sleep(0.3)
    process.resume()
    time.sleep(0.05)
