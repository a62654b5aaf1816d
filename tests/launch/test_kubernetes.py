"""The RayJob against the operator's own schema, and its entrypoint as a shell would run it."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dino_scale.config.decode import load_chain
from launch.cli import build_parser
from launch.commands.demo import CHAIN

ROOT = Path(__file__).resolve().parents[2]
JOB = yaml.safe_load((ROOT / "launch" / "kubernetes" / "rayjob.yaml").read_text(encoding="utf-8"))
SCHEMA = json.loads((ROOT / "tests" / "data" / "rayjob_schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_the_operator_would_accept_it() -> None:
    assert [error.message for error in VALIDATOR.iter_errors(JOB)] == []


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("spec", "backofLimit"), 3, "'backofLimit' was unexpected"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "none", "is not one of ['disabled', 'token']"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"), "two", "is not of type 'integer'"),
    ],
)
def test_the_schema_sees_mistakes(path: tuple[Any, ...], value: Any, complaint: str) -> None:
    job = copy.deepcopy(JOB)
    place = job
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert any(complaint in error.message for error in VALIDATOR.iter_errors(job))


def test_tokens_are_on_and_pods_have_time_to_save() -> None:
    cluster = JOB["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in cluster["workerGroupSpecs"]:
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= 120


def test_a_pod_that_is_sent_away_tells_the_run(tmp_path: Path) -> None:
    """Its hook puts up the very file that the entrypoint's run looks for, and then leaves time to save."""
    entrypoint = JOB["spec"]["entrypoint"]
    notices = re.findall(r"launch\.notice_file=([^ ;]+)", entrypoint)
    assert len(notices) == entrypoint.count("python -m launch") == 2
    for group in JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        shell, option, hook = container["lifecycle"]["preStop"]["exec"]["command"]
        here = hook.replace("/tmp", str(tmp_path)).replace("sleep", "echo")
        held = subprocess.run([shell, option, here], capture_output=True, text=True, check=True).stdout
        assert all(Path(notice.replace("/tmp", str(tmp_path))).is_file() for notice in notices)
        assert 120 <= int(held) < group["template"]["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(("there", "command"), [(False, "train"), (True, "resume")])
def test_entrypoint(tmp_path: Path, there: bool, command: str) -> None:
    """It resumes a run that is there. The command line that it makes is one that the program understands."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    run = tmp_path / "shared" / "runs" / "first"
    run.mkdir(parents=True)
    if there:
        (run / "chain.json").touch()
    entrypoint = JOB["spec"]["entrypoint"].replace("/shared", str(tmp_path / "shared"))
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", entrypoint], env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[:3] == ["-m", "launch", command]
    options = build_parser().parse_args(words[2:])
    assert options.run_dir == run
    assert load_chain(CHAIN, options.overrides).launch.address == "auto"
