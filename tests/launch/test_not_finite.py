"""Gradients that are not finite: the step is left out and counted, also across a resume, and too many end the run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 2
CHAIN = """
name: broken
model: {{extends: {configs}/model/small.yaml, hidden: 32, heads: 2, feedforward: 32}}
launch: {{engine: local}}
stages:
  only:
    extends: {configs}/stage/small_images.yaml
    data: {{train: {shards}, loader_workers: 0}}
    batch: {{global_size: 2, microbatch: 2}}
    optimizer: {{learning_rate: 1e30, backbone_learning_rate: 1e30}}
    schedule: {{steps: 9, warmup_steps: 0}}
    checkpoint: {{every_steps: 1, keep_last: 9}}
    precision: fp32
    non_finite_limit: {limit}
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def skipped(path: Path) -> int:
    """What the newest checkpoint says."""
    newest = max((path / "only" / "checkpoints").glob("step_*"))
    return json.loads((newest / "manifest.json").read_text())["skipped_steps"]


@pytest.fixture(scope="module")
def chain(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learning rate that makes weights of 1e30 in one step: from the second on nothing is finite."""
    path = tmp_path_factory.mktemp("broken") / "chain.yaml"
    configs = Path(__file__).parents[2] / "configs"
    path.write_text(CHAIN.format(configs=configs, shards=tiny_data / "objects" / "train", limit=LIMIT))
    return path


def test_steps_are_left_out_counted_and_limited(chain: Path) -> None:
    path = chain.parent / "run"
    done = run("train", chain, "--run-dir", path)
    assert done.returncode == 2, done.stdout + done.stderr
    for count in range(1, LIMIT + 2):
        assert f"gradient not finite, step left out ({count} so far)" in done.stdout
    expected = f"{LIMIT + 1} steps had a gradient that is not finite, non_finite_limit is {LIMIT}: lower the"
    assert expected in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert 1 <= skipped(path) <= LIMIT
    before = skipped(path)
    done = run("resume", path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"step left out ({before + 1} so far)" in done.stdout and "(1 so far)" not in done.stdout
