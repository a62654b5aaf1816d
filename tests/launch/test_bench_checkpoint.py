"""`bench checkpoint`, run as a user does: every figure is there, and is a figure."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from launch.cli import main

RATIOS = {
    "training stopped by a save": "plain torch.save",
    "save until committed": "raw write and sync",
    "load": "raw read",
    "peak extra memory of saving": "state",
}


@pytest.mark.slow
def test_every_figure_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "checkpoint.csv"
    assert main(["bench", "checkpoint", "--models", "small", "--workers", "2", "--turns", "1", "--out", str(out)]) == 0
    rows = {row["what"]: row for row in csv.DictReader(out.open())}
    assert all(math.isfinite(float(row["value"])) and float(row["value"]) >= 0 for row in rows.values())
    for what, against in RATIOS.items():
        assert rows[what]["against"] == against and float(rows[what]["ratio"]) > 0
    assert float(rows["resharding to 3 files"]["value"]) > 0
    assert {row["workers"] for row in rows.values()} == {"2"}
    assert [path.name for path in tmp_path.iterdir()] == [out.name], "what was saved is left behind"
