import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import ImageHeader, decode, encode_jpeg, load_image_file, read_header
from dino_scale.errors import DataError

RAMP = np.add.outer(np.arange(30) * 4, np.arange(40) * 3).astype(np.uint8)
COLOURS = np.stack([RAMP, RAMP.T.reshape(30, 40), 255 - RAMP], axis=2)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 2}, {"restart_marker_rows": 1}]
)
def test_jpeg_equals_pillow(options: dict[str, object]) -> None:
    data = encoded(Image.fromarray(COLOURS), "JPEG", **options)
    assert read_header(data) == ImageHeader(40, 30, True)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(decode(data), np.asarray(image))


def test_grey_jpeg() -> None:
    data = encoded(Image.fromarray(RAMP), "JPEG", quality=95)
    assert read_header(data).plain_jpeg
    found = decode(data)
    assert found.shape == (30, 40, 3) and np.array_equal(found[..., 0], found[..., 2])
    assert np.abs(found[..., 0].astype(int) - RAMP).mean() < 2


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1"])
def test_png_of_any_mode(mode: str) -> None:
    image = Image.fromarray(COLOURS).convert(mode)
    data = encoded(image, "PNG")
    assert read_header(data) == ImageHeader(40, 30, False)
    assert np.array_equal(decode(data), np.asarray(image.convert("RGB")))


def test_sixteen_bit_png_keeps_its_brightness() -> None:
    data = encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG")
    assert np.array_equal(decode(data)[..., 1], RAMP)


def test_cmyk_jpeg() -> None:
    data = encoded(Image.fromarray(COLOURS).convert("CMYK"), "JPEG", quality=98)
    assert read_header(data) == ImageHeader(40, 30, False)
    assert np.abs(decode(data).astype(int) - COLOURS).mean() < 6


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    data = encoded(Image.fromarray(COLOURS), "JPEG", exif=exif)
    assert read_header(data) == ImageHeader(40, 30, True) and decode(data).shape == (30, 40, 3)


def test_encoding_keeps_the_pixels() -> None:
    assert np.abs(decode(encode_jpeg(COLOURS[:, ::-1])).astype(int) - COLOURS[:, ::-1]).max() < 20


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damage_anywhere_is_an_error_or_an_image_but_nothing_else(kind: str) -> None:
    data = encoded(Image.fromarray(COLOURS), kind)
    rng = np.random.default_rng(0)
    failures = 0
    for _ in range(300):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            broken[place] = rng.integers(256)
        try:
            assert decode(bytes(broken)).shape[2] == 3
        except DataError as error:
            failures += 1
            assert "\n" not in str(error)
    assert failures > 10
    for length in range(0, len(data) - 20, 37):
        with pytest.raises(DataError):
            decode(data[:length])


def test_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    with pytest.raises(DataError, match=r"x\.jpg: cannot be read \(No such file"):
        load_image_file(path)
    path.write_text("no image")
    with pytest.raises(DataError, match=r"x\.jpg: is no readable image"):
        load_image_file(path)
    path.write_bytes(encoded(Image.fromarray(COLOURS), "PNG"))
    assert np.array_equal(load_image_file(path), COLOURS)
