"""Runs of the command line on hosts of their own, and what is known of them: tests/support/hosts.py makes the hosts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.support.hosts import Host, RayHosts
from tests.support.sample_ids import assert_each_image_once_per_epoch

SEED, GLOBAL_SIZE = 0, 4
STEPS, FAULT_STEP, EVERY = 120, 12, 10
ENDLESS = "stages.only.schedule.steps=100000"
CHAIN = """
name: hosts
seed: {seed}
model: {{extends: {configs}/model/small.yaml, hidden: 32, heads: 2, feedforward: 32}}
launch: {{workers: {{min: 1, max: 2}}, address: "{address}", notice_file: {notice}}}
stages:
  only:
    extends: {configs}/stage/small_images.yaml
    data: {{train: {train}, validation: {validation}, log_samples: true}}
    batch: {{global_size: {global_size}, microbatch: 2}}
    schedule: {{steps: {steps}}}
    checkpoint: {{every_steps: {every}}}
    log_every_steps: 1
    precision: fp32
"""


def write_chain(path: Path, cluster: RayHosts, data: Path) -> Path:
    """data: folder with train and validation shards."""
    text = CHAIN.format(
        configs=Path(__file__).parents[2] / "configs",
        address=cluster.address,
        notice=f"{cluster.network.ray_folder}/notice",  # that folder is each host's own
        train=data / "train",
        validation=data / "validation",
        seed=SEED,
        global_size=GLOBAL_SIZE,
        steps=STEPS,
        every=EVERY,
    )
    path.write_text(text)
    return path


class Job:
    """`python -m launch` on a host, and what is known of its run."""

    def __init__(self, host: Host, run: Path, *arguments: str) -> None:
        self.run, self._output = run, run.with_suffix(".out")
        command = [sys.executable, "-m", "launch", *arguments]
        with self._output.open("a") as file:
            self.process = host.popen(command, stdout=file, stderr=subprocess.STDOUT)

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


def train(host: Host, chain: Path, run: Path, *overrides: str) -> Job:
    sets = [part for override in overrides for part in ("--set", override)]
    return Job(host, run, "train", str(chain), "--run-dir", str(run), *sets)


def stop(job: Job) -> None:
    """By SIGTERM, as a batch system does it; the run must say that it can be resumed."""
    job.python().send_signal(signal.SIGTERM)
    job.end(4)
    assert f"dino-scale resume {job.run}" in job.output
    assert json.loads((job.run / "chain.json").read_text())["stages"]["only"]["state"] == "interrupted"


def assert_each_step_once(job: Job, data: Path) -> None:
    """The log holds every step once, and every step trained on the images that the order gives it."""
    done = range(1, len(job.lines()) + 1)
    found = [(line["step"], line["samples_seen"]) for line in job.lines()]
    assert found == [(step, GLOBAL_SIZE * step) for step in done]
    assert_each_image_once_per_epoch(job.run / "only", data / "train", SEED, GLOBAL_SIZE, len(done))
