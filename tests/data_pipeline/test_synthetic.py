import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.categories import coco_categories, objects365_categories, objects365_name_of
from data_pipeline.synthetic import DOMAINS, SHARED, Preset, looks, render, synthetic_categories, write_synthetic
from dino_scale.errors import UserError


@pytest.mark.parametrize("preset", ["easy", "full"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_an_image_is_a_pure_function_of_its_number(domain, preset: Preset) -> None:
    seen = []
    for index in range(20):
        pixels, boxes = render(domain, 1, index, preset)
        again, boxes_again = render(domain, 1, index, preset)
        assert np.array_equal(pixels, again) and boxes == boxes_again
        seen.append(pixels.tobytes())
    assert len(set(seen)) == 20
    assert not np.array_equal(render(domain, 1, 0, preset)[0], render(domain, 2, 0, preset)[0])


@pytest.mark.parametrize("preset", ["easy", "full"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_boxes_lie_inside_and_the_promised_cases_occur(domain, preset: Preset) -> None:
    names, counts, sides, crowds = set(), [], [], 0
    for index in range(150):
        pixels, boxes = render(domain, 0, index, preset)
        height, width = pixels.shape[:2]
        assert min(height, width) >= 72 and max(height, width) <= 128
        counts.append(len(boxes))
        for box in boxes:
            x, y, w, h = box.bbox
            assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= width and y + h <= height
            assert 0 < box.area <= w * h
            crowds += box.crowd
            sides.append(max(w, h))
            names.add(box.name)
    assert min(counts) == 0 and max(counts) >= 3
    assert crowds > 0
    assert max(sides) > 3 * min(sides)
    assert names == set(looks(domain, preset))


def test_a_box_is_tight_around_what_it_shows() -> None:
    """A lone object stands out from the calm background; what stands out ends, typically, where the box ends."""
    gaps = []
    for index in range(300):
        pixels, boxes = render("objects", 5, index)
        if len(boxes) != 1 or boxes[0].crowd:
            continue
        x, y, w, h = boxes[0].bbox
        outstanding = np.abs(pixels.astype(float) - np.median(pixels, axis=(0, 1))).max(axis=2) > 75
        top, left = max(y - 8, 0), max(x - 8, 0)
        near = outstanding[top : y + h + 8, left : x + w + 8]
        rows, columns = np.flatnonzero(near.any(axis=1)) + top, np.flatnonzero(near.any(axis=0)) + left
        if len(rows):
            gaps.append([columns[0] - x, rows[0] - y, columns[-1] + 1 - (x + w), rows[-1] + 1 - (y + h)])
    assert len(gaps) > 30
    assert (np.abs(np.median(gaps, axis=0)) <= 1).all(), np.median(gaps, axis=0)


def test_classes_of_the_easy_preset() -> None:
    scenes, objects = synthetic_categories("scenes"), synthetic_categories("objects")
    assert (len(scenes), len(objects)) == (6, 14)
    assert set(scenes) <= set(coco_categories()) and set(objects) <= set(objects365_categories())
    names = {category.name for category in objects}
    assert all(objects365_name_of(category.name) in names for category in scenes)
    assert any(objects365_name_of(name).lower() != name for name in looks("scenes"))
    assert len(SHARED) == 10
    for categories in (scenes, objects):
        ids = [category.id for category in categories]
        assert ids == sorted(ids) and ids != list(range(ids[0], ids[0] + len(ids)))


def test_written_folders_hold_what_was_rendered(tmp_path: Path) -> None:
    splits = write_synthetic(tmp_path / "set", "scenes", seed=4, train=12, validation=5)
    for name, count in (("train", 12), ("validation", 5)):
        content = json.loads(splits[name].annotations.read_text())
        assert len(content["images"]) == count
        assert len(list(splits[name].images.iterdir())) == count
        for image in content["images"]:
            with Image.open(splits[name].images / image["file_name"]) as file:
                assert file.size == (image["width"], image["height"])
    first, boxes = render("scenes", 4, 0)
    with Image.open(splits["train"].images / "0000000.jpg") as file:
        assert np.abs(np.asarray(file).astype(int) - first).mean() < 8
    content = json.loads(splits["train"].annotations.read_text())
    image_id = content["images"][0]["id"]
    stored = [tuple(row["bbox"]) for row in content["annotations"] if row["image_id"] == image_id]
    assert stored == [box.bbox for box in boxes]


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        write_synthetic(tmp_path, "objects", seed=0, train=1, validation=1)
