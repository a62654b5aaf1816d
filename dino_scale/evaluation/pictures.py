"""Example pictures of the report: ground truth on the left, detections on the right, as inline JPEG."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

from dino_scale.errors import DinoScaleError
from dino_scale.evaluation.drawing import Colour, LabelledBox, draw_boxes
from dino_scale.evaluation.result import XYWH, Example, FoundBox, TruthBox

ImageOf = Callable[[str, int], np.ndarray]

_SIDE = 360  # pixels of the longer side of a panel
_QUALITY = 80  # JPEG; about 30 kB a panel

_FOUND: Colour = (66, 133, 244)
_MISSED: Colour = (225, 60, 160)
_CORRECT: Colour = (40, 180, 99)
_FALSE: Colour = (255, 140, 0)
_IGNORED: Colour = (160, 160, 160)
_OUTCOMES: Mapping[str, Colour] = {"correct": _CORRECT, "false": _FALSE, "ignored": _IGNORED}


def picture_legend() -> str:
    """What the colours of all pictures mean."""
    meanings = (
        ("Ground truth, found", _FOUND),
        ("Ground truth, missed (dashed)", _MISSED),
        ("Detection, correct", _CORRECT),
        ("Detection, false", _FALSE),
        ("Crowd, or a detection on it: not counted", _IGNORED),
    )
    items = "".join(
        f'<li><span class="swatch" style="background:rgb{colour}"></span>{escape(text)}</li>'
        for text, colour in meanings
    )
    return f'<ul class="legend">{items}</ul>'


def gallery(stage: str, examples: Sequence[Example], names: Mapping[int, str], image_of: ImageOf) -> str:
    """One figure per example; a picture that cannot be read is replaced by the reason."""
    figures = "".join(_figure(stage, example, names, image_of) for example in examples)
    return f'<div class="gallery">{figures}</div>'


def _figure(stage: str, example: Example, names: Mapping[int, str], image_of: ImageOf) -> str:
    missed = sum(not box.found and not box.crowd for box in example.truth)
    false = sum(box.outcome == "false" for box in example.detections)
    caption = (
        f"<b>Image {example.image_id}</b> F1 {example.f1:.2f} · {_count(len(example.truth), 'box', 'boxes')}, "
        f"{missed} missed, {_count(false, 'false detection', 'false detections')}"
    )
    try:
        image = image_of(stage, example.image_id)
    except DinoScaleError as error:
        return f'<figure><p class="missing">{escape(str(error))}</p><figcaption>{caption}</figcaption></figure>'
    truth = draw_boxes(image, [_truth_box(box, names) for box in example.truth], _SIDE, _SIDE)
    found = draw_boxes(image, [_found_box(box, names) for box in example.detections], _SIDE, _SIDE)
    panels = _panel(truth, f"Image {example.image_id}, ground truth") + _panel(
        found, f"Image {example.image_id}, detections"
    )
    return f'<figure><div class="pair">{panels}</div><figcaption>{caption}</figcaption></figure>'


def _panel(image: np.ndarray, description: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(
        buffer, format="JPEG", quality=_QUALITY, subsampling=0
    )  # thin coloured lines stay crisp
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    height, width = image.shape[:2]
    return f'<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" alt="{escape(description)}">'


def _truth_box(box: TruthBox, names: Mapping[int, str]) -> LabelledBox:
    name = names.get(box.category_id, str(box.category_id))
    if box.crowd:
        return LabelledBox(_corners(box.bbox), f"{name} (crowd)", _IGNORED, dashed=True)
    return LabelledBox(_corners(box.bbox), name, _FOUND if box.found else _MISSED, dashed=not box.found)


def _found_box(box: FoundBox, names: Mapping[int, str]) -> LabelledBox:
    name = names.get(box.category_id, str(box.category_id))
    return LabelledBox(_corners(box.bbox), f"{name} {box.score:.2f}", _OUTCOMES.get(box.outcome, _IGNORED))


def _corners(box: XYWH) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x, y, x + width, y + height


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
