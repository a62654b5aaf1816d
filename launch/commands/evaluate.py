"""`dino-scale evaluate`: COCO numbers of a weights file on packed data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from data_pipeline.dataset import open_dataset
from data_pipeline.index import Index, ground_truth
from data_pipeline.loader import evaluation_batches
from dino_scale.config.schema import EvaluationConfig
from dino_scale.errors import DataError
from dino_scale.evaluation.coco import evaluate_detections
from dino_scale.evaluation.detector import detect_all
from dino_scale.evaluation.faster import evaluate_quickly
from dino_scale.evaluation.result import EvaluationResult
from dino_scale.structures import Batch, Category
from launch.detector import Detector, evaluation_settings, open_detector
from launch.progress import number
from launch.run_folder import require_new, write_text


def run(arguments: argparse.Namespace) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if arguments.out is not None:
        require_new(arguments.out)
    index = open_dataset(arguments.data)
    detector = open_detector(arguments.weights)
    settings = evaluation_settings(detector.weights, arguments.overrides)
    rows = _class_rows(detector, index, arguments)
    found = _detect(detector, index, rows, settings, arguments.precision, console)
    evaluate = evaluate_quickly if arguments.backend == "faster" else evaluate_detections
    result = evaluate(ground_truth(index), found)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_text(arguments.out / "evaluation.json", result.to_json())
        write_text(arguments.out / "detections.json", json.dumps(found))
    _show(result, console)


def _class_rows(detector: Detector, index: Index, arguments: argparse.Namespace) -> list[Category | None]:
    """What each class row of the detector is in the data: the class of the same name, None where there is none."""
    known, given = detector.weights.categories, index.categories
    if known == given:
        return list(given)
    by_name = {category.name.casefold(): category for category in given}
    rows = [by_name.get(category.name.casefold()) if category.name else None for category in known]
    found = {row.id for row in rows if row is not None}
    missing = [category.name for category in given if category.id not in found]
    if missing:
        raise DataError(
            f"{arguments.data} has {len(given)} classes, of which {arguments.weights} does not know {missing[:3]}: "
            "expected classes it was trained on; pack the data with the category names of the training data"
        )
    return rows


def _detect(
    detector: Detector,
    index: Index,
    rows: list[Category | None],
    settings: EvaluationConfig,
    precision: str,
    console: Console,
) -> list[dict]:
    preparation = detector.weights.preparation
    batches = evaluation_batches(
        index,
        short_side=settings.short_side,
        max_size=settings.max_size,
        microbatch=settings.microbatch,
        rank=0,
        world=1,
    )
    return detect_all(
        detector.model,
        _counted(batches, len(index), console),
        rows,
        mean=preparation.mean,
        std=preparation.std,
        detections=settings.detections,
        precision=precision,
    )


def _counted(batches: Iterator[Batch], images: int, console: Console) -> Iterator[Batch]:
    """The batches, with a line about every tenth of the images."""
    done = 0
    for batch in batches:
        yield batch
        before, done = done, done + len(batch.image_ids)
        if before * 10 // images != done * 10 // images:
            console.print(f"{done}/{images} images")


def _show(result: EvaluationResult, console: Console) -> None:
    table = Table("metric", "value")
    for name, value in result.metrics.items():
        table.add_row(name, number(value))
    console.print(table)
    classes = Table("class", "boxes", "AP", "AP50")
    for row in result.classes:
        classes.add_row(row.name, str(row.boxes), number(row.AP), number(row.AP50))
    console.print(classes)
