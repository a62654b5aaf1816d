"""Image bytes to RGB pixels, and back: libjpeg-turbo for JPEG, Pillow for everything else.

EXIF orientation is never applied: COCO and Objects365 boxes refer to the pixels as stored.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dino_scale.errors import DataError

RGBImage = NDArray[np.uint8]
MAX_PIXELS = 100_000_000  # the largest photograph of both sets has 0.1 of it; more is a decompression bomb
JPEG_QUALITY = 95  # of images that have to be re-encoded


@dataclass(frozen=True)
class ImageHeader:
    """What an image says about itself before it is decoded. plain_jpeg: a grey or RGB JPEG, stored as it is."""

    width: int
    height: int
    plain_jpeg: bool


def read_header(data: bytes) -> ImageHeader:
    """Size and kind, without decoding. Raises DataError (message without a file name) where there is no image."""
    width, height, plain_jpeg = _jpeg_header(data) or (*_pillow_size(data), False)
    if width * height > MAX_PIXELS:
        raise DataError(f"claims {width} x {height} pixels; expected at most {MAX_PIXELS}: shrink the image")
    return ImageHeader(width, height, plain_jpeg)


def _jpeg_header(data: bytes) -> tuple[int, int, bool] | None:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a chroma subsampling that it does not know
        return None  # not a JPEG that libjpeg-turbo can open; Pillow decides
    return width, height, colours in ("Gray", "YCbCr", "RGB")


def _pillow_size(data: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Image.DecompressionBombError:
        raise DataError(f"claims too many pixels; expected at most {MAX_PIXELS}: shrink the image") from None
    except Exception as error:  # Pillow raises almost anything on hostile bytes
        raise DataError(f"is no readable image ({_one_line(error)}): replace or remove it") from None


def decode(data: bytes, size: tuple[int, int] | None = None) -> RGBImage:
    """(H, W, 3) uint8 RGB. Raises DataError (message without a file name) where the bytes do not decode in full.

    size: the (H, W) that it must be; an image that claims another one is refused before a pixel is decoded.
    """
    header = read_header(data)
    if size is not None and (header.height, header.width) != size:
        raise DataError(f"is {header.width} x {header.height} pixels, not as indexed")
    if header.plain_jpeg:
        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            pass  # Pillow's decoder forgives harmless oddities and names real damage
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _to_rgb(image)
    except Exception as error:  # Pillow raises almost anything on hostile bytes
        raise DataError(f"does not decode ({_one_line(error)}): replace or remove it") from None


def _to_rgb(image: Image.Image) -> RGBImage:
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)  # 16 bits per pixel
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


def encode_jpeg(image: RGBImage) -> bytes:
    """JPEG of (H, W, 3) uint8 RGB pixels at JPEG_QUALITY, without chroma subsampling."""
    pixels = np.ascontiguousarray(image)
    return simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")


def load_image_file(path: Path) -> RGBImage:
    """(H, W, 3) uint8 RGB of any image file. Raises DataError naming the file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    try:
        return decode(data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def as_tensor(image: RGBImage) -> torch.Tensor:
    """(3, H, W) uint8 view of (H, W, 3) pixels."""
    return torch.from_numpy(image).permute(2, 0, 1)


def _one_line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow's own words name a Python object
        return "of no known image format"
    return " ".join(str(error).split()) or type(error).__name__
