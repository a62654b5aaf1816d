"""The benchmark measures what it says, on a small scale; no figure of time is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline import bench
from data_pipeline.index import Index
from launch.cli import main


def test_a_large_index_opens_like_any_other(tmp_path: Path) -> None:
    bench.write_large_index(tmp_path / "large", 5000)
    index = Index.open(tmp_path / "large")
    assert len(index) == 5000 and index.size(4999) == (640, 640)
    assert index.boxes(4999).boxes.shape == (bench.BOXES_PER_IMAGE, 4) and len(index.categories) == 365


def test_the_command(
    packed_scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(bench, "LARGE", 20_000)
    monkeypatch.setattr(bench, "READS", 100)
    monkeypatch.setattr(bench, "SIZES", 512)
    out = tmp_path / "costs.json"
    assert main(["bench", "loader", str(packed_scenes), "--images", "4", "--out", str(out)]) == 0
    costs = json.loads(out.read_text())
    assert costs["images"] == 4 and costs["large_samples"] == 20_000
    assert costs["raw_ratio"] == pytest.approx(costs["webdataset_microseconds"] / costs["raw_microseconds"])
    assert costs["fast_ratio"] == pytest.approx(costs["official_milliseconds"] / costs["fast_milliseconds"])
    assert 0 <= costs["padding"]["size_planned"]["4"] < costs["padding"]["permutation"]["4"]
    assert costs["worker_megabytes"] < 100
    assert "times cheaper" in capsys.readouterr().out
