"""Saving as a user meets it: by time, on a signal, the best apart; a resumed run ends with the very same checkpoint.

One small chain in one process, run undisturbed and then stopped, looked at and resumed.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dino_scale.checkpoint.manifest import Manifest, verify
from launch.run_folder import RunFolder

STEPS = 20
CHAIN = """
name: saving
model:
  extends: {configs}/model/small.yaml
  hidden: 32
  heads: 2
  feedforward: 32
  queries: 40
launch: {{engine: local}}
stages:
  train:
    extends: {configs}/stage/small_images.yaml
    data: {{train: {shards}/train, validation: {shards}/validation, loader_workers: 0}}
    batch: {{global_size: 2, microbatch: 2}}
    optimizer: {{learning_rate: 1e-3, backbone_learning_rate: 1e-3}}
    schedule: {{steps: 20, warmup_steps: 3, drop_at: [0.75]}}
    checkpoint: {{every_steps: 0, keep_last: 2, keep_best: true}}
    evaluation: {{every_steps: 5}}
    precision: fp32
    ema_decay: 0.9
    log_every_steps: 1
"""


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "launch", *map(str, arguments)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def chain(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saving") / "chain.yaml"
    path.write_text(CHAIN.format(configs=Path(__file__).parents[2] / "configs", shards=tiny_data / "objects"))
    return path


@pytest.fixture(scope="module")
def undisturbed(chain: Path) -> Path:
    """A run that saves by time, so often that every step is due."""
    path = chain.parent / "undisturbed"
    done = run("train", chain, "--run-dir", path, "--set", "stages.train.checkpoint.every_minutes=1e-9")
    assert done.returncode == 0, done.stdout + done.stderr
    return path / "train"


def lines(stage: Path) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def newest(stage: Path) -> Manifest:
    return verify(sorted((stage / "checkpoints").glob("step_*"))[-1])


def evaluations(stage: Path) -> dict[int, float]:
    """Step -> AP."""
    found = sorted(path for path in (stage / "evaluation").glob("step_*.json") if "detections" not in path.name)
    return {int(path.stem[5:]): json.loads(path.read_text())["metrics"]["AP"] for path in found}


def test_saving_by_time(undisturbed: Path) -> None:
    """No other rule is on, so the one before the last is there by the clock."""
    kept = sorted(path.name for path in (undisturbed / "checkpoints").glob("step_*"))
    assert kept == [f"step_{STEPS - 1:08d}", f"step_{STEPS:08d}"]


def test_the_best_is_kept_apart_from_the_newest(undisturbed: Path) -> None:
    measured = evaluations(undisturbed)
    assert sorted(measured) == [5, 10, 15, STEPS]
    best = max(measured, key=lambda step: (measured[step], -step))
    folders = list((undisturbed / "checkpoints").glob("best_*"))
    assert [folder.name for folder in folders] == [f"best_{best:08d}"]
    manifest = verify(folders[0])
    assert manifest.best is not None
    assert (manifest.best.metric, manifest.best.value, manifest.best.step) == ("AP", measured[best], best)
    assert not list((undisturbed / "checkpoints").glob(".*"))


def wait_until(process: subprocess.Popen[str], reached: object, what: str) -> None:
    deadline = time.monotonic() + 200
    while not reached():  # type: ignore[operator]
        assert process.poll() is None, f"ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def stopped(chain: Path) -> tuple[Path, subprocess.CompletedProcess[str], int, str]:
    """A run that was asked to save at about step 5, was held still while another tried to resume it, then stopped.

    Its stage's folder, what the other said, the exit code, the run's errors.
    """
    path = chain.parent / "stopped"
    process = subprocess.Popen(
        command("train", chain, "--run-dir", path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    stage = path / "train"
    try:
        wait_until(process, lambda: (stage / "metrics.jsonl").exists() and len(lines(stage)) >= 5, "step 5")
        process.send_signal(signal.SIGUSR1)
        wait_until(process, lambda: list((stage / "checkpoints").glob("step_*")), "a checkpoint")
        process.send_signal(signal.SIGSTOP)
        refused = run("resume", path, "--set", "stages.train.log_every_steps=7")
        refused.args = str(process.pid)
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    return stage, refused, process.returncode, errors


def test_a_signal_saves_and_training_goes_on(stopped) -> None:
    stage, _, code, errors = stopped
    assert "saving: a checkpoint is written at the next step" in errors
    saved = [verify(folder).step for folder in sorted((stage / "checkpoints").glob("step_*"))]
    assert len(saved) == 2, "one on the signal, one when stopped"
    assert 5 <= saved[0] < saved[1] <= STEPS - 1
    assert code == 4 and "dino-scale resume" in errors


def test_a_live_run_is_not_resumed_by_another(stopped) -> None:
    stage, refused, _, _ = stopped
    assert refused.returncode == 2
    holder = f"is in use by process {refused.args} on {socket.gethostname()} since 20"
    assert holder in refused.stderr and len(refused.stderr.strip().splitlines()) == 1
    kept = (stage.parent / "config.yaml").read_text()
    assert "log_every_steps: 1" in kept, "the refused one has changed the configuration"


def test_a_resumed_run_ends_with_the_same_checkpoint(undisturbed: Path, stopped) -> None:
    """The files of the last checkpoint are equal byte by byte: weights, moments and average. So are its step, its
    cursor and the best evaluation; the learning rates and losses of every step show schedule and data."""
    stage, *_ = stopped
    before = len(lines(stage))
    assert before < STEPS
    done = run("resume", stage.parent)
    assert done.returncode == 0, done.stderr
    assert f"continues from step_{before:08d}" in done.stdout
    for key in ("step", "samples_seen", "learning_rates", "loss"):
        assert [line[key] for line in lines(stage)] == [line[key] for line in lines(undisturbed)]
    assert evaluations(stage) == evaluations(undisturbed)
    assert newest(stage) == newest(undisturbed)
    one, other = (next((path / "checkpoints").glob("best_*")) for path in (stage, undisturbed))
    assert one.name == other.name and verify(one) == verify(other)


@pytest.mark.slow
def test_under_ray_the_driver_passes_the_request_on(chain: Path) -> None:
    """The driver gets the signal, two workers save together and go on; then SIGTERM stops them."""
    path = chain.parent / "ray"
    settings = ("launch.engine=ray", "launch.workers=2", "stages.train.batch.microbatch=1")
    overrides = [part for setting in settings for part in ("--set", setting)]
    process = subprocess.Popen(
        command("train", chain, "--run-dir", path, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    stage = path / "train"
    try:
        wait_until(process, lambda: (stage / "metrics.jsonl").exists() and len(lines(stage)) >= 2, "step 2")
        process.send_signal(signal.SIGUSR1)
        wait_until(process, lambda: list((stage / "checkpoints").glob("step_*")), "a checkpoint")
        first = newest(stage)
        wait_until(process, lambda: len(lines(stage)) > first.step, "a step after it")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 4, errors
    assert first.world_size == 2 and 2 <= first.step < newest(stage).step < STEPS


def test_an_end_that_cannot_be_saved_is_an_error(chain: Path) -> None:
    """No file may become larger than 200 KB: every save fails, the periodic ones loudly, the last one fatally."""
    path = chain.parent / "unwritable"
    code = (
        "import sys, resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "from launch.cli import main; sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["train", str(chain), "--run-dir", str(path), "--set", "stages.train.checkpoint.every_steps=8"]
    failed = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "SAVING FAILED: step_00000008 could not be written" in failed.stdout
    assert "training goes on" in failed.stdout
    assert len(lines(path / "train")) == STEPS, "a failed periodic save has stopped the run"
    assert "could not be written" in failed.stderr and len(failed.stderr.strip().splitlines()) == 1
    assert not list((path / "train" / "checkpoints").glob("*"))
    assert not (path / "train" / "weights.safetensors").exists()
    assert RunFolder.open(path).next_stage() == "train"
