"""Every defect of an annotation file or image: one clear line, exit code 3 (2 for arguments), nothing written."""

import struct
import zlib
from collections.abc import Callable
from pathlib import PurePosixPath

import pytest

from data_pipeline.annotation_elements import MOST_CATEGORIES
from data_pipeline.annotations import MOST_BOXES
from data_pipeline.categories import objects365_categories
from data_pipeline.doctor import examine
from data_pipeline.pack import pack
from data_pipeline.survey import find_image
from dino_scale.errors import DataError, UserError

NAN, INFINITY = float("nan"), float("inf")


def replace_box(raw, value) -> None:
    raw.content["annotations"][0]["bbox"] = value


def set_image(raw, **fields) -> None:
    raw.content["images"][1].update(fields)


def set_annotation(raw, **fields) -> None:
    raw.content["annotations"][2].update(fields)


def drop(raw, key: str) -> None:
    del raw.content[key]


def put_boxes(raw, number: int) -> None:
    """On the last image, which has one box already."""
    row = {"image_id": 9, "category_id": 3, "bbox": [1, 1, 2, 2], "area": 4}
    raw.content["annotations"] += [{"id": 100 + place, **row} for place in range(number)]


def put_categories(raw, number: int) -> None:
    """Beside the two that are there."""
    raw.content["categories"] += [{"id": 100 + place, "name": f"class {place}"} for place in range(number)]


