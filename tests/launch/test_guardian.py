"""The guardian ends the descendants of a killed process, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

CODE = """
import subprocess, sys, time
from launch.guardian import Guardian
shell = subprocess.Popen(["sh", "-c", "sleep 300 & sleep 300; true"], start_new_session=True)
time.sleep(0.3)
guardian = Guardian()
later = subprocess.Popen(["sleep", "300"])
if sys.argv[1] == "dismiss":
    guardian.dismiss()
print(shell.pid, later.pid, flush=True)
time.sleep(300)
"""


def start(mode: str) -> tuple[subprocess.Popen[str], list[psutil.Process], psutil.Process]:
    """A driver, its descendants from before the guardian, and one from after it."""
    driver = subprocess.Popen([sys.executable, "-c", CODE, mode], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    shell, later = map(int, driver.stdout.readline().split())
    known = [psutil.Process(shell), *psutil.Process(shell).children()]
    assert len(known) == 3
    return driver, known, psutil.Process(later)


def test_descendants_of_a_killed_driver_end_and_others_stay() -> None:
    driver, known, later = start("watch")
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(known, timeout=20)
    assert alive == []
    assert later.is_running()
    later.kill()


def test_a_dismissed_guardian_ends_nothing() -> None:
    driver, known, later = start("dismiss")
    assert not any("guardian" in part for child in psutil.Process(driver.pid).children() for part in child.cmdline())
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(0.5)
    assert all(process.is_running() for process in known)
    for process in (*known, later):
        process.kill()
