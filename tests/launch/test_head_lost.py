"""The head of the cluster is lost while the driver lives: the run ends in good order, and a new cluster resumes it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.host_runs import ENDLESS, FAULT_STEP, STEPS, Job, assert_each_step_once, train, write_chain
from tests.support.hosts import RayHosts, ray_hosts, why_not

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
    return write_chain(tmp_path_factory.mktemp("head") / "chain.yaml", cluster, data)


def test_the_host_of_the_head_is_killed(
    cluster: RayHosts, chain: Path, data: Path, tmp_path: Path, record_property: Record
) -> None:
    """The driver is on another host, beside a worker."""
    job = train(cluster.workers[0], chain, tmp_path / "run", ENDLESS)
    job.wait_for_step(FAULT_STEP)
    fault = time.time()
    cluster.head.kill()
    _ends_with_one_line(job, cluster)
    record_property("head killed, seconds until the run had ended", round(time.time() - fault, 1))
    cluster.lose_everything()
    _finishes(job, cluster, data)


def test_the_head_process_is_killed(
    cluster: RayHosts, chain: Path, data: Path, tmp_path: Path, record_property: Record
) -> None:
    """The driver is on the same host, and the rest of Ray goes on there for a minute."""
    job = train(cluster.head, chain, tmp_path / "run", ENDLESS)
    job.wait_for_step(FAULT_STEP)
    fault = time.time()
    (server,) = [process for process in cluster.head.processes("gcs_server") if process.name() == "gcs_server"]
    server.kill()
    _ends_with_one_line(job, cluster)
    record_property("head process killed, seconds until the run had ended", round(time.time() - fault, 1))
    cluster.lose_everything()
    _finishes(job, cluster, data)


def _ends_with_one_line(job: Job, cluster: RayHosts) -> None:
    """Exit code 4, the workers' last step saved, no traceback, no process of ours left on any host."""
    job.end(4)
    saved = job.lines()[-1]["step"]
    last = job.output.rstrip().splitlines()[-1]
    assert last == (
        f"dino-scale: stage only: the head of the Ray cluster at {cluster.address} cannot be reached: the newest "
        f"checkpoint is that of step {saved}; start the cluster again; continue with: dino-scale resume {job.run}"
    )
    assert "Traceback" not in job.output
    assert json.loads((job.run / "chain.json").read_text())["stages"]["only"]["state"] == "interrupted"
    deadline = time.monotonic() + 60
    while left := [process for host in cluster.workers for process in host.processes("WorkerProcess")]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def _finishes(job: Job, cluster: RayHosts, data: Path) -> None:
    steps = max(STEPS, job.lines()[-1]["step"] + 1)
    again = Job(cluster.head, job.run, "resume", str(job.run), "--set", f"stages.only.schedule.steps={steps}")
    again.end(0)
    assert len(again.lines()) == steps
    assert_each_step_once(again, data)
