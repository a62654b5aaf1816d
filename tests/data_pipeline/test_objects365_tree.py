"""The generated Objects365-like tree, with every known defect planted once, through pack and doctor."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.categories import objects365_categories
from data_pipeline.doctor import check_shards, examine
from data_pipeline.index import Index
from data_pipeline.manifest import describe_file, read_manifest
from data_pipeline.pack import pack
from data_pipeline.packing_plan import Selection
from data_pipeline.reader import read_image
from dino_scale.errors import DataError
from launch.cli import main
from tests.support.objects365_tree import EXPECTED, SIZE, Tree, pixels


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_every_defect_is_repaired_and_counted(tree: Tree) -> None:
    report = pack(out=tree.root / "shards", samples_per_shard=4, workers=2, **tree.arguments())
    assert report.repairs == EXPECTED
    index = check_shards(tree.root / "shards")
    assert len(index) == 9 + 2 and sorted(index.columns["image_ids"].tolist())[-2:] == [905, 906]
    assert index.categories == objects365_categories()
    for image in range(1, 10):
        shown = read_image(index, image)
        assert shown.shape == (SIZE[1], SIZE[0], 3)
        expected = pixels(image).astype(int)
        if image in (6, 9):  # grey
            expected = (
                expected[..., :1] if image == 9 else np.asarray(Image.fromarray(pixels(6)).convert("L"))[..., None]
            )
        assert np.abs(shown - expected).mean() < 12, f"image {image}: the pixels as stored, not turned"


def test_flags_reach_the_json_member_and_the_index(tree: Tree) -> None:
    pack(out=tree.root / "shards", **tree.arguments())
    index = Index.open(tree.root / "shards")
    sample = index.sample_of(6)
    start, stop = index.columns["box_offsets"][sample : sample + 2]
    assert sorted(index.columns["flags"][start:stop].tolist()) == [0, 1, 2, 4]


def test_the_held_out_images_are_the_first_of_the_validation_file(tree: Tree) -> None:
    validation = tree.root / "val/zhiyuan_objv2_val.json"
    pack(validation, [tree.root / "val"], tree.root / "held", "objects365", selection=Selection(first=5))
    assert sorted(Index.open(tree.root / "held").columns["image_ids"].tolist()) == [900, 901, 902, 903, 904]


def test_doctor_tells_what_pack_writes_and_writes_nothing(tree: Tree) -> None:
    before = sorted(tree.root.rglob("*"))
    found = examine(**tree.arguments(), samples_per_shard=4)
    assert sorted(tree.root.rglob("*")) == before
    report = pack(out=tree.root / "shards", samples_per_shard=4, **tree.arguments())
    assert found.report == json.loads((tree.root / "shards/report.json").read_text())
    assert (found.samples, found.boxes, found.shards) == (report.samples, report.boxes, report.shards)


def test_unreadable_images_are_errors_or_skipped_and_counted(tree: Tree) -> None:
    cut = tree.root / "train/patch0" / tree.name(1, 1)
    cut.write_bytes(cut.read_bytes()[:-300])
    (tree.root / "train/patch0" / tree.name(4, 1)).unlink()
    arguments = tree.arguments()
    with pytest.raises(DataError, match=r"image 4 .* is missing"):
        pack(out=tree.root / "shards", **arguments)
    arguments["selection"] = Selection(skip_unreadable=True)
    found = examine(**arguments, samples_per_shard=4)
    report = pack(out=tree.root / "shards", samples_per_shard=4, workers=2, **arguments)
    assert report.repairs["images_unreadable_skipped"] == 2 and report.samples == found.samples == 7
    assert report.boxes == found.boxes and found.report["repairs"]["images_unreadable_skipped"]["count"] == 2
    assert {1, 4}.isdisjoint(check_shards(tree.root / "shards").columns["image_ids"].tolist())


def test_joining_files_that_do_not_fit(tree: Tree) -> None:
    arguments = tree.arguments()
    arguments["selection"] = Selection(also=arguments["annotations"])
    with pytest.raises(DataError, match=r"image id 1 is in .* too"):
        pack(out=tree.root / "shards", **arguments)


@pytest.mark.parametrize("place", ["shard", "column", "swapped"])
def test_doctor_finds_altered_shards(tree: Tree, place: str) -> None:
    shards = tree.root / "shards"
    pack(out=shards, samples_per_shard=4, **tree.arguments())
    path = shards / ("index/boxes.npy" if place == "column" else "shard-00001.tar")
    data = bytearray(path.read_bytes())
    data[-8 if place == "column" else 600] ^= 1
    path.write_bytes(data)
    if place == "swapped":  # altered, with a manifest that was made to agree
        manifest = read_manifest(shards)
        entries = tuple(describe_file(shards, entry.name) for entry in manifest.shards)
        replace(manifest, shards=entries).write(shards)
    with pytest.raises(DataError, match="SHA-256" if place != "swapped" else "is not what the index says"):
        check_shards(shards)


def test_doctor_refuses_members_that_packing_does_not_make(tree: Tree) -> None:
    """Even where the manifest was made to agree."""
    shards = tree.root / "shards"
    pack(out=shards, samples_per_shard=4, **tree.arguments())
    with tarfile.open(shards / "shard-00000.tar", "a") as tar:
        link = tarfile.TarInfo("../../escape.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    manifest = read_manifest(shards)
    entries = tuple(describe_file(shards, entry.name) for entry in manifest.shards)
    replace(manifest, shards=entries).write(shards)
    with pytest.raises(DataError, match=r"holds '\.\./\.\./escape\.jpg' where the index expects its end"):
        check_shards(shards)


def test_commands(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    raw = [
        "--format", "objects365", "--annotations", str(tree.root / "train/zhiyuan_objv2_train.json"),
        "--images", str(tree.root / "train"), "--images2", str(tree.root / "val"),
        "--also", str(tree.root / "val/zhiyuan_objv2_val.json"), "--also-after", "5", "--workers", "1",
    ]  # fmt: skip
    assert main(["doctor", *raw]) == 0
    told = capsys.readouterr().out
    assert "pack would write 11 images" in told and "images_known_missing_skipped: 3" in told
    assert main(["pack", *raw, "--out", str(tree.root / "shards")]) == 0
    assert main(["doctor", str(tree.root / "shards")]) == 0
    assert "11 images" in capsys.readouterr().out
    for option in ("--workers=2", "--address=auto", "--format=objects365", "--first=3", "--skip-unreadable"):
        assert main(["doctor", str(tree.root / "shards"), option]) == 2
        assert f"doctor: {option.partition('=')[0]} is about a raw folder" in capsys.readouterr().err
    assert main(["doctor"]) == 2 and main(["doctor", str(tree.root / "shards"), *raw]) == 2
    (tree.root / "shards/shard-00000.tar").unlink()
    assert main(["doctor", str(tree.root / "shards")]) == 3
