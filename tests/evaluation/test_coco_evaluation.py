"""The COCO numbers against pycocotools used directly, and what is derived from its matches."""

from __future__ import annotations

import copy
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dino_scale.errors import DataError
from dino_scale.evaluation.coco import evaluate_detections, match_share
from dino_scale.evaluation.detections import to_coco_detections
from dino_scale.evaluation.detector import evaluate_over_ranks
from dino_scale.evaluation.result import METRIC_NAMES, Confusion, EvaluationResult
from dino_scale.structures import Category, Detections
from tests.support.processes import run_ranks

CATEGORIES = (3, 7, 20, 91)  # raw ids with gaps; 91 never has a box


def random_ground_truth(rng: random.Random, crowds: bool = True) -> dict[str, Any]:
    """Images with 0 to 6 boxes of all COCO sizes, ids with gaps, some crowds, some areas smaller than the box."""
    images = [{"id": 10 + 7 * k, "width": 400, "height": 300, "file_name": f"{k}.jpg"} for k in range(9)]
    annotations = []
    for image in images[1:]:  # the first image stays without boxes
        for _ in range(rng.randrange(7)):
            width, height = rng.choice([8, 20, 50, 120]), rng.choice([10, 30, 60, 150])
            box = [rng.uniform(0, 400 - width), rng.uniform(0, 300 - height), width, height]
            annotations.append(
                {
                    "id": 5 + 3 * len(annotations),
                    "image_id": image["id"],
                    "category_id": rng.choice(CATEGORIES[:3]),
                    "bbox": box,
                    "area": width * height * rng.choice([1.0, 0.6]),
                    "iscrowd": int(crowds and rng.random() < 0.15),
                }
            )
    names = [{"id": number, "name": f"class {number}"} for number in CATEGORIES]
    return {"images": images, "annotations": annotations, "categories": names}


