"""The profile of a training step: that both ways are the same step, and what the command writes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from dino_scale.config.schema import LossConfig
from dino_scale.loss.criterion import Criterion
from dino_scale.loss.matcher import match_layers
from dino_scale.model.dino import build_model
from dino_scale.training.step_profile import match_usually
from launch.cli import main
from launch.commands import bench_step
from tests.support.tiny_detector import CLASSES, generator, images, targets, tiny


def test_both_ways_are_the_same_step() -> None:
    truth = targets(3, 0, 5)
    losses = []
    for attention, matcher in (("reference", match_usually), ("auto", match_layers)):
        torch.manual_seed(0)
        model = build_model(tiny(attention=attention), CLASSES).train()
        outputs = model(*images(3), truth, generator())
        losses.append(Criterion(LossConfig(), matcher)(outputs, truth, 8.0)["total"].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_command_writes_the_dearest_operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_step, "ModelConfig", tiny)
    out = tmp_path / "step.csv"
    assert main(["bench", "step", "--size", "64", "--images", "1", "--turns", "1", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["way"] for row in rows] == ["usual"] * 15 + ["ours"] * 15
    for way in ("usual", "ours"):
        own = [float(row["own_ms"]) for row in rows if row["way"] == way]
        assert own == sorted(own, reverse=True) and own[0] > 0
    names = {way: {row["operator"] for row in rows if row["way"] == way} for way in ("usual", "ours")}
    assert any("deform_attn" in name for name in names["ours"]) and not any("deform_attn" in n for n in names["usual"])
    assert main(["bench", "step", "--out", str(out)]) == 2


def test_command_refuses_a_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["bench", "step", "--device", "cuda", "--out", str(tmp_path / "new.csv")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
