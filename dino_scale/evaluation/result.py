"""What an evaluation found: plain numbers that are written to the run folder and read back by the report.

Boxes here are COCO boxes: x, y of the top left corner, width, height, in pixels of the original image.
Category ids are the raw ids of the annotation file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from dino_scale.errors import DataError

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
UNDEFINED = -1.0  # COCO's mark for a number without any ground truth behind it

XYWH = tuple[float, float, float, float]


@dataclass(frozen=True)
class ClassResult:
    """One category. AP, AP50 in [0, 1] or -1 where it has no box; `boxes` counts those that are not crowd.

    precision: 101 values at recall 0, 0.01, ..., 1 and IoU 0.5; empty where undefined.
    """

    id: int
    name: str
    AP: float
    AP50: float
    boxes: int
    precision: tuple[float, ...]


@dataclass(frozen=True)
class ImageScore:
    """One image at IoU 0.5 and the operating score: f1 = 2 found / (2 found + false + missed), 1 where all are 0."""

    image_id: int
    f1: float
    found: int
    false: int
    missed: int


@dataclass(frozen=True)
class TruthBox:
    """A ground-truth box; `found`: some detection of its class at or above the operating score covers it."""

    category_id: int
    bbox: XYWH
    crowd: bool
    found: bool


@dataclass(frozen=True)
class FoundBox:
    """A detection at or above the operating score; `outcome` is correct, false, or ignored (it lies on a crowd)."""

    category_id: int
    bbox: XYWH
    score: float
    outcome: str


@dataclass(frozen=True)
class Example:
    """One picture worth looking at, with all that is needed to draw it except the pixels."""

    image_id: int
    f1: float
    truth: tuple[TruthBox, ...]
    detections: tuple[FoundBox, ...]


@dataclass(frozen=True)
class Confusion:
    """`count` boxes of category `truth` were detected as `detected`; None stands for background on either side."""

    truth: int | None
    detected: int | None
    count: int


@dataclass(frozen=True)
class EvaluationResult:
    """COCO box evaluation of one set of detections.

    metrics: the 12 COCO numbers by METRIC_NAMES, in [0, 1], -1 where undefined.
    classes: one per category, by raw id.
    mean_precision: 101 values, mean of the classes' curves at IoU 0.5; empty where no class has a box.
    operating_score: the score at which F1 over all images (IoU 0.5) is highest; 0.5 where nothing was ever right.
    images: one per image, by id.
    confusions: which class was taken for which at the operating score, IoU 0.5, boxes matched whatever their class;
        largest count first.
    best, worst: examples by F1; among equals those with more boxes or more mistakes.
    """

    metrics: dict[str, float]
    classes: tuple[ClassResult, ...]
    mean_precision: tuple[float, ...]
    operating_score: float
    images: tuple[ImageScore, ...]
    confusions: tuple[Confusion, ...]
    best: tuple[Example, ...]
    worst: tuple[Example, ...]

    def to_json(self) -> str:
        """JSON text that `from_json` turns into an equal result."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> EvaluationResult:
        """Reads `to_json` text; DataError where it is something else."""
        try:
            return _decode(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"evaluation result cannot be read ({type(error).__name__}: {error}): expected the JSON that "
                "an evaluation writes; evaluate again with `dino-scale evaluate`"
            ) from error


def _decode(raw: dict[str, Any]) -> EvaluationResult:
    return EvaluationResult(
        metrics={name: float(raw["metrics"][name]) for name in METRIC_NAMES},
        classes=tuple(ClassResult(**{**row, "precision": tuple(row["precision"])}) for row in raw["classes"]),
        mean_precision=tuple(raw["mean_precision"]),
        operating_score=float(raw["operating_score"]),
        images=tuple(ImageScore(**row) for row in raw["images"]),
        confusions=tuple(Confusion(**row) for row in raw["confusions"]),
        best=tuple(_decode_example(row) for row in raw["best"]),
        worst=tuple(_decode_example(row) for row in raw["worst"]),
    )


def _decode_example(raw: dict[str, Any]) -> Example:
    return Example(
        image_id=raw["image_id"],
        f1=raw["f1"],
        truth=tuple(TruthBox(**{**row, "bbox": _xywh(row["bbox"])}) for row in raw["truth"]),
        detections=tuple(FoundBox(**{**row, "bbox": _xywh(row["bbox"])}) for row in raw["detections"]),
    )


def _xywh(values: list[float]) -> XYWH:
    x, y, width, height = (float(value) for value in values)
    return x, y, width, height
