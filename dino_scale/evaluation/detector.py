"""Running a detector over a validation set, every image once, over any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from dino_scale.evaluation.coco import evaluate_detections, match_share
from dino_scale.evaluation.detections import to_coco_detections
from dino_scale.evaluation.result import EvaluationResult
from dino_scale.model.dino import Dino
from dino_scale.model.postprocess import detect
from dino_scale.model.preprocess import normalise
from dino_scale.precision import autocast
from dino_scale.structures import Batch, Category
from dino_scale.training import distributed


@torch.no_grad()
def detect_all(
    model: Dino,
    batches: Iterable[Batch],
    categories: Sequence[Category | None],
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    detections: int,
    precision: str,
) -> list[dict[str, Any]]:
    """Detections of this rank's `batches` in COCO format (raw category ids, x, y, width, height in original pixels).

    categories: of each class row of the model; detections of a row that is None are left out.
    """
    device = next(model.parameters()).device
    model.eval()
    found: list[dict[str, Any]] = []
    for batch in batches:
        images, padding_mask = normalise(batch.to(device), mean, std)
        with autocast(device, precision):
            outputs = model(images, padding_mask)
        results = detect(outputs, batch.original_sizes, detections)
        found += to_coco_detections([result.to("cpu") for result in results], batch.image_ids, categories)
    return found


def gather_detections(own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Detections of all ranks on every rank, ordered by image, so that the result does not depend on their number."""
    everything = [item for part in distributed.gather_objects(own) for item in part]
    return sorted(everything, key=lambda item: (item["image_id"], -item["score"]))


def evaluate_over_ranks(ground_truth: Mapping[str, Any], found: list[dict[str, Any]]) -> EvaluationResult:
    """`evaluate_detections` with the images dealt to the ranks; the same numbers to the last bit, on every rank.

    Both arguments must be whole and the same on every rank.
    """
    share = match_share(ground_truth, found, distributed.rank(), distributed.world_size())
    shares = distributed.gather_on_zero(share)
    return distributed.on_rank_zero(lambda: evaluate_detections(ground_truth, found, matched=shares or ()))
