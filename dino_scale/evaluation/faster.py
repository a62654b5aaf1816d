"""The COCO numbers by faster-coco-eval, where it is installed: several times quicker, without anything per image.

pycocotools stays the referee; a test compares the two. The only module that imports faster_coco_eval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dino_scale.errors import UserError
from dino_scale.evaluation.coco import (
    class_results,
    detection_dataset,
    ground_truth_dataset,
    mean_precision_curve,
)
from dino_scale.evaluation.result import METRIC_NAMES, EvaluationResult

_UNKNOWN_SCORE = 0.5  # no operating score is worked out here


def evaluate_quickly(ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> EvaluationResult:
    """As `coco.evaluate_detections` (same arguments, same numbers), but images, confusions and examples are empty.

    Raises UserError where faster-coco-eval is not installed, DataError for detections that do not fit.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise UserError(
            "the backend 'faster' needs the package faster-coco-eval: pip install faster-coco-eval, or use pycocotools"
        ) from None
    dataset = ground_truth_dataset(ground_truth)
    found = detection_dataset(dataset, detections)
    evaluation = COCOeval_faster(COCO(dataset), COCO(found), iouType="bbox", print_function=_say_nothing)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    numbers = [float(value) for value in evaluation.stats[: len(METRIC_NAMES)]]
    return EvaluationResult(
        metrics=dict(zip(METRIC_NAMES, numbers, strict=True)),
        classes=class_results(evaluation, dataset),
        mean_precision=mean_precision_curve(evaluation),
        operating_score=_UNKNOWN_SCORE,
        images=(),
        confusions=(),
        best=(),
        worst=(),
    )


def _say_nothing(*_: object) -> None:
    """It prints by itself; nobody asked it to."""
