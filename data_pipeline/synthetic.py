"""A two-domain synthetic detection set, for demonstrations and tests of learning and transfer.

`objects` carries Objects365 names and ids, busy backgrounds, free rotation; `scenes` is the smaller, visually shifted
one (pale gradients, line clutter, washed-out blue colours, blur) with COCO names and ids. Every class of `scenes` has a
counterpart in `objects` under its Objects365 name. Boxes are the visible extent of an object.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from data_pipeline.categories import coco_categories, objects365_categories, objects365_name_of
from data_pipeline.synthetic_drawing import Look, Pixels, clouds, colour, gradient_with_clutter, mask, texture
from dino_scale.errors import UserError
from dino_scale.structures import Category

Domain = Literal["objects", "scenes"]
Preset = Literal["easy", "full"]
DOMAINS: tuple[Domain, ...] = ("objects", "scenes")

# COCO names; `objects` shows them under their Objects365 names. The easy preset takes the first six.
SHARED: dict[str, Look] = {
    "stop sign": Look("octagon", "rim", 0.00),
    "kite": Look("diamond", "cross", 0.85),
    "donut": Look("ring", "dots", 0.07),
    "clock": Look("disc", "hands", 0.50),
    "tv": Look("screen", "fade", 0.62),
    "umbrella": Look("umbrella", "stripes", 0.75),
    "banana": Look("crescent", "plain", 0.15),
    "pizza": Look("slice", "dots", 0.10),
    "book": Look("oblong", "lines", 0.35),
    "frisbee": Look("oval", "plain", 0.45),
}
# Objects365 names without a COCO counterpart. The easy preset takes the first eight.
OBJECTS_ONLY: dict[str, Look] = {
    "Flag": Look("oblong", "stripes", 0.98),
    "Target": Look("disc", "target", 0.02),
    "Traffic cone": Look("triangle", "stripes", 0.06),
    "Ladder": Look("screen", "lines", 0.12),
    "Poker Card": Look("oblong", "dots", 0.66),
    "CD": Look("ring", "fade", 0.55),
    "Tent": Look("triangle", "plain", 0.30),
    "Hammer": Look("tee", "plain", 0.58),
    "Balloon": Look("oval", "fade", 0.92),
    "Mirror": Look("oval", "rim", 0.52),
    "Cookies": Look("disc", "dots", 0.09),
    "Carpet": Look("oblong", "checks", 0.80),
    "Pie": Look("umbrella", "plain", 0.11),
    "Mask": Look("crescent", "checks", 0.70),
}


@dataclass(frozen=True)
class Style:
    """What sets a domain and preset apart. Lengths in pixels, angles in radians, the rest shares or probabilities."""

    objects: int  # most objects of an image
    smallest: int  # side of the smallest object
    background_contrast: float
    turn: float  # largest rotation to either side
    hue_spread: float  # standard deviation of the colour around its class's hue
    hue_shift: float
    saturation: float
    blur: float
    empty: float  # images without any object
    crowd: float  # images with a crowd region


STYLES: dict[tuple[Domain, Preset], Style] = {
    ("objects", "easy"): Style(4, 22, 0.35, 0.6, 0.06, 0.0, 0.9, 0.0, 0.02, 0.03),
    ("scenes", "easy"): Style(3, 22, 0.0, 0.4, 0.06, 0.06, 0.55, 0.6, 0.03, 0.10),
    ("objects", "full"): Style(8, 12, 1.0, math.pi, 0.12, 0.0, 0.9, 0.0, 0.02, 0.05),
    ("scenes", "full"): Style(5, 12, 0.0, 0.6, 0.12, 0.08, 0.5, 0.6, 0.03, 0.12),
}
SIZES = ((112, 80), (80, 112), (96, 96), (128, 72))  # width, height
VISIBLE_SHARE = 0.3  # an object of which less is visible has no box
VALIDATION_START = 1_000_000  # index of the first validation image: training never reaches it
CROWD_MEMBERS = 14
_PARTIAL = ".partial-"  # followed by the number of the process that writes


class SyntheticBox(NamedTuple):
    """One annotation. bbox: x, y, width, height in whole pixels. area: visible pixels."""

    name: str
    bbox: tuple[int, int, int, int]
    area: int
    crowd: bool


class Split(NamedTuple):
    """A folder of images and its annotation file, as `dino-scale pack` takes them."""

    annotations: Path
    images: Path


def looks(domain: Domain, preset: Preset = "easy") -> dict[str, Look]:
    """Class names of a domain, in its own spelling, with their looks."""
    shared = list(SHARED.items())[: 6 if preset == "easy" else None]
    if domain == "scenes":
        return dict(shared)
    others = list(OBJECTS_ONLY.items())[: 8 if preset == "easy" else None]
    return {objects365_name_of(name) or name: look for name, look in shared} | dict(others)


def synthetic_categories(domain: Domain, preset: Preset = "easy") -> tuple[Category, ...]:
    """The classes of a domain with their real raw ids (which have gaps), in order of id."""
    table = coco_categories() if domain == "scenes" else objects365_categories()
    wanted = looks(domain, preset)
    return tuple(category for category in table if category.name in wanted)


class _Canvas:
    """An image under construction and, for every pixel, the number of the object that is seen there."""

    def __init__(self, background: Pixels) -> None:
        self.pixels = background
        height, width = background.shape[0], background.shape[1]
        self.owner: NDArray[np.int16] = np.full((height, width), -1, dtype=np.int16)

    def paste(self, sprite: Pixels, opacity: Pixels, x: int, y: int, owner: int) -> int:
        """Lays a sprite with its top left corner at x, y; returns how many pixels it has, seen or not."""
        height, width = self.owner.shape
        side = opacity.shape[0]
        top, left, bottom, right = max(y, 0), max(x, 0), min(y + side, height), min(x + side, width)
        if top < bottom and left < right:
            part = opacity[top - y : bottom - y, left - x : right - x]
            share = part[..., None]
            under = self.pixels[top:bottom, left:right]
            self.pixels[top:bottom, left:right] = (
                under * (1 - share) + sprite[top - y : bottom - y, left - x : right - x] * share
            )
            self.owner[top:bottom, left:right][part > 0.5] = owner
        return int((opacity > 0.5).sum())

    def visible(self, owner: int) -> tuple[tuple[int, int, int, int], int]:
        """Box and number of the pixels that still show an object; the box of nothing is all zeros."""
        seen = self.owner == owner
        if not seen.any():
            return (0, 0, 0, 0), 0
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        top, left = int(rows[0]), int(columns[0])
        return (left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1), int(seen.sum())


def _sprite(look: Look, side: int, style: Style, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    rotation = float(rng.uniform(-style.turn, style.turn))
    hue = look.hue + style.hue_shift + float(rng.normal(0, style.hue_spread))
    saturation = style.saturation * float(rng.uniform(0.75, 1.1))
    value = float(rng.uniform(0.55, 1.0))
    main = colour(hue, saturation, value)
    accent = colour(hue + 0.5, 0.25 * saturation, 0.15 if value > 0.8 else 1.0)
    opacity = mask(look.shape, side, rotation, float(rng.uniform(0.8, 1.0)))
    return texture(look.texture, side, rotation, main, accent), opacity


def _paint_crowd(
    canvas: _Canvas, name: str, look: Look, style: Style, owner: int, rng: np.random.Generator
) -> SyntheticBox | None:
    height, width = canvas.owner.shape
    centre_x, centre_y = int(rng.integers(10, width - 45)), int(rng.integers(10, height - 35))
    for _ in range(CROWD_MEMBERS):
        pixels, opacity = _sprite(look, int(rng.integers(8, 13)), style, rng)
        canvas.paste(pixels, opacity, centre_x + int(rng.integers(0, 32)), centre_y + int(rng.integers(0, 20)), owner)
    bbox, area = canvas.visible(owner)
    return SyntheticBox(name, bbox, area, True) if area else None


def _background(domain: Domain, style: Style, rng: np.random.Generator) -> Pixels:
    width, height = SIZES[int(rng.integers(len(SIZES)))]
    if domain == "objects":
        return clouds(width, height, style.background_contrast, rng)
    return gradient_with_clutter(width, height, rng)


def _paint_objects(
    canvas: _Canvas, classes: dict[str, Look], style: Style, rng: np.random.Generator
) -> list[tuple[str, int]]:
    """Paints objects over one another; returns each one's class and full size in pixels, by owner number."""
    height, width = canvas.owner.shape
    names = list(classes)
    painted = []
    for owner in range(int(rng.integers(1, style.objects + 1))):
        name = names[int(rng.integers(len(names)))]
        side = int(math.exp(rng.uniform(math.log(style.smallest), math.log(0.75 * min(width, height)))))
        pixels, opacity = _sprite(classes[name], side, style, rng)
        x = int(rng.integers(-side // 4, width - 3 * side // 4))
        y = int(rng.integers(-side // 4, height - 3 * side // 4))
        painted.append((name, canvas.paste(pixels, opacity, x, y, owner)))
    return painted


def render(
    domain: Domain, seed: int, index: int, preset: Preset = "easy"
) -> tuple[NDArray[np.uint8], list[SyntheticBox]]:
    """Image number `index`: (H, W, 3) uint8 with sides of 72 to 128 px, and its boxes. A pure function."""
    key = np.array([seed, 2 * index + (domain == "scenes")], dtype=np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    style, classes = STYLES[domain, preset], looks(domain, preset)
    canvas = _Canvas(_background(domain, style, rng).copy())
    boxes: list[SyntheticBox] = []
    painted: list[tuple[str, int]] = []
    crowd_owner = style.objects + 1
    if rng.random() >= style.empty:
        if rng.random() < style.crowd:
            name = list(classes)[int(rng.integers(len(classes)))]
            crowd = _paint_crowd(canvas, name, classes[name], style, crowd_owner, rng)
            boxes += [crowd] if crowd else []
        painted = _paint_objects(canvas, classes, style, rng)
    for owner, (name, full) in enumerate(painted):
        bbox, area = canvas.visible(owner)
        if area >= max(12, VISIBLE_SHARE * full):
            boxes.append(SyntheticBox(name, bbox, area, False))
    return _develop(canvas.pixels, style, rng), boxes


def _develop(pixels: Pixels, style: Style, rng: np.random.Generator) -> NDArray[np.uint8]:
    if style.blur:
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(style.blur)), dtype=np.float32)
    noise = 6 * rng.standard_normal(pixels.shape, dtype=np.float32)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


def write_synthetic(
    folder: Path, domain: Domain, seed: int, train: int, validation: int, preset: Preset = "easy"
) -> dict[str, Split]:
    """Writes folder/{train,validation}/images/*.jpg and folder/{train,validation}.json in COCO format.

    Returns the two splits by name. Raises UserError where the folder exists; a write that fails leaves nothing.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: exists already; expected a new folder: give another path or remove it first")
    partial = folder.with_name(f"{folder.name}{_PARTIAL}{os.getpid()}")
    try:
        _write_split(partial, "train", domain, seed, range(train), preset)
        validation_indices = range(VALIDATION_START, VALIDATION_START + validation)
        _write_split(partial, "validation", domain, seed, validation_indices, preset)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return written_splits(folder)


def written_splits(folder: Path) -> dict[str, Split]:
    """By name, the splits of a folder that `write_synthetic` has written."""
    return {name: Split(folder / f"{name}.json", folder / name / "images") for name in ("train", "validation")}


def remove_leftovers(parent: Path) -> None:
    """Delete what killed calls of `write_synthetic` were writing in `parent`. Only for who has it for himself."""
    for leftover in parent.glob(f"*{_PARTIAL}*"):
        shutil.rmtree(leftover)


def _write_split(folder: Path, split: str, domain: Domain, seed: int, indices: Iterable[int], preset: Preset) -> None:
    categories = synthetic_categories(domain, preset)
    id_of = {category.name: category.id for category in categories}
    image_folder = folder / split / "images"
    image_folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in indices:
        pixels, boxes = render(domain, seed, index, preset)
        image_id, file_name = 3 * index + 7, f"{index:07d}.jpg"  # ids are no positions, as in real sets
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
        (image_folder / file_name).write_bytes(buffer.getvalue())
        images.append({"id": image_id, "file_name": file_name, "width": pixels.shape[1], "height": pixels.shape[0]})
        for box in boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": id_of[box.name],
                    "bbox": list(box.bbox),
                    "area": box.area,
                    "iscrowd": int(box.crowd),
                }
            )
    content = {
        "categories": [{"id": category.id, "name": category.name} for category in categories],
        "images": images,
        "annotations": annotations,
    }
    (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
