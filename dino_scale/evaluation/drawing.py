"""Boxes with labels on pictures, for the report and `dino-scale predict`.

Pictures are (H, W, 3) uint8 RGB arrays; boxes are x1, y1, x2, y2 in pixels of the picture that is handed in.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dino_scale.structures import Category, Detections

Colour = tuple[int, int, int]

_LONGEST_LABEL = 32  # characters; names come from annotation files and may have any length
_SHARE_OF_FONT = 26  # the font is the longest side divided by this
_SMALLEST_FONT, _LARGEST_FONT = 11, 40  # pixels
_HALO: Colour = (20, 20, 20)


@dataclass(frozen=True)
class LabelledBox:
    """One box to draw; `dashed` for what was not found."""

    box: tuple[float, float, float, float]
    label: str
    colour: Colour
    dashed: bool = False


def draw_boxes(
    image: np.ndarray, boxes: Sequence[LabelledBox], smallest: int = 0, largest: int | None = None
) -> np.ndarray:
    """A copy of `image` with `boxes` on it, the first one on top.

    smallest, largest: bounds in pixels for the longest side of the result; the picture is scaled to fit before
    anything is drawn, so lines and letters keep their size on tiny pictures.
    """
    picture = Image.fromarray(np.ascontiguousarray(image)).convert("RGB")
    scale = _scale(max(picture.size), smallest, largest)
    if scale != 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    font_size = min(_LARGEST_FONT, max(_SMALLEST_FONT, max(picture.size) // _SHARE_OF_FONT))
    font = ImageFont.load_default(font_size)
    width = max(2, round(font_size / 5))
    scaled = [(_inside(box.box, scale, picture.size), box) for box in boxes]
    for corners, box in reversed(scaled):
        _draw_outline(draw, corners, box, width)
    for corners, box in reversed(scaled):  # labels after all outlines: a line must not cross a name
        _draw_label(draw, corners, box, font, picture.size)
    return np.asarray(picture)


def detection_boxes(detections: Detections, categories: Sequence[Category], smallest_score: float) -> list[LabelledBox]:
    """The detections with at least `smallest_score`, labelled "name 0.87", one colour per class, best first; none of
    a nameless class."""
    return [
        LabelledBox((x1, y1, x2, y2), f"{categories[label].name} {score:.2f}", class_colour(label))
        for score, label, (x1, y1, x2, y2) in zip(
            detections.scores.tolist(), detections.labels.tolist(), detections.boxes.tolist(), strict=True
        )
        if score >= smallest_score and categories[label].name
    ]


def class_colour(number: int) -> Colour:
    """A bright colour for contiguous class `number`; neighbours differ in hue by the golden angle."""
    hue = number * 0.61803398875 % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, 0.55, 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)


def _scale(longest: int, smallest: int, largest: int | None) -> float:
    wanted = max(longest, smallest)
    if largest is not None:
        wanted = min(wanted, largest)
    return wanted / longest


def _inside(
    box: tuple[float, float, float, float], scale: float, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The scaled box with its corners in order and inside the picture (Pillow refuses reversed corners)."""
    x1, y1, x2, y2 = (value * scale for value in box)
    left, right = sorted((min(max(x1, 0), size[0] - 1), min(max(x2, 0), size[0] - 1)))
    top, bottom = sorted((min(max(y1, 0), size[1] - 1), min(max(y2, 0), size[1] - 1)))
    return left, top, right, bottom


def _draw_outline(
    draw: ImageDraw.ImageDraw, corners: tuple[float, float, float, float], box: LabelledBox, width: int
) -> None:
    left, top, right, bottom = corners
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=_HALO, width=width + 2)  # seen on any background
    if not box.dashed:
        draw.rectangle(corners, outline=box.colour, width=width)
        return
    for start, end in (
        ((left, top), (right, top)),
        ((right, top), (right, bottom)),
        ((right, bottom), (left, bottom)),
        ((left, bottom), (left, top)),
    ):
        _draw_dashes(draw, start, end, box.colour, width)


def _draw_dashes(
    draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], colour: Colour, width: int
) -> None:
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
    pieces = max(1, round(length / (7 * width)))  # a dash and a gap of three and a half line widths each
    for piece in range(pieces):
        begin, stop = piece / pieces, (piece + 0.5) / pieces
        points = [tuple(a + (b - a) * share for a, b in zip(start, end, strict=True)) for share in (begin, stop)]
        draw.line([(points[0][0], points[0][1]), (points[1][0], points[1][1])], fill=colour, width=width)


def _draw_label(
    draw: ImageDraw.ImageDraw,
    corners: tuple[float, float, float, float],
    box: LabelledBox,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    text = _printable(box.label)
    if not text:
        return
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0.0, min(corners[0], size[0] - width))
    above = corners[1] - height
    y = above if above >= 0 else min(corners[1], size[1] - height)
    draw.rectangle((x, y, x + width, y + height), fill=box.colour)
    draw.text((x + 2 - left, y + 2 - top), text, fill=_readable_on(box.colour), font=font)


def _printable(label: str) -> str:
    """One line of at most 32 characters: annotation files may name a class anything."""
    text = "".join(character if character.isprintable() else " " for character in label).strip()
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


def _readable_on(colour: Colour) -> Colour:
    red, green, blue = colour
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    return (0, 0, 0) if bright else (255, 255, 255)
