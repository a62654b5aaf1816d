"""The data of the demo: a call that was stopped is made again and ends with the same shards."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launch.commands.demo import Sizes, make_data


def test_stopped_between_any_two_steps(tiny_data: Path, tmp_path: Path) -> None:
    """`tiny_data` was made in one go."""
    sizes = {"objects": Sizes(16, 4), "scenes": Sizes(8, 4)}
    said: list[str] = []
    calls = 0
    while not _one_step(make_data(tmp_path / "data", sizes, seed=0), said):
        calls += 1
    assert calls == 6, "two drawings that were not begun, four packings"
    expected = {path.relative_to(tiny_data): path for path in tiny_data.rglob("*") if path.is_file()}
    found = {path.relative_to(tmp_path / "data/shards"): path for path in (tmp_path / "data/shards").rglob("*.*")}
    assert len([path for path in expected if path.suffix == ".tar"]) == 4
    for name, path in expected.items():
        assert found[name].read_bytes() == path.read_bytes(), name
    assert sum(text.startswith("packed 16 images") for text in said) == 1


def _one_step(steps: Iterator[str], said: list[str]) -> bool:
    """Take steps up to the first that says something new; whether that was the end of all."""
    for text in steps:
        said.append(text)
        if said.count(text) == 1 and not text.endswith("are there") and "packed images" not in text:
            return False
    return True


def test_stopped_while_drawing(tmp_path: Path) -> None:
    """By Ctrl-C, which says how to go on, and by a kill, whose half drawn pictures do not stay."""
    run = tmp_path / "run"
    raw = run / "data" / "raw"
    command = [sys.executable, "-m", "launch", "demo", "--run-dir", str(run)]
    for stop in (signal.SIGKILL, signal.SIGINT):
        before = set(raw.glob("*.partial-*"))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 100
            while not set(raw.glob("*.partial-*")) - before:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(stop)
            _, errors = process.communicate(timeout=100)
        finally:
            process.kill()
            process.wait()
        left = list(raw.iterdir())
        if stop == signal.SIGKILL:
            assert process.returncode == -stop and len(left) == 1, errors
    assert process.returncode == 4, errors
    assert errors.splitlines()[-1].endswith(f"continue with: dino-scale demo --run-dir {run}")
    assert left == []