def put_png_bomb(raw, side: int) -> None:
    """A true PNG with true checksums, of some hundred bytes, that claims side x side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(60_001))) + chunk(b"IEND", b"")
    (raw.images / "b.jpg").write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def truncate_image(raw) -> None:
    path = raw.images / "b.jpg"
    path.write_bytes(path.read_bytes()[:-200])


DEFECTS: dict[str, tuple[Callable, list[str]]] = {
    "no images key": (lambda raw: drop(raw, "images"), ["instances.json", "'images' is missing"]),
    "no annotations key": (lambda raw: drop(raw, "annotations"), ["'annotations' is missing"]),
    "no categories key": (lambda raw: drop(raw, "categories"), ["'categories' is missing"]),
    "images is text": (lambda raw: raw.content.update(images="x"), ["'images' is 'x'", "expected a list"]),
    "an image is a number": (lambda raw: raw.content["images"].append(4), ["'images' holds 4", "expected objects"]),
    "no image": (lambda raw: raw.content.update(images=[], annotations=[]), ["'images' is empty"]),
    "no class": (lambda raw: raw.content.update(categories=[]), ["'categories' is empty"]),
    "no box": (lambda raw: raw.content.update(annotations=[]), ["no usable box"]),
    "image missing": (lambda raw: (raw.images / "b.jpg").unlink(), ["image 5 ('b.jpg') is missing in", "--images"]),
    "image is text": (lambda raw: (raw.images / "b.jpg").write_text("hello"), ["b.jpg: image 5 is no readable image"]),
    "image is empty": (lambda raw: (raw.images / "b.jpg").write_bytes(b""), ["b.jpg: image 5 is no readable image"]),
    "image is cut": (truncate_image, ["b.jpg: image 5 does not decode", "truncated", "remove"]),
    "image id twice": (lambda raw: set_image(raw, id=11), ["image id 11 occurs twice", "'a.jpg'", "'b.jpg'"]),
    "image id is text": (lambda raw: set_image(raw, id="5"), ["id is '5'", "whole number"]),
    "image id is missing": (lambda raw: raw.content["images"][1].pop("id"), ["image number 2 ", "id is missing"]),
    "image width is zero": (lambda raw: set_image(raw, width=0), ["image 5 ('b.jpg')", "width is 0"]),
    "image height is huge": (lambda raw: set_image(raw, height=10**12), ["height is 1000000000000"]),
    "file name leads out": (lambda raw: set_image(raw, file_name="../b.jpg"), ["image 5", "'../b.jpg'", "no '..'"]),
    "file name is absolute": (lambda raw: set_image(raw, file_name="/etc/passwd"), ["image 5", "'/etc/passwd'"]),
    "file name has a backslash": (lambda raw: set_image(raw, file_name="a\\b.jpg"), ["image 5", "no backslash"]),
    "file name is half a letter": (lambda raw: set_image(raw, file_name="b\ud800.jpg"), ["image 5", "'b\\ud800.jpg'"]),
    "file name talks to the terminal": (lambda raw: set_image(raw, file_name="\x1b[2Jb.jpg"), ["image 5", "\\x1b[2Jb"]),
    "category name in two lines": (lambda raw: raw.content["categories"].append({"id": 4, "name": "a\nb"}),
                                   ["category 4: name is 'a\\nb'", "control characters"]),
    "file name is missing": (lambda raw: raw.content["images"][1].pop("file_name"), ["image 5", "name is missing"]),
    "category id twice": (lambda raw: raw.content["categories"].append({"id": 3, "name": "cow"}),
                          ["category id 3 occurs twice", "'dog'", "'cow'"]),
    "category name twice": (lambda raw: raw.content["categories"].append({"id": 4, "name": "dog"}), ["'dog' occurs"]),
    "category without name": (lambda raw: raw.content["categories"].append({"id": 4}), ["category 4", "is missing"]),
    "unknown category": (lambda raw: set_annotation(raw, category_id=77), ["annotation 4", "category_id is 77"]),
    "unknown image": (lambda raw: set_annotation(raw, image_id=77), ["annotation 4", "image_id is 77", "unknown"]),
    "category is a fraction": (lambda raw: set_annotation(raw, category_id=3.0), ["category_id is 3.0"]),
    "category is huge": (lambda raw: set_annotation(raw, category_id=10**40), ["annotation 4", "category_id is 1000"]),
    "crowd is text": (lambda raw: set_annotation(raw, iscrowd="yes"), ["annotation 4", "iscrowd is 'yes'", "0 or 1"]),
    "box with NaN": (lambda raw: replace_box(raw, [1, NAN, 2, 2]), ["annotation 1 of image 11", "nan", "finite"]),
    "box with infinity": (lambda raw: replace_box(raw, [1, 2, INFINITY, 2]), ["annotation 1 of image 11", "inf"]),
    "box of text": (lambda raw: replace_box(raw, [1, 2, "3", 2]), ["annotation 1", "'3'", "four finite numbers"]),
    "box of booleans": (lambda raw: replace_box(raw, [1, 2, True, 2]), ["annotation 1", "True"]),
    "box of three": (lambda raw: replace_box(raw, [1, 2, 3]), ["annotation 1", "[1, 2, 3]"]),
    "box is missing": (lambda raw: replace_box(raw, None), ["annotation 1", "bbox is missing"]),
    "box with a huge number": (lambda raw: replace_box(raw, [1, 2, 10**400, 2]), ["bbox is [1, 2, 1000"]),
    "box of negative width": (lambda raw: replace_box(raw, [5, 2, -3, 2]), ["annotation 1", "-3", "0 or more"]),
    "box to the right": (lambda raw: replace_box(raw, [20, 2, 3, 2]), ["annotation 1 of", "outside", "20 x 10"]),
    "box to the left": (lambda raw: replace_box(raw, [-4, 2, 4, 2]), ["annotation 1 of image 11", "outside"]),
    "too many boxes": (lambda raw: put_boxes(raw, MOST_BOXES),
                       [f"image 9 ('c.jpg') has {MOST_BOXES + 1} boxes", f"at most {MOST_BOXES} of", "cut the image"]),
    "too many categories": (lambda raw: put_categories(raw, MOST_CATEGORIES - 1),
                            [f"category {98 + MOST_CATEGORIES} (", f"more than {MOST_CATEGORIES}", "merge or remove"]),
    "file name of 5000": (lambda raw: set_image(raw, file_name="x" * 5000), ["image 5", "xxx...", "255 bytes"]),
    "file name of 256": (lambda raw: set_image(raw, file_name="a/" + "\u00e9" * 128), ["image 5", "255 bytes"]),
    "file name of many parts": (lambda raw: set_image(raw, file_name="a/" * 2000 + "b"), ["image 5", "2048 in all"]),
    "file name is a point": (lambda raw: set_image(raw, file_name="."), ["image 5: file_name is '.'", "below"]),
    "file name is a folder": (lambda raw: set_image(raw, file_name="./"), ["image 5: file_name is './'"]),
    "image width is negative": (lambda raw: set_image(raw, width=-20), ["image 5 ('b.jpg')", "width is -20"]),
    "image width is NaN": (lambda raw: set_image(raw, width=NAN), ["image 5 ('b.jpg')", "width is nan"]),
    "category id is text": (lambda raw: raw.content["categories"].append({"id": "4", "name": "cow"}),
                            ["category number 3 of the list: id is '4'", "whole number"]),
    "annotation id is text": (lambda raw: set_annotation(raw, id="4"), ["annotation number 3 of the list: id is '4'"]),
    "category of a box is text": (lambda raw: set_annotation(raw, category_id="3"), ["4: category_id is '3'"]),
    "PNG bomb": (lambda raw: put_png_bomb(raw, 12_000), ["b.jpg: image 5 claims 12000 x 12000 pixels", "shrink"]),
    "large PNG bomb": (lambda raw: put_png_bomb(raw, 20_000), ["b.jpg: image 5 claims too many pixels", "shrink"]),
    "box below": (lambda raw: replace_box(raw, [2, 11, 4, 2]), ["annotation 1 of image 11", "outside"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", DEFECTS)
def test_defect(raw, name: str) -> None:
    spoil, expected = DEFECTS[name]
    spoil(raw)
    with pytest.raises(DataError) as caught:
        raw.pack()
    message = str(caught.value)
    assert all(part in message for part in expected), message
    assert "\n" not in message and len(message) < 500
    assert str(raw.root) in message, "names the file"
    assert caught.value.exit_code == 3
    assert raw.leftovers() == []
    found = examine(raw.annotations, [raw.images])
    told = [place for places in found.defects.examples.values() for place in places]
    assert any(all(part in place for part in expected) for place in told), "doctor says so too, and does not stop there"
    assert sum(found.defects.counts.values()) == len(told) < 4 and raw.leftovers() == []


def test_as_many_boxes_and_categories_as_are_allowed(raw) -> None:
    put_boxes(raw, MOST_BOXES - 1)
    put_categories(raw, MOST_CATEGORIES - 2)
    index = raw.pack()
    assert len(index.boxes(index.sample_of(9)).labels) == MOST_BOXES and len(index.categories) == MOST_CATEGORIES


@pytest.mark.parametrize("area", [NAN, INFINITY, -4.0, "4", True, None, [4], 10**400])
def test_an_unusable_area_is_mended_and_told(raw, area: object) -> None:
    set_annotation(raw, area=area)
    index = raw.pack()
    assert "areas_from_boxes" in (index.folder / "report.json").read_text()
    assert index.boxes(index.sample_of(11)).areas.tolist() == [12.5, 4.0]


def test_a_folder_that_cannot_be_searched_is_one_line(raw) -> None:
    """Here one whose name makes an allowed name too long."""
    deep = raw.images / ("d" * 200)
    while len(str(deep)) < 3000:
        deep = deep / ("d" * 200)
    with pytest.raises(DataError, match=r"cannot be looked for \(File name too long\)") as caught:
        find_image(PurePosixPath("x/" * 600 + "b.jpg"), [deep])
    assert len(str(caught.value)) < 4000 and "\n" not in str(caught.value)


def test_missing_annotation_file(raw) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read \(No such file"):
        pack(raw.root / "nowhere.json", [raw.images], raw.out)
    assert raw.leftovers() == []


def test_annotation_file_that_is_no_json(raw) -> None:
    raw.annotations.write_text("id,box\n1,2\n")
    with pytest.raises(DataError, match="not valid JSON"):
        raw.pack()
    assert raw.leftovers() == []


@pytest.mark.parametrize(
    ("once", "twice"),
    [
        ('"bbox": [1, 2, 5, 4]', '"bbox": [1, 2, 5, 4], "bbox": [0, 0, 9, 9]'),
        ('"file_name": "b.jpg"', '"file_name": "b.jpg", "file_name": "../../secret"'),
        ('"name": "cat"', '"name": "cat", "name": "cat"'),
        ('"iscrowd": 1', '"iscrowd": 1, "segmentation": {"counts": [], "counts": []}'),
    ],
)
def test_a_key_twice_in_one_object(raw, once: str, twice: str) -> None:
    """Two readers would see two different datasets in such a file."""
    raw.write()
    text = raw.annotations.read_text()
    assert once in text
    raw.annotations.write_text(text.replace(once, twice))
    with pytest.raises(DataError, match=r"instances\.json: .* occurs twice within the element .*keep one") as caught:
        raw.pack()
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    assert raw.leftovers() == []


@pytest.mark.parametrize("format", ["coco", "objects365"])
def test_a_tiny_file_that_claims_a_gigantic_image_is_not_decoded(raw, format: str) -> None:
    bomb = bytearray((raw.images / "b.jpg").read_bytes())
    place = bomb.index(b"\xff\xc0") + 5
    bomb[place : place + 4] = b"\xff\xf0\xff\xf0"  # 65520 x 65520
    (raw.images / "b.jpg").write_bytes(bomb)
    raw.content["categories"] = objects365_rows(7, 3)
    with pytest.raises(DataError, match="image 5 claims"):
        raw.pack(format=format)
    assert raw.leftovers() == []


def objects365_rows(*ids: int) -> list[dict[str, object]]:
    return [{"id": category.id, "name": category.name} for category in objects365_categories() if category.id in ids]


def test_other_classes_under_the_objects365_format_are_refused(raw) -> None:
    with pytest.raises(DataError, match=r"category 3 is 'dog', in Objects365 v2 it is .*--format coco"):
        raw.pack(format="objects365")
    assert raw.leftovers() == []


def test_an_existing_target_is_refused_and_left_alone(raw) -> None:
    raw.pack()
    before = raw.leftovers()
    with pytest.raises(UserError, match="exists already") as caught:
        raw.pack()
    assert caught.value.exit_code == 2
    assert raw.leftovers() == before


def test_bad_arguments(raw) -> None:
    raw.write()
    with pytest.raises(UserError, match="no image folder"):
        pack(raw.annotations, [], raw.out)
    with pytest.raises(UserError, match="nowhere: is no folder"):
        pack(raw.annotations, [raw.root / "nowhere"], raw.out)
    with pytest.raises(UserError, match="samples per shard is 0"):
        pack(raw.annotations, [raw.images], raw.out, samples_per_shard=0)
    assert raw.leftovers() == []


def test_an_interrupt_before_the_first_shard_leaves_nothing(raw) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "reading headers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        raw.pack(progress=interrupt)
    assert raw.leftovers() == []
