"""`ray job submit`, really run: the extra `cluster` is needed, and the slow one is skipped without it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.commands.demo import CHAIN
from tests.support.processes import free_port
from tests.support.slurm import ROOT

NEEDED = ("aiohttp_cors", "grpc", "opencensus", "virtualenv")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Of a Ray head on loopback with a dashboard on loopback, which ends with the test."""
    ray = Path(sys.executable).parent / "ray"
    with tempfile.TemporaryDirectory(prefix="ds-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        port, dashboard = free_port(), free_port()
        environment = os.environ | {
            "PATH": f"{ray.parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "OMP_NUM_THREADS": "1",
        }
        head = [str(ray), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=3"]
        head += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
        head += ["--object-store-memory=83886080"]
        started = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
        process = subprocess.Popen(head, env=started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield environment
        finally:
            process.terminate()
            process.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"the extra `cluster` is not installed: {', '.join(MISSING)} missing")
def test_a_submitted_job_trains(environment: dict[str, str], tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [
        f"stages.{name}.data.{key}={tiny_data / 'scenes' / key}"
        for name in ("pretrain", "finetune", "scratch")
        for key in ("train", "validation")
    ]
    settings += [f"stages.{name}.schedule={{steps: 2}}" for name in ("pretrain", "finetune", "scratch")]
    settings += ["launch.address=auto", "launch.workers=1"]
    work = tmp_path / "work"
    work.mkdir()
    for package in ("kernels", "dino_scale", "data_pipeline", "launch", "configs"):
        shutil.copytree(ROOT / package, work / package, ignore=shutil.ignore_patterns("__pycache__"))
    chain = CHAIN.relative_to(ROOT)
    options = [part for setting in settings for part in ("--set", setting)]
    command = ["ray", "job", "submit", "--working-dir", str(work), "--", sys.executable, "-m", "launch", "train"]
    command += [str(chain), "--run-dir", str(run), *options]
    refused = environment | {"RAY_AUTH_TOKEN": "0" * 64}
    wait_for_dashboard(environment)
    assert subprocess.run(["ray", "job", "list"], env=refused, capture_output=True, timeout=120).returncode != 0
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=450)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    stages = json.loads((run / "chain.json").read_text())["stages"]
    assert all(stage["state"] == "done" for stage in stages.values())


def wait_for_dashboard(environment: dict[str, str]) -> None:
    for _ in range(60):
        listed = subprocess.run(["ray", "job", "list"], env=environment, capture_output=True, timeout=120)
        if listed.returncode == 0:
            return
    raise AssertionError(listed.stderr.decode()[-2000:])
