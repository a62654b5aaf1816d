"""`bench ladder`: equal conditions for every rung, and the way from nothing to the table."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from dino_scale.errors import UserError
from dino_scale.evaluation.instability import Instability
from launch.cli import main
from launch.ladder import RUNGS, Plan, Rung, averages, rung_chain

PLAN = Plan(steps=800, images=1600, validation=200, seeds=(0, 1), workers=1)


def test_rungs_differ_in_name_and_model_alone(tmp_path: Path) -> None:
    chains = [rung_chain(name, 3, PLAN, tmp_path) for name in RUNGS]
    assert len({str(chain.model) for chain in chains}) == len(RUNGS)
    same = [replace(chain, name="rung", model=chains[0].model) for chain in chains]
    assert all(chain == same[0] for chain in same)


def test_plan_reaches_the_chain(tmp_path: Path) -> None:
    chain = rung_chain("dino", 3, PLAN, tmp_path)
    stage = chain.stages["train"]
    assert (chain.seed, stage.schedule.steps, stage.schedule.warmup_steps) == (3, 800, 80)
    assert stage.checkpoint.every_steps == 1600 // stage.batch.global_size
    assert stage.data.train == str(tmp_path / "train")
    assert chain.launch.engine == "local"
    many = rung_chain("dino", 3, replace(PLAN, workers=2), tmp_path)
    assert (many.launch.engine, many.launch.workers) == ("ray", 2)
    assert many.stages == chain.stages


def test_too_short_for_a_change_between_epochs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least two epochs"):
        rung_chain("dino", 0, replace(PLAN, steps=150), tmp_path)


def test_averages_over_seeds() -> None:
    def rung(name: str, seed: int, ap: float, share: float) -> Rung:
        metrics = {"AP": ap, "AP50": 2 * ap}
        return Rung(name, seed, 10, metrics, (Instability(share, 1.0), Instability(share, 3.0)), 5.0)

    rows = averages([rung("dino", 0, 0.2, 0.1), rung("deformable_detr", 0, 0.1, 0.5), rung("dino", 1, 0.4, 0.3)])
    assert [row[0] for row in rows] == ["deformable_detr", "dino"]
    assert rows[1][1:] == pytest.approx((10, 0.3, 0.6, 0.2, 2.0, 5.0))


def test_mistakes_of_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "taken.csv"
    taken.write_text("")
    for arguments in (["--steps", "0"], ["--out", str(taken)], ["--steps", "3", "--run-dir", str(tmp_path / "run")]):
        assert main(["bench", "ladder", *arguments]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_whole_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ladder.csv"
    numbers = ["--steps", "6", "--images", "32", "--validation", "6", "--seeds", "0"]
    assert main(["bench", "ladder", *numbers, "--out", str(out), "--run-dir", str(tmp_path / "run")]) == 0
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["rung"] for row in rows] == list(RUNGS)
    for row in rows:
        assert len(row["by_epoch"].split()) == 2
        assert 0 <= float(row["AP"]) <= 1 and 0 <= float(row["instability"]) <= 1
    shown = capsys.readouterr().out
    assert all(name in shown for name in RUNGS)
