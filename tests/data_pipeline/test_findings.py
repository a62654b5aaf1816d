"""Every repair is listed, every defect is counted: `pack` keeps the list, `doctor` goes on to the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.doctor import check_shards, examine
from data_pipeline.findings import EXAMPLES
from data_pipeline.index import Index
from data_pipeline.manifest import read_manifest
from data_pipeline.pack import pack
from dino_scale.errors import DataError
from launch.cli import main

REPEATED = EXAMPLES + 5


@pytest.fixture
def worn(raw: Any) -> Any:
    """25 boxes that stick out, one image to be encoded anew, one of another size than stated, one class of areas."""
    box = {"image_id": 5, "category_id": 3, "area": 4}
    raw.content["annotations"] += [{"id": 100 + row, "bbox": [15, row / 4, 9, 2], **box} for row in range(REPEATED)]
    raw.content["annotations"].append({"id": 200, "bbox": [1, 1, 4, 2], **box, "area": None})
    raw.content["images"][0].update(width=10, height=20)
    Image.fromarray(np.zeros((10, 20, 3), dtype=np.uint8)).save(raw.images / "c.jpg", "PNG")
    raw.write()
    return raw


def spoil(raw: Any) -> None:
    """Three defects of three kinds, found at three places: in the file, among the boxes, behind a header."""
    raw.content["annotations"][0]["bbox"] = [1, 2, float("nan"), 4]
    raw.content["annotations"].append({"id": 300, "image_id": 9, "category_id": 3, "bbox": [50, 1, 4, 2], "area": 8})
    path = raw.images / "a.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    raw.write()


def listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "repairs.jsonl").read_text().splitlines()]


def test_every_repair_is_listed_while_the_report_keeps_the_first(worn: Any) -> None:
    pack(worn.annotations, [worn.images], worn.out)
    rows = listed(worn.out)
    clipped = [row for row in rows if row["kind"] == "boxes_clipped"]
    assert [(row["file"], row["owner"], row["id"]) for row in clipped] == [
        ("b.jpg", "annotation", 100 + row) for row in range(REPEATED)
    ]
    assert clipped[24]["what"] == "bbox [15.0, 6.0, 9.0, 2.0]"
    others = [(row["kind"], row["file"], row["owner"], row["id"]) for row in rows if row["kind"] != "boxes_clipped"]
    assert others == [
        ("areas_from_boxes", "b.jpg", "annotation", 200),
        ("sizes_from_file", "a.jpg", "image", 11),
        ("images_reencoded_as_jpeg", "c.jpg", "image", 9),
    ]
    report = json.loads((worn.out / "report.json").read_text())["repairs"]
    assert {kind: repair["count"] for kind, repair in report.items()} == {
        "boxes_clipped": REPEATED, "areas_from_boxes": 1, "sizes_from_file": 1, "images_reencoded_as_jpeg": 1,
    }  # fmt: skip
    assert len(report["boxes_clipped"]["first"]) == EXAMPLES
    assert examine(worn.annotations, [worn.images]).report["repairs"] == report


def test_the_list_is_the_same_after_an_interruption_and_for_any_number_of_processes(worn: Any) -> None:
    class Stop(Exception):
        pass

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "writing shards" and done == 2:
            raise Stop

    pack(worn.annotations, [worn.images], worn.out, samples_per_shard=1)
    again = worn.out.with_name("again")
    with pytest.raises(Stop):
        pack(worn.annotations, [worn.images], again, samples_per_shard=1, progress=stop)
    pack(worn.annotations, [worn.images], again, samples_per_shard=1, workers=2)
    assert (again / "repairs.jsonl").read_bytes() == (worn.out / "repairs.jsonl").read_bytes()
    assert Index.open(again).digest == Index.open(worn.out).digest


def test_a_shortened_list_is_found_out(worn: Any) -> None:
    pack(worn.annotations, [worn.images], worn.out)
    assert [entry.name for entry in read_manifest(worn.out).reports] == ["repairs.jsonl", "report.json"]
    path = worn.out / "repairs.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"repairs\.jsonl: has .* bytes, the manifest says"):
        check_shards(worn.out)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_doctor_lists_all_defects_and_repairs_and_then_fails(
    worn: Any, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    spoil(worn)
    command = ["doctor", "--annotations", str(worn.annotations), "--images", str(worn.images), "--workers", workers]
    assert main(command) == 3
    told = capsys.readouterr()
    assert f"boxes_clipped: {REPEATED}" in told.out
    for kind, place in {
        "boxes_unusable": "annotation 1 of image 11: bbox is [1, 2, nan, 4]",
        "boxes_outside": "annotation 300 of image 9: bbox is [50.0, 1.0, 4.0, 2.0], outside",
        "images_unreadable": "a.jpg: image 11 does not decode",
    }.items():
        assert f"defect: {kind}: 1\n    " in told.out and place in told.out
    assert "3 defects of 3 kinds" in told.err and "Traceback" not in told.err and "\n" not in told.err.strip()
    assert worn.leftovers() == []


def test_what_hangs_on_a_refused_image_or_class_is_no_further_defect(raw: Any) -> None:
    raw.content["images"][0]["width"] = -1
    raw.content["categories"][1]["name"] = ""
    raw.content["annotations"].append({"id": 8, "image_id": 5, "category_id": 7, "bbox": [1, 1, 4, 2], "area": 8})
    raw.write()
    found = examine(raw.annotations, [raw.images])
    assert found.defects.counts == {"images_of_unusable_size": 1, "categories_of_unusable_name": 1}
    assert (found.samples, found.boxes, found.categories) == (2, 1, 1)


def test_a_file_that_cannot_be_read_on_is_the_last_defect(raw: Any) -> None:
    raw.content["annotations"][0]["bbox"] = None
    raw.write()
    raw.annotations.write_text(raw.annotations.read_text().replace('"id": 4', '"id": 4, "id": 5'))
    found = examine(raw.annotations, [raw.images])
    assert found.defects.counts == {"boxes_unusable": 1, "cannot_go_on": 1} and found.samples == 0
    assert "key 'id' occurs twice" in found.defects.examples["cannot_go_on"][0]


def test_unreadable_images_that_are_left_out_are_listed_without_paths_of_this_machine(raw: Any) -> None:
    spoil(raw)
    raw.content["annotations"] = raw.content["annotations"][1:3]
    raw.content["annotations"][1]["image_id"] = 5
    (raw.images / "b.jpg").write_bytes(b"none")
    raw.content["images"].append({"id": 12, "file_name": "nowhere.jpg", "width": 4, "height": 4})
    raw.content["annotations"].append({"id": 9, "image_id": 9, "category_id": 3, "bbox": [1, 1, 4, 2], "area": 8})
    raw.write()
    command = ["pack", "--annotations", str(raw.annotations), "--images", str(raw.images), "--skip-unreadable"]
    assert main([*command, "--out", str(raw.out), "--workers", "1"]) == 0
    rows = listed(raw.out)
    assert {row["kind"] for row in rows} == {"images_unreadable_skipped"}
    assert [row["id"] for row in rows] == [5, 12, 11] and rows[1]["what"] == "is missing"
    assert str(raw.root) not in (raw.out / "repairs.jsonl").read_text()
