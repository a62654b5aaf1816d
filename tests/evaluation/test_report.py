"""The report page, written from run folders made by hand."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_scale.config.dump import dump_chain
from dino_scale.config.schema import ChainConfig, DataConfig, ScheduleConfig, StageConfig, StartConfig
from dino_scale.errors import DataError, RunFolderError
from dino_scale.evaluation.charts import Series, line_chart, number, smoothed, thinned
from dino_scale.evaluation.coco import evaluate_detections
from dino_scale.evaluation.report import transfer_gains, write_report
from dino_scale.evaluation.run_record import read_run

HOSTILE = "<script>alert(1)</script>\" onload='x"


def stage_config(data: str, start: str = "") -> StageConfig:
    return StageConfig(
        data=DataConfig(train=f"{data}/train", validation=f"{data}/validation"),
        start=StartConfig(stage=start),
        schedule=ScheduleConfig(steps=30),
    )


def chain_config() -> ChainConfig:
    stages = {"pretrain": stage_config("objects"), "tune": stage_config("scenes", "pretrain")}
    return ChainConfig(name="two-of-three", seed=17, stages={**stages, "scratch": stage_config("scenes")})


def truth(name: str = "kite") -> dict[str, Any]:
    boxes = [
        {"id": k, "image_id": 100 + k, "category_id": 7, "bbox": [5, 5, 30, 20], "area": 600, "iscrowd": 0}
        for k in range(4)
    ]
    images = [{"id": 100 + k, "width": 60, "height": 40} for k in range(4)]
    return {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": name}, {"id": 9, "name": "other"}]}


def write_evaluation(folder: Path, step: int, right: int, name: str = "kite") -> None:
    """`right` of the 4 boxes are found; image 103 has a false detection."""
    found = [{"image_id": 100 + k, "category_id": 7, "bbox": [5, 5, 30, 20], "score": 0.9} for k in range(right)]
    found.append({"image_id": 103, "category_id": 9, "bbox": [0, 0, 9, 9], "score": 0.95})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"step_{step:08d}.json").write_text(evaluate_detections(truth(name), found).to_json(), encoding="utf-8")
    (folder / f"step_{step:08d}_detections.json").write_text(json.dumps(found), encoding="utf-8")


def log_line(step: int, **changes: Any) -> dict[str, Any]:
    losses = {"decoder0/class": 1 / step, "decoder1/class": 0.5 / step, "encoder/box": 0.1}
    line = {"step": step, "epoch": step / 10, "samples_seen": 16 * step, "loss": 9 / step, "losses": losses}
    line |= {"gradient_norm": 2.0, "learning_rates": {"main": 1e-4}, "images_per_second": 50.0}
    return line | {"data_wait_share": 0.02, "memory_mb": 900.0, "world_size": 2, "time": 1.0, **changes}


def write_log(folder: Path, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def make_run(run: Path, name: str = "kite") -> Path:
    run.mkdir()
    (run / "config.yaml").write_text(dump_chain(chain_config()), encoding="utf-8")
    states = {}
    for stage, right in (("pretrain", 3), ("tune", 4), ("scratch", 1)):
        write_log(run / stage, [log_line(step) for step in range(1, 31)])
        write_evaluation(run / stage / "evaluation", 30, right, name)
        states[stage] = {"state": "done", "step": 30, "metrics": {}, "seconds": 61.0}
    (run / "chain.json").write_text(json.dumps({"stages": states}), encoding="utf-8")
    return run


def picture(stage: str, image_id: int) -> np.ndarray:
    return np.full((40, 60, 3), image_id % 256, dtype=np.uint8)


def page_of(run: Path) -> str:
    return write_report(run, picture).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Tags, their attributes and all text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_page_holds_stages_numbers_curves_and_pictures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    asked: list[tuple[str, int]] = []

    def image_of(stage: str, image_id: int) -> np.ndarray:
        asked.append((stage, image_id))
        return picture(stage, image_id)

    path = write_report(run, image_of)
    assert path == run / "report.html"
    assert [file.name for file in run.glob("report*")] == ["report.html"]
    page = path.read_text(encoding="utf-8")
    text = " ".join(Elements(page).texts)
    for expected in ("two-of-three", "pretrain", "tune", "scratch", "kite", "seed 17", "Transfer gain", "Loss: total"):
        assert expected in text
    for heading in (
        "Learning rate",
        "Throughput",
        "Waiting for data",
        "Gradient norm",
        "Best pictures",
        "Worst pictures",
    ):
        assert heading in text
    expected_ap = read_run(run).stages[0].final
    assert expected_ap is not None
    assert f"{expected_ap.metrics['AP']:.3f}" in text
    assert {stage for stage, _ in asked} == {"pretrain", "tune", "scratch"}
    assert page.count("data:image/jpeg;base64,") == 2 * len(asked)
    assert len(page) < 3_000_000


def test_page_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    assert "http" not in page
    assert "url(" not in page
    for tag, attributes in Elements(page).tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert not any(name.startswith("on") for name in attributes)
        assert re.match(r"data:image/jpeg;base64,|#|$", attributes.get("src") or attributes.get("href") or "")


def test_names_from_data_and_configuration_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", HOSTILE)
    chain = ChainConfig(stages={"pretrain": stage_config(HOSTILE)})
    (run / "config.yaml").write_text(dump_chain(chain), encoding="utf-8")
    write_log(run / "pretrain", [log_line(1, losses={HOSTILE: 1.0}, learning_rates={HOSTILE: 1.0, "b": 2.0})])
    states = {"pretrain": {"state": HOSTILE, "step": 1}}
    (run / "chain.json").write_text(json.dumps({"stages": states, "environment": {HOSTILE: HOSTILE}}), encoding="utf-8")
    page = page_of(run)
    assert "<script" not in page
    elements = Elements(page)
    assert "script" not in {tag for tag, _ in elements.tags}
    assert not any("onload" in attributes for _, attributes in elements.tags)
    assert HOSTILE in "".join(elements.texts)


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_chain(chain_config()), encoding="utf-8")
    text = " ".join(Elements(page_of(run)).texts)
    assert "chain.json is not there yet" in text
    assert text.count("No training step has been logged yet.") == 3
    assert text.count("No evaluation has been made yet") == 3
    assert "Transfer gain" not in text


def test_a_killed_run(tmp_path: Path) -> None:
    """A torn log line, steps logged twice, an evaluation that is not one, fewer workers after the resumption."""
    run = make_run(tmp_path / "run")
    write_log(run / "tune", [log_line(1), log_line(2), log_line(2, loss=5.0, world_size=1, gradient_norm=None)])
    with (run / "tune" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    (run / "tune" / "evaluation" / "step_00000030.json").write_text("{", encoding="utf-8")
    (run / "chain.json").write_text("{", encoding="utf-8")
    stage = read_run(run).stages[1]
    assert [(line["step"], line["loss"]) for line in stage.log] == [(1, 9.0), (2, 5.0)]
    text = " ".join(Elements(page_of(run)).texts)
    assert "1 line(s) of metrics.jsonl cannot be read" in text
    assert "step_00000030.json" in text
    assert "chain.json cannot be read" in text
    assert "workers: 2, 1 from step 2" in text


def test_pictures_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    def image_of(stage: str, image_id: int) -> np.ndarray:
        raise DataError(f"image {image_id} is not in the shards")

    page = write_report(make_run(tmp_path / "run"), image_of).read_text(encoding="utf-8")
    assert "image 103 is not in the shards" in page
    assert "data:image" not in page


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no config\.yaml"):
        write_report(tmp_path, picture)


def test_transfer_gain_compares_siblings_only(tmp_path: Path) -> None:
    gains = transfer_gains(read_run(make_run(tmp_path / "run")).stages)
    assert [(gain.started.name, gain.scratch.name) for gain in gains] == [("tune", "scratch")]
    started, scratch = gains[0].numbers("AP50")
    assert started > scratch > 0


def test_latest_evaluation_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_evaluation(run / "pretrain" / "evaluation", 7, 0)
    stage = read_run(run).stages[0]
    assert [step for step, _ in stage.evaluations] == [7, 30]
    assert stage.final == stage.evaluations[1][1]
    assert "AP while training" in page_of(run)


@pytest.mark.parametrize(
    "points",
    [
        [(1.0, 2.0)],
        [(0.0, 0.0), (1.0, 0.0)],
        [(1.0, -3.0), (2.0, 1e9)],
        [(1.0, 1.0), (2.0, float("nan")), (3.0, float("inf")), (4.0, 2.0)],
        [(float(k), 1e-7 * k) for k in range(5000)],
    ],
)
@pytest.mark.parametrize("logarithmic", [False, True])
def test_charts_draw_inside_their_frame(points: list[tuple[float, float]], logarithmic: bool) -> None:
    chart = line_chart([Series("a", points, 0)], "step", "loss", logarithmic=logarithmic)
    assert "nan" not in chart
    assert "inf" not in chart
    if "<svg" not in chart:  # nothing positive to draw on a log scale
        assert logarithmic
        assert all(y <= 0 for _, y in points)
        return
    width, height = (int(value) for value in re.findall(r'viewBox="0 0 (\d+) (\d+)"', chart)[0])
    path = re.findall(r'class="line"[^>]* d="([^"]*)"', chart)[0]
    places = [tuple(map(float, place)) for place in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]
    assert places
    assert len(places) <= 300
    assert all(0 <= x <= width and 0 <= y <= height for x, y in places)


def test_a_chart_without_values_says_so() -> None:
    assert "No values" in line_chart([Series("a", [(1.0, float("nan"))], 0)], "step", "loss")


def test_thinning_keeps_ends_and_mean() -> None:
    points = [(float(k), float(k % 7)) for k in range(10_000)]
    thin = thinned(points)
    assert len(thin) <= 300
    assert thin[-1] == points[-1]
    assert sum(y for _, y in thin) / len(thin) == pytest.approx(3.0, abs=0.1)


def test_smoothing_does_not_lag() -> None:
    line = [(float(k), 100.0 - k) for k in range(100)]
    assert [y for _, y in smoothed(line, 0.1)][20:80] == pytest.approx([y for _, y in line][20:80])


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (12000, "12k"), (0.00012, "1.2e-4"), (0.5, "0.5"), (2.5e6, "2.5M"), (-3.0, "-3")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
