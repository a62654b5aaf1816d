"""A Slurm of one machine: stand-ins for scontrol and srun on PATH, around the real scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$SLURM_STAND_IN_LOG"
if [ "$1 $2" = "show hostnames" ]; then tr , '\\n' <<< "$3"; fi
"""
# Starts as many copies of the command as tasks, hands signals on, and ends with the worst code, as srun does.
SRUN = """#!/bin/bash
ended=
hand_on() { ended=yes; for pid in $(jobs -p); do kill -TERM "$pid" 2>/dev/null; done; }
trap hand_on TERM
echo "srun $*" >> "$SLURM_STAND_IN_LOG"
tasks=1
while [[ "$1" == --* ]]; do
    case "$1" in --ntasks=*) tasks=${1#*=} ;; esac
    shift
done
pids=()
for ((task = 0; task < tasks; task++)); do "$@" & pids+=($!); done
[ -n "$ended" ] && hand_on
worst=0
for pid in "${pids[@]}"; do
    code=0
    while true; do
        wait "$pid" && code=0 || code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    ((code > worst)) && worst=$code
done
exit "$worst"
"""


class Slurm:
    """log: every call of scontrol and srun, one a line."""

    def __init__(self, folder: Path, hosts: str) -> None:
        self.folder, self.log = folder, folder / "slurm.log"
        self.log.touch()
        self.add("scontrol", SCONTROL)
        self.add("srun", SRUN)
        self.environment = os.environ | {
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SLURM_STAND_IN_LOG": str(self.log),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": hosts,
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }

    def add(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        command = ["bash", str(ROOT / "launch" / "slurm" / script), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=self.environment | variables, text=True, cwd=ROOT, **pipes)  # type: ignore[call-overload, no-any-return]

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()
