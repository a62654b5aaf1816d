import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.index import Index, ground_truth
from data_pipeline.manifest import MANIFEST
from data_pipeline.reader import Reader, read_image
from data_pipeline.synthetic import Split
from dino_scale.errors import DataError
from dino_scale.structures import Category


def test_ground_truth_equals_the_annotation_file(raw_scenes: dict[str, Split], scenes: Index) -> None:
    original = json.loads(raw_scenes["train"].annotations.read_text())
    truth = ground_truth(scenes)
    for key in ("images", "annotations", "categories"):
        assert sorted(truth[key], key=lambda row: row["id"]) == sorted(original[key], key=lambda row: row["id"])
    assert any(row["iscrowd"] for row in truth["annotations"])
    with_boxes = {row["image_id"] for row in truth["annotations"]}
    assert any(row["id"] not in with_boxes for row in truth["images"])


def test_fractions_survive_exactly(raw) -> None:
    box = [1 / 3, 0.1, 5.123456789012345, 2 / 7]
    raw.content["annotations"][0]["bbox"] = box
    rows = {row["id"]: row for row in ground_truth(raw.pack())["annotations"]}
    assert rows[1]["bbox"] == box and rows[1]["area"] == 12.5


def test_contiguous_ids_follow_the_raw_ids(raw) -> None:
    index = raw.pack()
    assert index.categories == (Category(3, "dog"), Category(7, "cat"))
    truth = index.boxes(index.sample_of(11))
    assert truth.labels.tolist() == [1, 0]
    assert index.boxes(index.sample_of(9)).crowd.tolist() == [True]
    assert len(index.boxes(index.sample_of(5)).labels) == 0
    assert index.file_name(index.sample_of(5)) == "b.jpg"


def test_images_come_back_pixel_for_pixel(raw_scenes: dict[str, Split], scenes: Index) -> None:
    for sample in range(0, len(scenes), 7):
        with Image.open(raw_scenes["train"].images / scenes.file_name(sample)) as image:
            assert np.array_equal(read_image(scenes, scenes.image_id(sample)), np.asarray(image))


def test_an_unknown_image_id_is_named(scenes: Index) -> None:
    with pytest.raises(DataError, match="image id 123456 is not in this dataset"):
        read_image(scenes, 123456)


def test_pickles_as_its_folder(scenes: Index) -> None:
    text = pickle.dumps(Reader(scenes))
    assert len(text) < 1000
    reader = pickle.loads(text)
    assert np.array_equal(reader.image(3), Reader(scenes).image(3))


def test_reader_keeps_few_shards_open(scenes: Index, monkeypatch) -> None:
    monkeypatch.setattr("data_pipeline.reader.OPEN_SHARDS", 2)
    reader, fresh = Reader(scenes), Reader(scenes)
    for sample in np.random.default_rng(0).permutation(len(scenes)).tolist():
        assert reader.image_bytes(sample) == fresh.image_bytes(sample)
        assert len(reader._descriptors) <= 2


@pytest.fixture
def copy(packed_scenes: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed_scenes, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_sound_folder_verifies(copy: Path) -> None:
    Index.open(copy).verify()


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read .*dino-scale pack"):
        Index.open(tmp_path / "nowhere")


def test_missing_shard(copy: Path) -> None:
    (copy / "shard-00002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00002\.tar: is missing"):
        Index.open(copy)


def test_shard_of_another_size(copy: Path) -> None:
    with open(copy / "shard-00001.tar", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"shard-00001\.tar: has \d+ bytes, the manifest says \d+"):
        Index.open(copy)


def test_missing_column(copy: Path) -> None:
    (copy / "index" / "labels.npy").unlink()
    with pytest.raises(DataError, match=r"labels\.npy: is missing"):
        Index.open(copy)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content.update(samples=60), "its digest is"),
        (lambda content: content["categories"].reverse(), "its digest is"),
        (lambda content: content["shards"][0].update(name="../shard-00000.tar"), "is malformed .*not one that packing"),
        (lambda content: content["columns"][0].update(name="/etc/passwd"), "is malformed .*not one that packing"),
        (lambda content: content.pop("shards"), "is malformed .*shards"),
        (lambda content: content.update(version=99), "not a manifest of version 2"),
    ],
)  # fmt: skip
def test_altered_manifest(copy: Path, change, problem: str) -> None:
    content = json.loads((copy / MANIFEST).read_text())
    change(content)
    (copy / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(DataError, match=problem):
        Index.open(copy)


def test_torn_manifest(copy: Path) -> None:
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"manifest\.json: is not valid JSON"):
        Index.open(copy)


def alter(path: Path, change) -> None:
    column = np.load(path)
    change(column)
    np.save(path, column)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shards", lambda column: column.fill(4)),
        ("image_offsets", lambda column: column.fill(10**9)),
        ("image_sizes", lambda column: column.fill(-1)),
        ("box_offsets", lambda column: column.fill(2)),
        ("labels", lambda column: column.fill(6)),
    ],
)
def test_columns_that_lead_astray_are_refused(copy: Path, name: str, change) -> None:
    alter(copy / "index" / f"{name}.npy", change)
    with pytest.raises(DataError, match=r"\.npy: .*dino-scale pack"):
        Index.open(copy)


def test_a_pickled_column_is_never_loaded(copy: Path) -> None:
    path = copy / "index" / "labels.npy"
    size = path.stat().st_size
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
    with pytest.raises(DataError, match=r"labels\.npy: is not a readable column"):
        Index.open(copy)


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def test_verify_finds_a_flipped_byte_in_any_file(copy: Path) -> None:
    for entry in ("shard-00003.tar", "index/areas.npy"):
        shutil.copy(copy / entry, copy / "spare")
        flip_byte(copy / entry, -600)
        with pytest.raises(DataError, match=f"{entry}: its SHA-256 is"):
            Index.open(copy).verify()
        shutil.move(copy / "spare", copy / entry)


def test_a_damaged_sample_is_named(copy: Path) -> None:
    index = Index.open(copy)
    shard, start = int(index.columns["shards"][20]), int(index.columns["image_offsets"][20])
    name = index.shard_names[shard]
    flip_byte(copy / name, start + 700)
    with pytest.raises(DataError, match=rf"{name}: member {index.key(20)}\.jpg does not match its checksum"):
        Reader(index).image(20)
    with open(copy / name, "r+b") as file:
        file.truncate(start + 100)
    with pytest.raises(DataError, match=rf"member {index.key(20)}\.jpg ends after 100 of \d+ bytes"):
        Reader(index).image(20)
    (copy / name).unlink()
    with pytest.raises(DataError, match=rf"member {index.key(20)}\.jpg cannot be read \(No such file"):
        Reader(index).image(20)
