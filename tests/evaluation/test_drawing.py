"""Boxes on pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dino_scale.evaluation.drawing import LabelledBox, class_colour, detection_boxes, draw_boxes
from dino_scale.structures import Category, Detections

RED = (255, 0, 0)


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, dtype=np.uint8)


def is_red(image: np.ndarray) -> np.ndarray:
    return (image == RED).all(axis=-1)


def test_outline_lies_on_the_box_and_the_input_is_untouched() -> None:
    image = grey(200, 300)
    drawn = draw_boxes(image, [LabelledBox((50, 60, 150, 160), "", RED)])
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert (image == 128).all()
    rows, columns = np.nonzero(is_red(drawn))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (60, 160, 50, 150)
    assert not is_red(drawn)[80:140, 70:130].any()


def test_small_pictures_are_enlarged_with_their_boxes() -> None:
    drawn = draw_boxes(grey(40, 80), [LabelledBox((20, 10, 60, 30), "", RED)], smallest=400)
    assert drawn.shape == (200, 400, 3)
    rows, columns = np.nonzero(is_red(drawn))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (50, 150, 100, 300)


def test_large_pictures_are_reduced_on_request_only() -> None:
    assert draw_boxes(grey(1000, 500), [], largest=250).shape == (250, 125, 3)
    assert draw_boxes(grey(1000, 500), [], smallest=400).shape == (1000, 500, 3)


def test_a_dashed_outline_has_gaps() -> None:
    boxes = [LabelledBox((50, 60, 150, 160), "", RED, dashed=dashed) for dashed in (False, True)]
    full, dashed = (int(is_red(draw_boxes(grey(200, 300), [box])).sum()) for box in boxes)
    assert 0.3 * full < dashed < 0.7 * full


@pytest.mark.parametrize("box", [(-50, -50, 500, 500), (90, 90, 10, 10), (5, 5, 5, 5), (500, 500, 600, 600)])
@pytest.mark.parametrize("label", ["cat 0.5", "", "x" * 500, "line\nbreak\x00\u202e", "猫"])
def test_any_box_and_label_can_be_drawn(box: tuple[float, float, float, float], label: str) -> None:
    drawn = draw_boxes(grey(100, 100), [LabelledBox(box, label, RED)])
    assert drawn.shape == (100, 100, 3)
    assert is_red(drawn).any()


def test_the_first_box_is_on_top() -> None:
    box = (20.0, 20.0, 80.0, 80.0)
    drawn = draw_boxes(grey(100, 100), [LabelledBox(box, "", RED), LabelledBox(box, "", (0, 255, 0))])
    assert is_red(drawn).any()
    assert not (drawn == (0, 255, 0)).all(axis=-1).any()


def test_detections_are_labelled_with_name_and_score() -> None:
    found = Detections(
        scores=torch.tensor([0.876, 0.1]),
        labels=torch.tensor([1, 0]),
        boxes=torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 1.0]]),
    )
    boxes = detection_boxes(found, (Category(3, "three"), Category(90, "ninety")), smallest_score=0.3)
    assert boxes == [LabelledBox((1.0, 2.0, 3.0, 4.0), "ninety 0.88", class_colour(1))]


def test_classes_have_different_colours() -> None:
    assert len({class_colour(number) for number in range(80)}) == 80
