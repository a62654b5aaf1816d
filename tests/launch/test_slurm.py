"""The Slurm scripts, run as they are with stand-ins for Slurm's commands; the slow ones train for real."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.commands.demo import CHAIN
from tests.support.processes import free_port
from tests.support.slurm import ROOT, Slurm

# A head listens on its port until it is ended; a trainer writes down what it was asked, and ends as it is told.
RAY = """#!/bin/bash
echo "ray $* token=${#RAY_AUTH_TOKEN} mode=$RAY_AUTH_MODE" >> "$SLURM_STAND_IN_LOG"
for option in "$@"; do case "$option" in --port=*) port=${option#*=} ;; esac; done
if [ -n "$port" ]; then exec "$REAL_PYTHON" -c "
import socket, sys, time
listener = socket.create_server(('127.0.0.1', int(sys.argv[1])))
while True: listener.accept()[0].close()" "$port"; fi
exec sleep 60
"""
TRAINER = """#!/bin/bash
if [ "$1" = -c ]; then exec "$REAL_PYTHON" "$@"; fi
echo "trainer $*" >> "$SLURM_STAND_IN_LOG"
trap 'echo "trainer saves" >> "$SLURM_STAND_IN_LOG"; exit 4' TERM
[ -n "$TRAINER_CODE" ] && exit "$TRAINER_CODE"
echo ready >> "$SLURM_STAND_IN_LOG"
until [ -e "$SLURM_STAND_IN_LOG.done" ]; do sleep 0.1; done
"""
LOCAL = "#!/bin/bash\necho 127.0.0.1 192.0.2.1\n"  # what `hostname --ip-address` says


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    slurm = Slurm(tmp_path, "alpha,beta,gamma")
    slurm.environment |= {
        "PYTHON": str(slurm.add("trainer", TRAINER)),
        "RAY": str(slurm.add("ray", RAY)),
        "REAL_PYTHON": sys.executable,
        "DINO_PORT": str(free_port()),
        "SLURM_GPUS_ON_NODE": "4",
        "TRAINER_CODE": "",
    }
    slurm.add("hostname", LOCAL)
    return slurm


def test_a_public_address_is_refused(slurm: Slurm) -> None:
    slurm.add("hostname", "#!/bin/bash\necho 8.8.8.8\n")
    job = slurm.start("ray.sbatch", "chain.yaml", str(slurm.folder / "run"))
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert "8.8.8.8, which is not private: name the inner network's interface in DINO_INTERFACE" in output
    assert not any(call.startswith(("ray", "trainer")) for call in slurm.calls())


def wait_for(line: Callable[[str], bool], slurm: Slurm, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not any(line(call) for call in slurm.calls()):
        assert time.monotonic() < end, slurm.calls()
        time.sleep(0.1)


def test_ray_is_started_on_every_node_and_trains(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.start("ray.sbatch", "chain.yaml", str(tmp_path / "run"), "--set", "seed=5")
    for awaited in ("ready", "ray start --head", "--nodelist=beta", "--nodelist=gamma"):
        wait_for(lambda call, awaited=awaited: awaited in call, slurm)  # type: ignore[misc]
    slurm.log.with_suffix(".log.done").touch()
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    port, calls = slurm.environment["DINO_PORT"], slurm.calls()
    assert f"trainer -m launch train chain.yaml --run-dir {tmp_path}/run --set launch.address=127.0.0.1:{port} " in (
        "\n".join(calls)
    )
    assert any(call.endswith("--set launch.workers=12 --set seed=5") for call in calls)
    heads = [call for call in calls if call.startswith("ray start --head")]
    (head,) = heads
    assert f"--node-ip-address=127.0.0.1 --port={port} --include-dashboard=false --dashboard-host=127.0.0.1" in head
    assert head.endswith("token=64 mode=token")
    joined = [call for call in calls if f"--address=127.0.0.1:{port} --block" in call and call.startswith("srun")]
    assert sorted(call.split("--nodelist=")[1].split()[0] for call in joined) == ["beta", "gamma"]
    assert not any("requeue" in call for call in calls)
    with socket.socket() as probe:  # the head ended with the script
        assert probe.connect_ex(("127.0.0.1", int(port))) != 0


@pytest.mark.parametrize("notice", [signal.SIGUSR1, signal.SIGTERM])
def test_a_notice_saves_and_requeues(slurm: Slurm, tmp_path: Path, notice: signal.Signals) -> None:
    job = slurm.start("ray.sbatch", "chain.yaml", str(tmp_path / "run"))
    wait_for(lambda call: call == "ready", slurm)
    job.send_signal(notice)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 4, output
    calls = slurm.calls()
    assert calls.index("trainer saves") < calls.index("scontrol requeue 77")


def test_a_requeued_job_resumes(slurm: Slurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "chain.json").write_text("{}")
    job = slurm.start("ray.sbatch", "chain.yaml", str(run), TRAINER_CODE="0")
    job.communicate(timeout=60)
    assert any(call.startswith(f"trainer -m launch resume {run} --set launch.address=") for call in slurm.calls())


@pytest.mark.parametrize(("code", "requeued"), [(2, False), (3, False), (1, False), (4, True)])
def test_only_what_can_be_resumed_is_requeued(slurm: Slurm, tmp_path: Path, code: int, requeued: bool) -> None:
    job = slurm.start("ray.sbatch", "chain.yaml", str(tmp_path / "run"), TRAINER_CODE=str(code))
    job.communicate(timeout=60)
    assert job.returncode == code
    assert ("scontrol requeue 77" in slurm.calls()) == requeued


def test_torchrun_on_every_node(slurm: Slurm, tmp_path: Path) -> None:
    torchrun = slurm.add("torchrun", TRAINER)
    slurm.environment["TORCHRUN"] = str(torchrun)
    job = slurm.start("torchrun.sbatch", "chain.yaml", str(tmp_path / "run"), "--set", "seed=5", TRAINER_CODE="0")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    started = [call for call in slurm.calls() if call.startswith("trainer")]
    assert len(started) == 3
    assert (
        "--nnodes=3 --nproc-per-node=4" in started[0]
        and f"--rdzv-endpoint=alpha:{slurm.environment['DINO_PORT']}" in (started[0])
    )
    assert started[0].endswith(
        f"-m launch train chain.yaml --run-dir {tmp_path}/run --set launch.engine=torchrun --set seed=5"
    )


def test_torchrun_saves_and_requeues(slurm: Slurm, tmp_path: Path) -> None:
    slurm.environment["TORCHRUN"] = str(slurm.add("torchrun", TRAINER))
    job = slurm.start("torchrun.sbatch", "chain.yaml", str(tmp_path / "run"))
    wait_for(lambda call: call == "ready", slurm)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert "scontrol requeue 77" in slurm.calls()


@pytest.mark.parametrize("script", ["ray.sbatch", "torchrun.sbatch"])
def test_scripts_say_how_to_be_used(slurm: Slurm, script: str) -> None:
    job = slurm.start(script, "chain.yaml")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2 and output.startswith("usage: sbatch ")
    lines = (ROOT / "launch" / "slurm" / script).read_text().splitlines()
    assert "#SBATCH --signal=B:USR1@120" in lines and "#SBATCH --requeue" in lines


def settings(data: Path) -> list[str]:
    """Of a training of a few steps."""
    pairs = [
        f"stages.{name}.data.{key}={data / 'scenes' / key}"
        for name in ("pretrain", "finetune", "scratch")
        for key in ("train", "validation")
    ]
    pairs += [f"stages.{name}.schedule={{steps: 3}}" for name in ("pretrain", "finetune", "scratch")]
    return [part for pair in pairs for part in ("--set", pair)]


@pytest.mark.slow
def test_ray_really_trains_in_an_allocation(tmp_path: Path, tiny_data: Path) -> None:
    slurm = Slurm(tmp_path, "alpha")
    slurm.add("hostname", LOCAL)
    ray = shutil.which("ray", path=str(Path(sys.executable).parent)) or shutil.which("ray")
    assert ray is not None
    variables = {"RAY": ray, "DINO_PORT": str(free_port()), "RAY_TMPDIR": "/tmp", "DINO_WORKERS": "1"}
    job = slurm.start("ray.sbatch", str(CHAIN), str(tmp_path / "run"), *settings(tiny_data), **variables)
    output, _ = job.communicate(timeout=400)
    assert job.returncode == 0, output
    assert all(stage["state"] == "done" for stage in stages_of(tmp_path / "run").values())


@pytest.mark.slow
def test_torchrun_really_trains_on_two_nodes(tmp_path: Path, tiny_data: Path) -> None:
    """Two torchrun agents, which find each other by rendezvous, with one worker each."""
    slurm = Slurm(tmp_path, "localhost,localhost")
    torchrun = slurm.add("torchrun", f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    variables = {"TORCHRUN": str(torchrun), "DINO_PORT": str(free_port()), "DINO_PER_NODE": "1"}
    job = slurm.start("torchrun.sbatch", str(CHAIN), str(tmp_path / "run"), *settings(tiny_data), **variables)
    output, _ = job.communicate(timeout=400)
    assert job.returncode == 0, output
    assert all(stage["state"] == "done" for stage in stages_of(tmp_path / "run").values())
    lines = (tmp_path / "run" / "scratch" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["world_size"] == 2


def stages_of(run: Path) -> dict[str, dict[str, object]]:
    state: dict[str, dict[str, dict[str, object]]] = json.loads((run / "chain.json").read_text())
    return state["stages"]


def test_scripts_are_valid_bash() -> None:
    for script in sorted((ROOT / "launch" / "slurm").glob("*.sbatch")):
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
