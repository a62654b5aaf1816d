"""Runs the tests of the Triton kernels in a process of their own: the interpreter must be chosen before triton is
imported, and the other tests of this process need the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", ["deform_attn", "windowed", "matching"])
def test_interpreted(part: str) -> None:
    run(part, "not slow")


@pytest.mark.slow
def test_interpreted_slowly() -> None:
    run("matching", "slow")


def run(part: str, marks: str) -> None:
    tests = f"tests/kernels/interpreted_{part}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr
