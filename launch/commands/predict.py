"""`dino-scale predict`: boxes drawn on pictures, and the same boxes as a COCO-format file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image
from rich.console import Console

from data_pipeline.decode import load_image_file
from data_pipeline.transforms import resize_for_evaluation
from dino_scale.config.schema import EvaluationConfig
from dino_scale.errors import UserError
from dino_scale.evaluation.drawing import detection_boxes, draw_boxes
from dino_scale.predict import Prediction, predict, to_coco
from launch.detector import Detector, evaluation_settings, open_detector
from launch.run_folder import write_text

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def run(arguments: argparse.Namespace) -> None:
    console = Console(highlight=False, soft_wrap=True)
    pictures = find_pictures(arguments.pictures)
    _require_other_folder(arguments.pictures, arguments.out)
    detector = open_detector(arguments.weights)
    settings = evaluation_settings(detector.weights, arguments.overrides)
    arguments.out.mkdir(parents=True, exist_ok=True)
    predictions = []
    for path in pictures:
        prediction = _look_at(path, detector, settings, arguments.out, arguments.threshold)
        predictions.append(prediction)
        count = int((prediction.detections.scores >= arguments.threshold).sum())
        console.print(f"{path}: {count} object(s)")
    content = to_coco(predictions, detector.weights.categories, arguments.threshold)
    write_text(arguments.out / "predictions.json", json.dumps(content, indent=1) + "\n")
    console.print(f"{len(predictions)} picture(s) and predictions.json in {arguments.out}")


def find_pictures(path: Path) -> list[Path]:
    """The file itself, or the pictures directly in the folder, by name."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder")
    found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{path}: holds no picture: expected files ending in {', '.join(SUFFIXES)}")
    return found


def _require_other_folder(pictures: Path, out: Path) -> None:
    source = pictures if pictures.is_dir() else pictures.parent
    if source.resolve() == out.resolve():
        raise UserError(
            f"--out is {out}, where the pictures are: expected another folder, or they would be overwritten"
        )


def _look_at(path: Path, detector: Detector, settings: EvaluationConfig, out: Path, threshold: float) -> Prediction:
    preparation = detector.weights.preparation
    image = load_image_file(path)
    detections = predict(
        detector.model,
        image,
        resize=lambda pixels: resize_for_evaluation(pixels, settings.short_side, settings.max_size),
        mean=preparation.mean,
        std=preparation.std,
        detections=settings.detections,
    )
    boxes = detection_boxes(detections, detector.weights.categories, threshold)
    name = path.name if path.suffix.lower() in (".jpg", ".jpeg") else f"{path.name}.jpg"
    Image.fromarray(draw_boxes(image, boxes)).save(out / name, quality=92)
    return Prediction(path.name, image.shape[0], image.shape[1], detections)
