"""Detections of the model as entries of a COCO results file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dino_scale.structures import Category, Detections


def to_coco_detections(
    detections: Sequence[Detections], image_ids: Sequence[int], categories: Sequence[Category | None]
) -> list[dict[str, Any]]:
    """One entry per detection: image_id, category_id (raw), bbox [x, y, width, height] in pixels, score.

    `detections` and `image_ids` go in pairs; label k is `categories[k]`, and where that is None or nameless the
    detection is left out. Boxes are rounded to 1/100 pixel and scores to 1e-6, which keeps the file small and is far
    below what changes a COCO number.
    """
    return [
        entry
        for found, image_id in zip(detections, image_ids, strict=True)
        for entry in _entries(found, int(image_id), categories)
    ]


def _entries(found: Detections, image_id: int, categories: Sequence[Category | None]) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image_id,
            "category_id": category.id,
            "bbox": [round(x1, 2), round(y1, 2), round(x2 - x1, 2), round(y2 - y1, 2)],
            "score": round(score, 6),
        }
        for score, label, (x1, y1, x2, y2) in zip(
            found.scores.tolist(), found.labels.tolist(), found.boxes.tolist(), strict=True
        )
        if (category := categories[label]) is not None and category.name
    ]
