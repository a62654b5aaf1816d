"""COCO box evaluation in memory. The only module that imports pycocotools.

Everything beyond the 12 numbers (curves, F1 per image, examples, confusions) is read from the matches COCOeval made,
so the pictures of the report show the very decisions the AP was computed from.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dino_scale.errors import DataError
from dino_scale.evaluation.result import (
    METRIC_NAMES,
    UNDEFINED,
    XYWH,
    ClassResult,
    Confusion,
    EvaluationResult,
    Example,
    FoundBox,
    ImageScore,
    TruthBox,
)

_IOU_50 = 0  # place of IoU 0.5 in COCOeval's thresholds
_ALL_AREAS = 0  # place of the "all" area range
_MOST_DETECTIONS = -1  # place of 100 detections per image
_OPERATING_SCORE_OF_NOTHING = 0.5


@dataclass(frozen=True)
class MatchedShare:
    """COCOeval's decisions about a share of the images: its rows by (place of class, place of area range, image id)."""

    rows: dict[tuple[int, int, int], dict[str, Any]]


def match_share(
    ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], share: int, shares: int
) -> MatchedShare:
    """The costly part of `evaluate_detections` for every `shares`-th image from the `share`-th on, in order of id.

    Every share must be given the same arguments. Raises DataError as `evaluate_detections` does.
    """
    dataset = ground_truth_dataset(ground_truth)
    evaluation = _prepared(dataset, detection_dataset(dataset, detections))
    mine = sorted(evaluation.params.imgIds)[share::shares]
    evaluation.params.imgIds = mine
    rows: dict[tuple[int, int, int], dict[str, Any]] = {}
    if mine:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
        places = itertools.product(
            range(len(evaluation.params.catIds)), range(len(evaluation.params.areaRng)), evaluation.params.imgIds
        )
        rows = {
            (category, area, int(image)): row
            for (category, area, image), row in zip(places, evaluation.evalImgs, strict=True)
            if row is not None
        }
    return MatchedShare(rows)


def evaluate_detections(
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    examples: int = 8,
    matched: Sequence[MatchedShare] = (),
) -> EvaluationResult:
    """Compares `detections` with `ground_truth` as COCO does (IoU 0.5:0.95, at most 100 detections an image and class).

    ground_truth: COCO annotation dictionary with `images` (id), `categories` (id, name) and `annotations` (image_id,
        category_id, bbox xywh in pixels; area and iscrowd where known, otherwise width * height and 0).
    detections: entries of a COCO results file (image_id, category_id, bbox xywh, score); may be empty.
    examples: how many of the best and of the worst pictures to keep with their boxes.
    matched: all shares of `match_share` with the same arguments, if that was done before; the result is the same.
    Neither argument is changed. DataError: a detection of an unknown image or category, or with a number that is
    not finite.
    """
    dataset = ground_truth_dataset(ground_truth)
    found = detection_dataset(dataset, detections)
    evaluation, metrics = _run(dataset, found, matched)
    matches = _matches(evaluation)
    threshold = _operating_score(matches)
    scores = _image_scores(matches, evaluation.params.imgIds, threshold)
    best, worst = _choose(scores, examples)
    boxes = _Boxes(dataset["annotations"], found["annotations"], threshold)
    outcomes = _Outcomes(matches, threshold)
    return EvaluationResult(
        metrics=metrics,
        classes=class_results(evaluation, dataset),
        mean_precision=mean_precision_curve(evaluation),
        operating_score=threshold,
        images=tuple(scores),
        confusions=_confusions(boxes, [score.image_id for score in scores]),
        best=tuple(_example(score, boxes, outcomes) for score in best),
        worst=tuple(_example(score, boxes, outcomes) for score in worst),
    )


