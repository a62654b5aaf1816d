"""Shapes, textures and backgrounds of the synthetic detection set: each object is a shape filled with a texture."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Shape = Literal[
    "octagon", "diamond", "ring", "disc", "crescent", "slice", "screen", "umbrella", "oblong", "oval", "triangle", "tee"
]
Texture = Literal["plain", "stripes", "checks", "dots", "target", "rim", "cross", "hands", "lines", "fade"]
Pixels = NDArray[np.float32]
Layer = NDArray[Any]
Point = tuple[float, float]

SUPERSAMPLING = 2


@dataclass(frozen=True)
class Look:
    """How a class looks. hue: typical colour on the wheel, in [0, 1)."""

    shape: Shape
    texture: Texture
    hue: float


def _arc(start: float, stop: float, points: int, radius: float = 1.0, centre: Point = (0.0, 0.0)) -> list[Point]:
    angles = np.linspace(start, stop, points)
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _outlines(shape: Shape) -> list[tuple[list[Point], int]]:
    """Polygons in the unit square [-1, 1]^2, y down, each with the opacity (0..255) it is painted with."""
    circle = _arc(0, 2 * math.pi, 40)
    match shape:
        case "octagon":
            return [(_arc(math.pi / 8, math.pi / 8 + 2 * math.pi, 9), 255)]
        case "diamond":
            return [([(0, -1), (0.68, -0.15), (0, 1), (-0.68, -0.15)], 255)]
        case "ring":
            return [(circle, 255), (_arc(0, 2 * math.pi, 30, 0.4), 0)]
        case "disc":
            return [(circle, 255)]
        case "crescent":
            return [(circle, 255), (_arc(0, 2 * math.pi, 40, 0.95, (0.3, -0.5)), 0)]
        case "slice":
            return [([(0, 0.95), *_arc(-2.1, -1.04, 12, 1.75, (0, 0.8))], 255)]
        case "screen":
            frame = [(-0.95, -0.75), (0.95, -0.75), (0.95, 0.5), (-0.95, 0.5)]
            return [(frame, 255), ([(-0.15, 0.5), (0.15, 0.5), (0.15, 0.8), (-0.15, 0.8)], 255),
                    ([(-0.5, 0.8), (0.5, 0.8), (0.5, 0.95), (-0.5, 0.95)], 255)]  # fmt: skip
        case "umbrella":
            return [(_arc(math.pi, 2 * math.pi, 24, 1.0, (0, 0.15)), 255),
                    ([(-0.07, 0.1), (0.07, 0.1), (0.07, 0.98), (-0.07, 0.98)], 255)]  # fmt: skip
        case "oblong":
            return [([(-0.95, -0.62), (0.95, -0.62), (0.95, 0.62), (-0.95, 0.62)], 255)]
        case "oval":
            return [([(x, 0.6 * y) for x, y in circle], 255)]
        case "triangle":
            return [([(0, -1), (0.85, 0.8), (-0.85, 0.8)], 255)]
        case "tee":
            head = [(-0.9, -0.9), (0.9, -0.9), (0.9, -0.4), (-0.9, -0.4)]
            return [(head, 255), ([(-0.2, -0.5), (0.2, -0.5), (0.2, 0.95), (-0.2, 0.95)], 255)]


def mask(shape: Shape, side: int, rotation: float, squeeze: float) -> Pixels:
    """(side, side) opacity in [0, 1]. rotation in radians; squeeze: height relative to width, at most 1."""
    large = side * SUPERSAMPLING
    image = Image.new("L", (large, large), 0)
    draw = ImageDraw.Draw(image)
    cosine, sine = math.cos(rotation), math.sin(rotation)
    half = large / 2 - 1
    for points, opacity in _outlines(shape):
        turned = [
            (half * (1 + x * cosine - y * squeeze * sine), half * (1 + x * sine + y * squeeze * cosine))
            for x, y in points
        ]
        draw.polygon(turned, fill=opacity)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / np.float32(255)


def texture(kind: Texture, side: int, rotation: float, main: Pixels, accent: Pixels) -> Pixels:
    """(side, side, 3) colours in [0, 255]: `main`, with `accent` where the texture is on."""
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    x, y = axis[None, :], axis[:, None]
    u, v = x * math.cos(rotation) + y * math.sin(rotation), y * math.cos(rotation) - x * math.sin(rotation)
    radius = np.hypot(x, y)
    on: Layer
    match kind:
        case "plain":
            on = np.zeros((side, side), dtype=np.float32)
        case "stripes":
            on = np.sin(u * 9) > 0
        case "checks":
            on = np.sin(u * 9) * np.sin(v * 9) > 0
        case "dots":
            on = np.sin(u * 8) + np.sin(v * 8) > 0.9
        case "target":
            on = np.sin(radius * 14) > 0
        case "rim":
            on = (radius > 0.66) & (radius < 0.82) | (np.abs(v) < 0.16) & (radius < 0.5)
        case "cross":
            on = np.minimum(np.abs(u), np.abs(v)) < 0.12
        case "hands":
            on = (np.abs(u) < 0.1) & (v < 0) | (np.abs(v) < 0.1) & (u > 0) & (u < 0.6) | (radius > 0.82)
        case "lines":
            on = np.sin(v * 13) > 0.4
        case "fade":
            on = np.clip((u + 1) / 2, 0, 1)
    share = np.asarray(on, dtype=np.float32)[..., None]
    return main * (1 - share) + accent * share


def colour(hue: float, saturation: float, value: float) -> Pixels:
    """(3,) RGB in [0, 255]."""
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, min(saturation, 1.0), min(value, 1.0)), dtype=np.float32) * 255


def clouds(width: int, height: int, contrast: float, rng: np.random.Generator) -> Pixels:
    """(height, width, 3) smooth coloured noise around mid grey."""
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells, weight in ((4, 0.5), (9, 0.25), (24, 0.25)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += weight * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return 118 + (total - 118) * contrast


def gradient_with_clutter(width: int, height: int, rng: np.random.Generator) -> Pixels:
    """(height, width, 3) vertical gradient between two pale colours, crossed by thin lines."""
    top, bottom = rng.uniform(70, 230, (2, 3)).astype(np.float32)
    share = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    image = Image.fromarray(np.broadcast_to(top * (1 - share) + bottom * share, (height, width, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 8))):
        x0, x1 = rng.integers(0, width, 2).tolist()
        y0, y1 = rng.integers(0, height, 2).tolist()
        red, green, blue = rng.integers(30, 230, 3).tolist()
        draw.line([(x0, y0), (x1, y1)], fill=(red, green, blue), width=int(rng.integers(1, 3)))
    return np.asarray(image, dtype=np.float32)
