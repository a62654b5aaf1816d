"""The command line: help, exit codes, messages. Commands that train are tested end to end elsewhere."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dino_scale.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DinoScaleError,
    Interrupted,
    NonFiniteError,
    RunFolderError,
    UserError,
    WorkerLostError,
)
from launch import cli

COMMANDS = ("demo", "pack", "plan", "train", "resume", "evaluate", "predict", "report")
CHAIN = "stages: {only: {schedule: {steps: 1}, data: {train: nowhere}}}\n"


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program as a user starts it, in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    example = text.split("example:\n")[1].split()
    assert example[:2] == ["dino-scale", command]
    assert cli.build_parser().parse_args(example[1:])


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {command} " in text for command in COMMANDS)
    assert "Exit codes: 0 done, 2 user error, 3 data error, 4 interrupted" in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train"],
        ["train", "chain.yaml", "--run-dir", "s3://bucket/runs/first"],
        ["resume", "s3://bucket/runs/first"],
        ["predict", "--weights", "w", "p", "--threshold", "2"],
    ],
)
def test_wrong_arguments_are_user_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: dino-scale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("x"), 2),
        (ConfigError("x"), 2),
        (RunFolderError("x"), 2),
        (DataError("x"), 3),
        (CheckpointError("x"), 3),
        (Interrupted("x"), 4),
        (WorkerLostError("x"), 4),
        (NonFiniteError("x"), 2),
        (KeyboardInterrupt(), 4),
        (PermissionError(13, "Permission denied", "x"), 2),
        (OSError(28, "No space left on device", "x"), 2),
    ],
)
def test_errors_become_one_message_and_a_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "build_parser", lambda: parser_of(error))
    assert cli.main([]) == code
    message = capsys.readouterr().err
    assert message.startswith("dino-scale: ") and message.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), FileNotFoundError(2, "No such file", "x")])
def test_anything_else_is_a_bug_with_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "build_parser", lambda: parser_of(error))
    assert cli.main([]) == 1
    message = capsys.readouterr().err
    assert "Traceback" in message and "this is a bug" in message


def test_debug_shows_where_an_error_arose(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "build_parser", lambda: parser_of(DinoScaleError("x")))
    monkeypatch.setenv("DINO_SCALE_DEBUG", "1")
    cli.main([])
    assert "Traceback" in capsys.readouterr().err


def parser_of(error: BaseException) -> argparse.ArgumentParser:
    def fail(_: argparse.Namespace) -> None:
        raise error

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=fail)
    return parser


def pack_nothing(folder: Path) -> list[str]:
    (folder / "images").mkdir()
    return ["pack", "--annotations", "missing.json", "--images", "images", "--out", "shards"]


def train_twice(folder: Path) -> list[str]:
    (folder / "chain.yaml").write_text(CHAIN)
    (folder / "run").mkdir()
    (folder / "run" / "chain.json").write_text("{}")
    return ["demo", "--run-dir", "run"]


def train_without_data(folder: Path) -> list[str]:
    (folder / "chain.yaml").write_text(CHAIN)
    return ["train", "chain.yaml", "--run-dir", "run"]


def train_with_typing_error(folder: Path) -> list[str]:
    return [*train_without_data(folder), "--set", "modle.hidden=3"]


def train_on_too_many(folder: Path) -> list[str]:
    (folder / "chain.yaml").write_text(CHAIN)
    return ["plan", "chain.yaml", "--set", "launch.workers=3"]


def resume_nothing(_: Path) -> list[str]:
    return ["resume", "run"]


def evaluate_nothing(folder: Path) -> list[str]:
    (folder / "w").write_text("not weights")
    return ["predict", "--weights", "w", str(Path(__file__).parents[1] / "data" / "coco_mini" / "images")]


@pytest.mark.parametrize(
    ("prepare", "code", "expected", "left"),
    [
        (pack_nothing, 3, "missing.json", {"images"}),
        (train_twice, 2, "run exists already: continue it with `dino-scale resume", {"chain.yaml", "run"}),
        (train_without_data, 3, "stages.only.data.train: ", {"chain.yaml"}),
        (train_with_typing_error, 2, "--set modle.hidden: modle: unknown key (did you mean model?)", {"chain.yaml"}),
        (train_on_too_many, 2, "stages.only.batch.global_size is 16: expected a multiple of", {"chain.yaml"}),
        (resume_nothing, 2, "run is not a folder: expected the run folder of `dino-scale train`", set()),
        (evaluate_nothing, 3, "w: not a readable safetensors file", {"w"}),
    ],
)
def test_bad_input_says_so_in_one_line_and_leaves_nothing(
    prepare: Callable[[Path], list[str]], code: int, expected: str, left: set[str], tmp_path: Path
) -> None:
    done = run(*prepare(tmp_path), folder=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert done.stderr.startswith("dino-scale: ") and expected in done.stderr
    assert {entry.name for entry in tmp_path.iterdir()} == left


def test_torchrun_engine_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text(CHAIN)
    done = run("train", "chain.yaml", "--set", "launch.engine=torchrun", folder=tmp_path, RANK="0")
    assert done.returncode == 2
    assert "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set: start the command with torchrun" in done.stderr