def ground_truth_dataset(ground_truth: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose annotations are numbered from 1: COCOeval takes a match with annotation 0 for no match."""
    annotations = []
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        x, y, width, height = (float(value) for value in annotation["bbox"])
        annotations.append(
            {
                "id": number,
                "image_id": int(annotation["image_id"]),
                "category_id": int(annotation["category_id"]),
                "bbox": [x, y, width, height],
                "area": float(annotation.get("area", width * height)),
                "iscrowd": int(annotation.get("iscrowd", 0)),
            }
        )
    return {
        "images": [{"id": int(image["id"])} for image in ground_truth["images"]],
        "categories": [{"id": int(row["id"]), "name": str(row["name"])} for row in ground_truth["categories"]],
        "annotations": annotations,
    }


def detection_dataset(dataset: dict[str, Any], detections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What COCO.loadRes builds, without its failure on an empty list and without writing into the caller's entries."""
    images = {image["id"] for image in dataset["images"]}
    categories = {category["id"] for category in dataset["categories"]}
    annotations = []
    for number, entry in enumerate(detections, start=1):
        x, y, width, height = (float(value) for value in entry["bbox"])
        score = float(entry["score"])
        if entry["image_id"] not in images:
            raise DataError(
                f"detection {number} is of image {entry['image_id']}, which the ground truth does not have: "
                "evaluate with the annotations the detections were made from"
            )
        if entry["category_id"] not in categories:
            raise DataError(
                f"detection {number} (image {entry['image_id']}) has category {entry['category_id']}, expected one of "
                f"the {len(categories)} raw category ids of the ground truth: evaluate with matching annotations"
            )
        if not all(math.isfinite(value) for value in (x, y, width, height, score)):
            raise DataError(
                f"detection {number} (image {entry['image_id']}) has bbox {[x, y, width, height]} and score {score}: "
                "expected finite numbers; the weights that produced it have diverged"
            )
        annotations.append(
            {
                "id": number,
                "image_id": int(entry["image_id"]),
                "category_id": int(entry["category_id"]),
                "bbox": [x, y, width, height],
                "area": width * height,
                "iscrowd": 0,
                "score": score,
            }
        )
    return {"images": dataset["images"], "categories": dataset["categories"], "annotations": annotations}


def _prepared(dataset: dict[str, Any], found: dict[str, Any]) -> COCOeval:
    """COCOeval before evaluation. pycocotools prints; nobody asked it to."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth_index, found_index = COCO(), COCO()
        truth_index.dataset, found_index.dataset = dataset, found
        truth_index.createIndex()
        found_index.createIndex()
        return COCOeval(truth_index, found_index, "bbox")


def _run(
    dataset: dict[str, Any], found: dict[str, Any], matched: Sequence[MatchedShare]
) -> tuple[COCOeval, dict[str, float]]:
    """COCOeval after evaluation, and its 12 numbers by name."""
    evaluation = _prepared(dataset, found)
    with contextlib.redirect_stdout(io.StringIO()):
        if matched:
            _adopt(evaluation, matched)
        else:
            evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation, {name: float(value) for name, value in zip(METRIC_NAMES, evaluation.stats, strict=True)}


def _adopt(evaluation: COCOeval, matched: Sequence[MatchedShare]) -> None:
    """What `COCOeval.evaluate` leaves behind, from decisions made before."""
    params = evaluation.params
    params.imgIds = list(np.unique(params.imgIds))
    params.catIds = list(np.unique(params.catIds))
    rows = {key: row for share in matched for key, row in share.rows.items()}
    places = itertools.product(range(len(params.catIds)), range(len(params.areaRng)), params.imgIds)
    evaluation.evalImgs = [rows.get((category, area, int(image))) for category, area, image in places]
    evaluation._paramsEval = copy.deepcopy(params)


def class_results(evaluation: COCOeval, dataset: dict[str, Any]) -> tuple[ClassResult, ...]:
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    boxes = Counter(row["category_id"] for row in dataset["annotations"] if not row["iscrowd"])
    precision = evaluation.eval["precision"][:, :, :, _ALL_AREAS, _MOST_DETECTIONS]  # (10 IoUs, 101 recalls, classes)
    return tuple(
        ClassResult(
            id=int(category),
            name=names[category],
            AP=_mean_defined(precision[:, :, place]),
            AP50=_mean_defined(precision[_IOU_50, :, place]),
            boxes=boxes[category],
            precision=_curve(precision[_IOU_50, :, place]) if boxes[category] else (),
        )
        for place, category in enumerate(evaluation.params.catIds)
    )


def mean_precision_curve(evaluation: COCOeval) -> tuple[float, ...]:
    precision = evaluation.eval["precision"][_IOU_50, :, :, _ALL_AREAS, _MOST_DETECTIONS]
    defined = precision[:, precision[0] > UNDEFINED]
    return _curve(defined.mean(axis=1)) if defined.shape[1] else ()


def _mean_defined(values: np.ndarray) -> float:
    defined = values[values > UNDEFINED]
    return float(defined.mean()) if defined.size else UNDEFINED


def _curve(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)


@dataclass(frozen=True)
class _ImageMatches:
    """COCOeval's decisions at IoU 0.5 for one image and one class, ignored boxes and detections marked as such."""

    image_id: int
    scores: np.ndarray  # (D,) best first
    detection_ids: np.ndarray  # (D,)
    matched: np.ndarray  # (D,) id of the ground-truth box, 0 for none
    ignored: np.ndarray  # (D,) bool: matched a crowd
    truths: int  # boxes to be found


def _matches(evaluation: COCOeval) -> list[_ImageMatches]:
    wanted = evaluation.params.areaRng[_ALL_AREAS]
    return [
        _ImageMatches(
            image_id=int(row["image_id"]),
            scores=np.array(row["dtScores"], dtype=np.float64),
            detection_ids=np.array(row["dtIds"], dtype=np.int64),
            matched=row["dtMatches"][_IOU_50].astype(np.int64),
            ignored=row["dtIgnore"][_IOU_50].astype(bool),
            truths=int(np.count_nonzero(row["gtIgnore"] == 0)),
        )
        for row in evaluation.evalImgs
        if row is not None and row["aRng"] == wanted
    ]


def _operating_score(matches: list[_ImageMatches]) -> float:
    """The score with the highest F1 over all images and classes.

    Matching is greedy from the best score down, so the matches of the detections above any score are the same as if
    only those had been given: one sort answers for every threshold.
    """
    truths = sum(row.truths for row in matches)
    kept = [(row.scores[~row.ignored], row.matched[~row.ignored] > 0) for row in matches]
    scores = np.concatenate([score for score, _ in kept]) if kept else np.zeros(0)
    hits = np.concatenate([hit for _, hit in kept]) if kept else np.zeros(0, dtype=bool)
    if not hits.any():
        return _OPERATING_SCORE_OF_NOTHING
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(hits[order])
    f1 = 2 * found / (np.arange(1, len(order) + 1) + truths)
    # Equal scores cannot be told apart by a threshold: only the last of each run of equals is a possible cut.
    last_of_equals = np.append(np.diff(scores[order]) != 0, True)
    return float(scores[order][int(np.argmax(np.where(last_of_equals, f1, -1.0)))])


def _image_scores(matches: list[_ImageMatches], image_ids: Sequence[int], threshold: float) -> list[ImageScore]:
    found: Counter[int] = Counter()
    false: Counter[int] = Counter()
    truths: Counter[int] = Counter()
    for row in matches:
        counted = (row.scores >= threshold) & ~row.ignored
        hits = int(np.count_nonzero(row.matched[counted]))
        found[row.image_id] += hits
        false[row.image_id] += int(counted.sum()) - hits
        truths[row.image_id] += row.truths
    return [_image_score(int(image), found[image], false[image], truths[image]) for image in image_ids]


def _image_score(image_id: int, found: int, false: int, truths: int) -> ImageScore:
    mistakes = false + truths - found
    f1 = 2 * found / (2 * found + mistakes) if found + mistakes else 1.0
    return ImageScore(image_id, f1, found, false, truths - found)


def _choose(scores: Sequence[ImageScore], count: int) -> tuple[list[ImageScore], list[ImageScore]]:
    """The best (something was found) and the worst (something went wrong); none is in both lists."""
    good = sorted((s for s in scores if s.found), key=lambda s: (-s.f1, -s.found, s.image_id))[:count]
    taken = {score.image_id for score in good if score.f1 >= 0.5}
    bad = [s for s in scores if s.false + s.missed and s.image_id not in taken]
    bad = sorted(bad, key=lambda s: (s.f1, -s.false - s.missed, s.image_id))[:count]
    chosen = {score.image_id for score in bad}
    return [score for score in good if score.image_id not in chosen], bad


class _Boxes:
    """Ground truth, and detections at or above the operating score, by image."""

    def __init__(self, truth: list[dict[str, Any]], found: list[dict[str, Any]], threshold: float) -> None:
        self.truth: dict[int, list[dict[str, Any]]] = defaultdict(list)
        self.found: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in truth:
            self.truth[row["image_id"]].append(row)
        for row in sorted(found, key=lambda entry: -entry["score"]):
            if row["score"] >= threshold:
                self.found[row["image_id"]].append(row)


class _Outcomes:
    """Which boxes were found and which detections were right, over all images, by COCOeval's decisions."""

    def __init__(self, matches: list[_ImageMatches], threshold: float) -> None:
        self.found_truths: set[int] = set()
        self._of_detection: dict[int, str] = {}
        for row in matches:
            counted = row.scores >= threshold
            self.found_truths.update(row.matched[counted].tolist())
            for number, matched, ignored in zip(row.detection_ids, row.matched, row.ignored, strict=True):
                self._of_detection[int(number)] = "ignored" if ignored else "correct" if matched else "false"

    def of_detection(self, number: int) -> str:
        # Absent: beyond COCO's 100 detections per image and class, which COCO does not look at.
        return self._of_detection.get(number, "ignored")


def _example(score: ImageScore, boxes: _Boxes, outcomes: _Outcomes) -> Example:
    return Example(
        image_id=score.image_id,
        f1=score.f1,
        truth=tuple(
            TruthBox(row["category_id"], _xywh(row), bool(row["iscrowd"]), row["id"] in outcomes.found_truths)
            for row in boxes.truth[score.image_id]
        ),
        detections=tuple(
            FoundBox(row["category_id"], _xywh(row), row["score"], outcomes.of_detection(row["id"]))
            for row in boxes.found[score.image_id]
        ),
    )


def _xywh(row: dict[str, Any]) -> XYWH:
    x, y, width, height = row["bbox"]
    return x, y, width, height


def _confusions(boxes: _Boxes, image_ids: Sequence[int]) -> tuple[Confusion, ...]:
    """Boxes matched to detections whatever their class, best score first, each to the free box it covers best."""
    counts: Counter[tuple[int | None, int | None]] = Counter()
    for image in image_ids:
        counts.update(_confused_pairs(boxes.truth[image], boxes.found[image]))
    rows = [Confusion(truth, detected, count) for (truth, detected), count in counts.items()]
    return tuple(sorted(rows, key=lambda row: (-row.count, row.truth or 0, row.detected or 0)))


def _confused_pairs(truth: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[tuple[int | None, int | None]]:
    if not truth or not found:
        return [(row["category_id"], None) for row in truth if not row["iscrowd"]] + [
            (None, row["category_id"]) for row in found
        ]
    crowd = [row["iscrowd"] for row in truth]
    overlaps = mask.iou([row["bbox"] for row in found], [row["bbox"] for row in truth], crowd)  # (found, truth)
    free = np.array([not value for value in crowd])
    pairs: list[tuple[int | None, int | None]] = []
    for row, overlap in zip(found, overlaps, strict=True):
        candidates = np.where(free, overlap, 0.0)
        chosen = int(candidates.argmax())
        if candidates[chosen] >= 0.5:
            free[chosen] = False
            pairs.append((truth[chosen]["category_id"], row["category_id"]))
        elif not any(is_crowd and value >= 0.5 for is_crowd, value in zip(crowd, overlap, strict=True)):
            pairs.append((None, row["category_id"]))
    return pairs + [(row["category_id"], None) for row, is_free in zip(truth, free, strict=True) if is_free]
