"""faster-coco-eval against the referee, pycocotools."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import pytest

from dino_scale.errors import DataError, UserError
from dino_scale.evaluation.coco import evaluate_detections
from dino_scale.evaluation.faster import evaluate_quickly

INSTALLED = importlib.util.find_spec("faster_coco_eval") is not None
installed = pytest.mark.skipif(not INSTALLED, reason="faster-coco-eval is an optional package and not installed")


def scene(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Crowds, tied scores, boxes without area, classes without boxes, more than 100 detections in an image."""
    rng = random.Random(seed)
    images = [{"id": number * 7 + 1} for number in range(rng.randint(1, 12))]
    categories = [{"id": number, "name": f"class {number}"} for number in (2, 5, 11, 90)]
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image in images:
        for _ in range(rng.randint(0, 9)):
            box = [rng.uniform(0, 300), rng.uniform(0, 300), rng.choice([0, 5, 20, 60, 200]), rng.choice([8, 40, 150])]
            category = rng.choice([2, 5, 11])
            row = {"image_id": image["id"], "category_id": category, "bbox": box, "iscrowd": int(rng.random() < 0.1)}
            truth.append({**row, "id": len(truth) + 1, "area": box[2] * box[3] * rng.uniform(0.4, 1)})
            for _ in range(rng.randint(0, 4)):
                moved = [value + rng.uniform(-6, 6) for value in box[:2]] + [max(1.0, side * 1.05) for side in box[2:]]
                score = rng.choice([0.2, 0.5, round(rng.random(), 3)])
                label = rng.choice([category, category, 2, 90])
                found.append({"image_id": image["id"], "category_id": label, "bbox": moved, "score": score})
        for _ in range(rng.choice([0, 0, 120])):
            box = [rng.uniform(0, 300), rng.uniform(0, 300), 30, 30]
            found.append({"image_id": image["id"], "category_id": 5, "bbox": box, "score": round(rng.random(), 2)})
    return {"images": images, "categories": categories, "annotations": truth}, found


@installed
@pytest.mark.parametrize("seed", range(20))
def test_the_numbers_are_those_of_pycocotools(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    truth, found = scene(seed)
    quick, referee = evaluate_quickly(truth, found), evaluate_detections(truth, found)
    assert quick.metrics == pytest.approx(referee.metrics, abs=1e-9)
    assert [row.id for row in quick.classes] == [row.id for row in referee.classes]
    for one, other in zip(quick.classes, referee.classes, strict=True):
        assert (one.AP, one.AP50, one.boxes) == pytest.approx((other.AP, other.AP50, other.boxes), abs=1e-9)
        assert one.precision == pytest.approx(other.precision, abs=1e-4)
    assert quick.mean_precision == pytest.approx(referee.mean_precision, abs=1e-4)
    assert capsys.readouterr().out == ""


@installed
def test_no_detection_and_wrong_ones() -> None:
    truth, found = scene(3)
    assert evaluate_quickly(truth, []).metrics == evaluate_detections(truth, []).metrics
    with pytest.raises(DataError, match="which the ground truth does not have"):
        evaluate_quickly(truth, [{**found[0], "image_id": 4}])


@pytest.mark.skipif(INSTALLED, reason="faster-coco-eval is installed")
def test_without_the_package_the_remedy_is_named() -> None:
    with pytest.raises(UserError, match="pip install faster-coco-eval"):
        evaluate_quickly(*scene(0))
