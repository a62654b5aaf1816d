"""The phases of a start add up, and are those of a real one."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from launch.cli import main
from launch.commands.bench_startup import medians
from launch.startup import Phase


def test_medians_keep_the_order_of_the_phases() -> None:
    found = [Phase("ray", turn, what, turn * factor) for turn in (1, 2, 9) for what, factor in (("b", 1.0), ("a", 2.0))]
    assert medians([*found, Phase("local", 1, "c", 5.0)], "ray") == [("b", 2.0), ("a", 4.0)]


def test_a_real_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "startup.csv"
    assert main(["bench", "startup", "--engines", "local", "--repeat", "1", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    seconds = {row["phase"]: float(row["seconds"]) for row in rows}
    parts = ["imports, configuration, checks", "stage: data, model", "DeepSpeed, loader, first step"]
    assert list(seconds) == [*parts, "all"]
    assert all(seconds[part] > 0 for part in parts)
    assert sum(seconds[part] for part in parts) == pytest.approx(seconds["all"], abs=0.05)
    assert "local, start 1: " in capsys.readouterr().out
    assert main(["bench", "startup", "--out", str(out)]) == 2  # an existing file is not overwritten