def random_detections(rng: random.Random, truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Jittered copies of most boxes, some with another class, and noise; scores have ties."""
    found = []
    for row in truth["annotations"]:
        x, y, width, height = row["bbox"]
        for _ in range(rng.choice([0, 1, 1, 2])):
            box = [x + rng.gauss(0, 0.1) * width, y + rng.gauss(0, 0.1) * height, width * 1.05, height * 0.95]
            category = row["category_id"] if rng.random() < 0.8 else rng.choice(CATEGORIES)
            found.append({"image_id": row["image_id"], "category_id": category, "bbox": box})
    for image in truth["images"]:
        for _ in range(rng.randrange(5)):
            box = [rng.uniform(0, 300), rng.uniform(0, 200), rng.uniform(5, 100), rng.uniform(5, 100)]
            found.append({"image_id": image["id"], "category_id": rng.choice(CATEGORIES), "bbox": box})
    return [{**row, "score": round(rng.random(), 2)} for row in found]


def direct_numbers(folder: Path, truth: dict[str, Any], found: list[dict[str, Any]]) -> list[float]:
    path = folder / "truth.json"
    path.write_text(json.dumps(truth), encoding="utf-8")
    index = COCO(str(path))
    evaluation = COCOeval(index, index.loadRes(copy.deepcopy(found)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(value) for value in evaluation.stats]


@pytest.mark.parametrize("seed", range(8))
def test_numbers_equal_pycocotools_used_directly(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    truth = random_ground_truth(rng)
    found = random_detections(rng, truth)
    before = copy.deepcopy((truth, found))
    result = evaluate_detections(truth, found)
    assert (truth, found) == before  # pycocotools writes into what it is given
    assert list(result.metrics) == list(METRIC_NAMES)
    assert list(result.metrics.values()) == direct_numbers(tmp_path, truth, found)


@pytest.mark.parametrize("shares", [1, 2, 3, 200])
@pytest.mark.parametrize("seed", range(3))
def test_matching_in_shares_gives_the_same_result(seed: int, shares: int) -> None:
    """Also with more shares than images; everything is equal, not only the numbers."""
    rng = random.Random(seed)
    truth = random_ground_truth(rng)
    found = random_detections(rng, truth)
    parts = [match_share(truth, found, share, shares) for share in range(shares)]
    sent = pickle.loads(pickle.dumps(parts))
    assert evaluate_detections(truth, found, matched=sent) == evaluate_detections(truth, found)
    if shares in (2, 3):
        assert evaluate_detections(truth, found, matched=sent[1:]) != evaluate_detections(truth, found)


def over_ranks(seed: int) -> EvaluationResult:
    rng = random.Random(seed)
    truth = random_ground_truth(rng)
    return evaluate_over_ranks(truth, random_detections(rng, truth))


def test_evaluation_over_processes_is_bit_equal() -> None:
    rng = random.Random(5)
    truth = random_ground_truth(rng)
    alone = evaluate_detections(truth, random_detections(rng, truth))
    assert run_ranks(over_ranks, 3, 5) == [alone, alone, alone]


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(1)
    truth = random_ground_truth(rng)
    evaluate_detections(truth, random_detections(rng, truth))
    assert capsys.readouterr().out == ""


def test_annotation_numbers_do_not_matter() -> None:
    """pycocotools itself takes a match with annotation 0 for none."""
    rng = random.Random(2)
    truth = random_ground_truth(rng)
    found = random_detections(rng, truth)
    from_zero = {**truth, "annotations": [{**row, "id": k} for k, row in enumerate(truth["annotations"])]}
    assert evaluate_detections(from_zero, found) == evaluate_detections(truth, found)


def test_classes_average_to_the_whole() -> None:
    rng = random.Random(3)
    truth = random_ground_truth(rng)
    result = evaluate_detections(truth, random_detections(rng, truth))
    assert [row.id for row in result.classes] == list(CATEGORIES)
    defined = [row for row in result.classes if row.boxes]
    assert sum(row.AP for row in defined) / len(defined) == pytest.approx(result.metrics["AP"])
    assert sum(row.AP50 for row in defined) / len(defined) == pytest.approx(result.metrics["AP50"])
    assert sum(result.mean_precision) / 101 == pytest.approx(result.metrics["AP50"], abs=1e-4)
    assert all(len(row.precision) == 101 for row in defined)
    absent = result.classes[-1]
    assert (absent.AP, absent.AP50, absent.boxes, absent.precision) == (-1.0, -1.0, 0, ())


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inside = max(0.0, width) * max(0.0, height)
    return inside / (a[2] * a[3] + b[2] * b[3] - inside)


def counted(truth: dict[str, Any], found: list[dict[str, Any]], threshold: float) -> dict[int, tuple[int, int, int]]:
    """(found, false, missed) of every image by plain greedy matching, class by class; no crowds."""
    kept = sorted((row for row in found if row["score"] >= threshold), key=lambda row: -row["score"])
    numbers = {}
    for image in truth["images"]:
        free = [row for row in truth["annotations"] if row["image_id"] == image["id"]]
        boxes, hits, false = len(free), 0, 0
        for row in (row for row in kept if row["image_id"] == image["id"]):
            same = [other for other in free if other["category_id"] == row["category_id"]]
            best = max(same, key=lambda other: overlap(row["bbox"], other["bbox"]), default=None)
            if best is not None and overlap(row["bbox"], best["bbox"]) >= 0.5:
                free.remove(best)
                hits += 1
            else:
                false += 1
        numbers[image["id"]] = (hits, false, boxes - hits)
    return numbers


def f1_of(numbers: dict[int, tuple[int, int, int]]) -> float:
    hits, false, missed = (sum(column) for column in zip(*numbers.values(), strict=True))
    return 2 * hits / (2 * hits + false + missed)


@pytest.mark.parametrize("seed", range(4))
def test_operating_score_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(100 + seed)
    truth = random_ground_truth(rng, crowds=False)
    found = random_detections(rng, truth)
    result = evaluate_detections(truth, found)
    numbers = counted(truth, found, result.operating_score)
    assert {row.image_id: (row.found, row.false, row.missed) for row in result.images} == numbers
    best = max(f1_of(counted(truth, found, row["score"])) for row in found)
    assert f1_of(numbers) == pytest.approx(best)


def test_zero_detections() -> None:
    truth = random_ground_truth(random.Random(4))
    result = evaluate_detections(truth, [])
    assert result.metrics["AP"] == 0.0
    assert result.metrics["AR100"] == 0.0
    assert result.operating_score == 0.5
    assert result.best == ()
    assert all(row.found == row.false == 0 for row in result.images)
    assert {row.detected for row in result.confusions} == {None}


def test_no_ground_truth_at_all() -> None:
    truth = {**random_ground_truth(random.Random(5)), "annotations": []}
    nothing = evaluate_detections(truth, [])
    assert set(nothing.metrics.values()) == {-1.0}
    assert nothing.mean_precision == ()
    assert [row.f1 for row in nothing.images] == [1.0] * 9
    false = [{"image_id": 10, "category_id": 3, "bbox": [0, 0, 5, 5], "score": 0.9}]
    assert evaluate_detections(truth, false).images[0].f1 == 0.0


def tiny_truth(**changes: Any) -> dict[str, Any]:
    """One image with a box of class 1 on the left and one of class 2 on the right."""
    left = {"id": 1, "image_id": 5, "category_id": 1, "bbox": [0, 0, 40, 40], "area": 1600, "iscrowd": 0}
    right = {"id": 2, "image_id": 5, "category_id": 2, "bbox": [60, 0, 40, 40], "area": 1600, "iscrowd": 0}
    names = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
    return {"images": [{"id": 5}, {"id": 6}], "annotations": [{**left, **changes}, right], "categories": names}


def entry(category: int, box: list[float], score: float, image: int = 5) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def test_a_detection_on_a_crowd_is_neither_right_nor_wrong() -> None:
    found = [entry(1, [2, 2, 10, 10], 0.9), entry(2, [60, 0, 40, 40], 0.8)]
    result = evaluate_detections(tiny_truth(iscrowd=1), found)
    assert (result.images[0].found, result.images[0].false, result.images[0].missed) == (1, 0, 0)
    assert result.metrics["AP50"] == pytest.approx(1.0)
    assert [box.outcome for box in result.best[0].detections] == ["ignored", "correct"]
    assert [(box.crowd, box.found) for box in result.best[0].truth] == [(True, True), (False, True)]
    assert result.confusions == (Confusion(2, 2, 1),)


def test_confusions_and_examples() -> None:
    found = [
        entry(2, [60, 0, 40, 40], 0.9),  # right
        entry(2, [0, 0, 40, 38], 0.8),  # the left box, taken for class 2
        entry(1, [0, 100, 20, 20], 0.9, image=6),  # nothing there
        entry(1, [0, 0, 9, 9], 0.1),  # below the operating score
    ]
    result = evaluate_detections(tiny_truth(), found)
    assert result.operating_score == 0.9
    assert set(result.confusions) == {Confusion(2, 2, 1), Confusion(1, None, 1), Confusion(None, 1, 1)}
    assert [example.image_id for example in result.best] == [5]
    assert [example.image_id for example in result.worst] == [6]
    assert [(box.category_id, box.found) for box in result.best[0].truth] == [(1, False), (2, True)]
    lowered = [{**row, "score": 0.9} for row in found[:2]]
    assert Confusion(1, 2, 1) in evaluate_detections(tiny_truth(), lowered).confusions


def test_json_round_trip() -> None:
    rng = random.Random(6)
    truth = random_ground_truth(rng)
    result = evaluate_detections(truth, random_detections(rng, truth))
    assert result.best
    assert result.worst
    assert EvaluationResult.from_json(result.to_json()) == result


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"metrics": {}}'])
def test_other_json_is_a_data_error(text: str) -> None:
    with pytest.raises(DataError, match="evaluate again"):
        EvaluationResult.from_json(text)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (entry(1, [0, 0, 5, 5], 0.5, image=77), "image 77"),
        (entry(9, [0, 0, 5, 5], 0.5), "category 9"),
        (entry(1, [0, float("nan"), 5, 5], 0.5), "nan"),
        (entry(1, [0, 0, 5, 5], float("inf")), "inf"),
    ],
)
def test_impossible_detections_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_detections(tiny_truth(), [row])


def test_detections_become_coco_entries() -> None:
    found = Detections(
        scores=torch.tensor([0.91234567, 0.5]),
        labels=torch.tensor([1, 0]),
        boxes=torch.tensor([[1.0, 2.0, 4.0, 8.126], [0.0, 0.0, 1.0, 1.0]]),
    )
    empty = Detections(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    categories = (Category(3, "three"), Category(90, "ninety"))
    assert to_coco_detections([empty, found], [12, 44], categories) == [
        {"image_id": 44, "category_id": 90, "bbox": [1.0, 2.0, 3.0, 6.13], "score": 0.912346},
        {"image_id": 44, "category_id": 3, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.5},
    ]
