"""Prediction on one picture with a small random detector."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dino_scale.config.schema import BackboneConfig, DenoisingConfig, ModelConfig
from dino_scale.model.dino import Dino, build_model
from dino_scale.predict import Prediction, predict, to_coco
from dino_scale.structures import Category, Detections

CATEGORIES = (Category(3, "three"), Category(20, "twenty"), Category(90, "ninety"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def model() -> Dino:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=BackboneConfig(name="resnet18", outputs=(3, 4), frozen_stages=0),
        hidden=32,
        heads=4,
        levels=2,
        points=2,
        feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        queries=15,
        denoising=DenoisingConfig(queries=4),
        attention="reference",
    )
    return build_model(config, len(CATEGORIES))


def half_size(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image[::2, ::2].copy()).permute(2, 0, 1)


def run(model: Dino, image: np.ndarray) -> Detections:
    return predict(model, image, resize=half_size, mean=MEAN, std=STD, detections=9)


def test_detections_are_sorted_and_inside_the_picture(model: Dino) -> None:
    image = np.random.default_rng(0).integers(0, 256, (130, 190, 3), dtype=np.uint8)
    found = run(model.train(), image)
    assert found.scores.shape == (9,)
    assert found.boxes.shape == (9, 4)
    assert (found.scores.diff() <= 0).all()
    assert ((found.labels >= 0) & (found.labels < 3)).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes <= torch.tensor([190, 130, 190, 130])).all()
    assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
    assert not model.training


def test_prediction_depends_on_the_picture_and_nothing_else(model: Dino) -> None:
    generator = np.random.default_rng(1)
    first, second = (generator.integers(0, 256, (96, 128, 3), dtype=np.uint8) for _ in range(2))
    torch.testing.assert_close(run(model, first).scores, run(model, first).scores, rtol=0, atol=0)
    assert not torch.equal(run(model, first).boxes, run(model, second).boxes)


def test_predictions_as_coco() -> None:
    found = Detections(torch.tensor([0.9, 0.2]), torch.tensor([2, 0]), torch.tensor([[1.0, 2, 11, 22], [0, 0, 5, 5]]))
    nothing = Detections(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    pictures = [Prediction("a.jpg", 30, 40, nothing), Prediction("sub/b.jpg", 50, 60, found)]
    result = to_coco(pictures, CATEGORIES, smallest_score=0.5)
    assert result["images"] == [
        {"id": 1, "file_name": "a.jpg", "height": 30, "width": 40},
        {"id": 2, "file_name": "sub/b.jpg", "height": 50, "width": 60},
    ]
    assert [row["id"] for row in result["categories"]] == [3, 20, 90]
    (only,) = result["annotations"]
    assert only == {
        "id": 1,
        "image_id": 2,
        "category_id": 90,
        "bbox": [1.0, 2.0, 10.0, 20.0],
        "score": 0.9,
        "area": 200.0,
        "iscrowd": 0,
    }
    assert len(to_coco(pictures, CATEGORIES)["annotations"]) == 2
