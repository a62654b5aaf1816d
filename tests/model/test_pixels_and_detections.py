"""The two ends of the detector: pixels to its input, predictions to detections; and box arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dino_scale.boxes import giou, inverse_sigmoid, to_centred, to_corners
from dino_scale.model.outputs import Outputs
from dino_scale.model.postprocess import detect
from dino_scale.model.preprocess import normalise
from dino_scale.structures import Batch
from tests.support.tiny_detector import targets

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
coordinate = st.floats(0.0, 1.0, width=32)
box = st.tuples(coordinate, coordinate, coordinate, coordinate)


def test_pixels_are_normalised_and_padding_is_zero() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = Batch(pixels, ((4, 6), (3, 2)), ((8, 12), (6, 4)), (0, 1), (10, 11), targets(0, 0))
    images, padding = normalise(batch, MEAN, STD)
    expected = (pixels.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(images[0].double(), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(images[1, :, :3, :2].double(), expected[1, :, :3, :2], rtol=0, atol=1e-5)
    assert images.dtype == torch.float32
    assert not padding[0].any() and padding[1].sum() == 4 * 6 - 3 * 2
    assert not images[1].masked_fill(~padding[1], 0).any()


def test_detections_are_the_best_pairs_in_pixels_of_the_original() -> None:
    logits = torch.tensor([[[2.0, -1.0], [0.0, 3.0], [-5.0, 1.0]]])[None]
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0], [0.9, 0.9, 0.4, 0.4]]])[None]
    (found,) = detect(Outputs(logits, boxes), [(100, 200)], detections=4)
    assert found.labels.tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0, 1.0, 0.0]).sigmoid())
    expected = torch.tensor(
        [[0.0, 0.0, 100.0, 100.0], [80.0, 30.0, 120.0, 70.0], [140.0, 70.0, 220.0, 110.0], [0.0, 0.0, 100.0, 100.0]]
    )
    torch.testing.assert_close(found.boxes, expected)


def test_fewer_pairs_than_asked_are_all_returned() -> None:
    (found,) = detect(Outputs(torch.zeros(1, 1, 3, 2), torch.full((1, 1, 3, 4), 0.5)), [(10, 10)], detections=300)
    assert len(found.scores) == 6


@given(box, box)
def test_giou_is_symmetric_and_bounded(first: tuple[float, ...], second: tuple[float, ...]) -> None:
    one, other = (to_corners(torch.tensor(values)) for values in (first, second))
    value = giou(one, other)
    assert -1.001 <= float(value) <= 1.001
    assert float(value) == pytest.approx(float(giou(other, one)), abs=1e-5)


@given(box)
def test_box_forms_are_inverse(values: tuple[float, ...]) -> None:
    centred = torch.tensor(values)
    torch.testing.assert_close(to_centred(to_corners(centred)), centred, rtol=0, atol=1e-6)


def test_giou_of_known_boxes() -> None:
    unit = torch.tensor([0.0, 0.0, 1.0, 1.0])
    others = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 1.5, 1.0], [3.0, 0.0, 4.0, 1.0]])
    torch.testing.assert_close(giou(unit, others), torch.tensor([1.0, 1 / 3, -0.5]), rtol=0, atol=1e-5)


@given(st.floats(0.0010001, 0.9989999))
def test_inverse_sigmoid_inverts(value: float) -> None:
    assert float(inverse_sigmoid(torch.tensor(value)).sigmoid()) == pytest.approx(value, abs=1e-5)
