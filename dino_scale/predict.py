"""The detector on single pictures, outside of training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_scale.evaluation.detections import to_coco_detections
from dino_scale.model.dino import Dino
from dino_scale.model.postprocess import detect
from dino_scale.model.preprocess import normalise
from dino_scale.structures import Batch, Category, Detections, Targets


@dataclass(frozen=True)
class Prediction:
    """One picture and what was found in it. height, width: of the picture as it is on disk, in pixels."""

    file_name: str
    height: int
    width: int
    detections: Detections


@torch.no_grad()
def predict(
    model: Dino,
    image: np.ndarray,
    *,
    resize: Callable[[np.ndarray], Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    detections: int,
) -> Detections:
    """The best `detections` (box, class) pairs of one picture, on the CPU, boxes clipped to the picture.

    image: (H, W, 3) uint8 RGB. resize: turns it into the (3, h, w) uint8 tensor the detector is to see, the same way as
    in evaluation. mean, std: of RGB in [0, 1], as in training. The model is put in evaluation mode and stays there.
    """
    height, width = image.shape[:2]
    resized = resize(image)
    batch = Batch(
        images=resized[None],
        sizes=((resized.shape[1], resized.shape[2]),),
        original_sizes=((height, width),),
        sample_ids=(0,),
        image_ids=(0,),
        targets=Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), (0,)),
    ).to(next(model.parameters()).device)
    model.eval()
    images, padding_mask = normalise(batch, mean, std)
    (found,) = detect(model(images, padding_mask), batch.original_sizes, detections)
    limits = found.boxes.new_tensor([width, height, width, height])
    return Detections(found.scores, found.labels, found.boxes.clamp(min=0).minimum(limits)).to("cpu")


def to_coco(
    predictions: Sequence[Prediction], categories: Sequence[Category], smallest_score: float = 0.0
) -> dict[str, Any]:
    """A COCO annotation dictionary: images numbered from 1, categories with raw ids, one annotation with a score per
    detection of at least `smallest_score`."""
    numbers = range(1, len(predictions) + 1)
    found = to_coco_detections([prediction.detections for prediction in predictions], numbers, categories)
    kept = [entry for entry in found if entry["score"] >= smallest_score]
    return {
        "images": [
            {"id": number, "file_name": picture.file_name, "height": picture.height, "width": picture.width}
            for number, picture in zip(numbers, predictions, strict=True)
        ],
        "categories": [{"id": category.id, "name": category.name} for category in categories if category.name],
        "annotations": [
            {"id": number, **entry, "area": round(entry["bbox"][2] * entry["bbox"][3], 2), "iscrowd": 0}
            for number, entry in enumerate(kept, start=1)
        ],
    }
