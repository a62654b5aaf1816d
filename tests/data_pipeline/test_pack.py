import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline import survey
from data_pipeline.doctor import examine
from data_pipeline.index import Index, ground_truth
from data_pipeline.pack import pack
from data_pipeline.reader import read_image
from data_pipeline.synthetic import Split
from data_pipeline.tasks import ordered_map
from dino_scale.errors import UserError, WorkerLostError


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_packing_twice_gives_the_same_bytes(raw_scenes: dict[str, Split], packed_scenes: Path, tmp_path: Path) -> None:
    split = raw_scenes["train"]
    pack(split.annotations, [split.images], tmp_path / "again", "coco", samples_per_shard=16)
    assert digests(tmp_path / "again") == digests(packed_scenes)
    pack(split.annotations, [split.images], tmp_path / "other", "coco", samples_per_shard=16, seed=1)
    assert digests(tmp_path / "other").keys() == digests(packed_scenes).keys()
    assert Index.open(tmp_path / "other").digest != Index.open(packed_scenes).digest


def test_shards_are_ordinary_tar_files_of_adjacent_pairs(scenes: Index) -> None:
    keys = []
    for name in scenes.shard_names:
        with tarfile.open(scenes.folder / name) as shard:
            members = shard.getmembers()
        assert 0 < len(members) <= 32 and all(member.mtime == 0 for member in members)
        for image, text in zip(members[::2], members[1::2], strict=True):
            assert image.name.removesuffix(".jpg") == text.name.removesuffix(".json")
            keys.append(text.name.removesuffix(".json"))
    assert keys == [scenes.key(sample) for sample in range(len(scenes))]
    assert len(scenes.shard_names) == 4 and len(set(keys)) == 61


@pytest.mark.parametrize("together", [1, 2, 100])
def test_repeated_boxes_of_coco_are_counted_and_kept(raw: Any, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(survey, "_SORTED_TOGETHER", together)
    first = raw.content["annotations"][0]
    same = [{**first, "id": 40}, {**first, "id": 41, "area": 1}]
    other = [
        {**first, "id": 42, "iscrowd": 1},
        {**first, "id": 43, "category_id": 3},
        {**first, "id": 44, "image_id": 5},
    ]
    raw.content["annotations"] += same + other
    raw.write()
    found = examine(raw.annotations, [raw.images])
    report = pack(raw.annotations, [raw.images], raw.out)
    assert report.repairs == {"boxes_repeated_kept": 2} and report.boxes == found.boxes == 8
    places = found.report["repairs"]["boxes_repeated_kept"]["first"]
    assert [place.rpartition(": bbox")[0] for place in places] == ["a.jpg: annotation 40", "a.jpg: annotation 41"]


MEMORY = """
import resource, sys
from pathlib import Path
from data_pipeline.annotations import read_annotations
from data_pipeline.findings import Findings
from data_pipeline.survey import fit_boxes
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = most()
found = fit_boxes(read_annotations(Path(sys.argv[1]), "coco", Findings()), Findings())
print((most() - before) / len(found.boxes))
"""


def test_boxes_never_become_python_objects(tmp_path: Path) -> None:
    """As dictionaries 300,000 boxes would take some 750 bytes each, and 25 million of them 19 GB."""
    with open(tmp_path / "large.json", "w") as file:
        file.write('{"categories": [{"id": 1, "name": "a"}], "images": [')
        image = '{{"id": {0}, "file_name": "{0}.jpg", "width": 640, "height": 480}}'
        file.write(", ".join(image.format(number) for number in range(20_000)))
        file.write('], "annotations": [')
        box = (
            '{{"id": {}, "image_id": {}, "category_id": 1, "bbox": [1.5, {}, 20.25, 30], "area": 600.5, "iscrowd": 0}}'
        )
        file.write(", ".join(box.format(number + 1, number // 15, number % 400) for number in range(300_000)))
        file.write("]}")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "large.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert float(done.stdout) < 375


def test_plain_webdataset_reads_the_shards(scenes: Index) -> None:
    reading = (
        "import sys, webdataset as wds\n"
        "samples = wds.WebDataset(sys.argv[1:], shardshuffle=False).decode('rgb8')\n"
        "for key, image, text in samples.to_tuple('__key__', 'jpg', 'json'):\n"
        "    print(key, *image.shape, text['image_id'], len(text['boxes']))\n"
    )
    shards = [str(scenes.folder / name) for name in scenes.shard_names]
    environment = {key: value for key, value in os.environ.items() if key != "WDS_SECURE"}  # it forbids local files
    command = [sys.executable, "-c", reading, *shards]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    expected = [
        f"{scenes.key(sample)} {scenes.size(sample)[0]} {scenes.size(sample)[1]} 3 "
        f"{scenes.image_id(sample)} {len(scenes.boxes(sample).labels)}"
        for sample in range(len(scenes))
    ]
    assert output.splitlines() == expected


def test_the_json_member_holds_the_annotations_with_raw_ids(raw) -> None:
    index = raw.pack()
    with tarfile.open(index.folder / "shard-00000.tar") as shard:
        file = shard.extractfile("000000000011.json")
        assert file is not None
        content = json.load(file)
    assert content == {
        "image_id": 11,
        "file_name": "a.jpg",
        "width": 20,
        "height": 10,
        "annotation_ids": [1, 4],
        "category_ids": [7, 3],
        "boxes": [[1, 2, 5, 4], [3, 3, 2, 2]],
        "areas": [12.5, 4],
        "iscrowd": [0, 0],
        "isfake": [0, 0],
        "isreflected": [0, 0],
    }


def test_samples_are_shuffled_over_the_whole_dataset(scenes: Index) -> None:
    ids = [scenes.image_id(sample) for sample in range(len(scenes))]
    assert ids != sorted(ids)
    assert np.abs(np.corrcoef(ids, np.arange(len(ids)))[0, 1]) < 0.4


def repairs_of(index: Index) -> dict[str, dict]:
    return json.loads((index.folder / "report.json").read_text())["repairs"]


def test_repairs_of_boxes_are_counted_and_listed(raw) -> None:
    raw.content["annotations"][0].update(bbox=[-1, 2, 5, 20], area=100)
    raw.content["annotations"][2].update(bbox=[3, 3, 0, 2])
    raw.content["annotations"].append({"id": 9, "image_id": 5, "category_id": 3, "bbox": [1, 1, 4, 2]})
    index = raw.pack()
    repairs = repairs_of(index)
    assert {kind: repair["count"] for kind, repair in repairs.items()} == {
        "boxes_clipped": 1,
        "boxes_without_size_dropped": 1,
        "areas_from_boxes": 1,
    }
    assert repairs["boxes_clipped"]["first"] == ["a.jpg: annotation 1: bbox [-1.0, 2.0, 5.0, 20.0]"]
    rows = {row["id"]: row for row in ground_truth(index)["annotations"]}
    assert sorted(rows) == [1, 2, 9]
    assert (rows[1]["bbox"], rows[1]["area"]) == ([0, 2, 4, 8], 32)
    assert rows[9]["area"] == 8


def test_a_wrong_size_is_taken_from_the_file(raw) -> None:
    raw.content["images"][0].update(width=10, height=20)
    index = raw.pack()
    assert repairs_of(index)["sizes_from_file"]["first"] == ["a.jpg: image 11: 10 x 20 stated, 20 x 10 found"]
    assert index.size(index.sample_of(11)) == (10, 20)


def test_annotation_ids_that_evaluation_cannot_use_are_renumbered(raw) -> None:
    raw.content["annotations"][0]["id"] = 4
    index = raw.pack()
    assert repairs_of(index)["annotation_ids_renumbered"]["count"] == 1
    assert sorted(row["id"] for row in ground_truth(index)["annotations"]) == [1, 2, 3]


def test_images_that_are_no_plain_jpeg_are_encoded_anew(raw) -> None:
    pixels = np.zeros((10, 20, 3), dtype=np.uint8)
    pixels[:, :10] = (200, 40, 90)
    Image.fromarray(pixels).save(raw.images / "a.jpg", "PNG")
    Image.fromarray(pixels).convert("CMYK").save(raw.images / "b.jpg", "JPEG", quality=98)
    kept = (raw.images / "c.jpg").read_bytes()
    index = raw.pack()
    told = sorted(repairs_of(index)["images_reencoded_as_jpeg"]["first"])
    assert told == ["a.jpg: image 11: JPEG of quality 95", "b.jpg: image 5: JPEG of quality 95"]
    for image_id in (11, 5):
        assert np.abs(read_image(index, image_id).astype(int) - pixels).mean() < 4
    with tarfile.open(index.folder / "shard-00000.tar") as shard:
        members = {member.name: shard.extractfile(member).read() for member in shard}  # type: ignore[union-attr]
    assert members["000000000009.jpg"] == kept
    with Image.open(io.BytesIO(members["000000000005.jpg"])) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")


def test_header_verification_trusts_the_rest_of_a_jpeg(raw) -> None:
    path = raw.images / "b.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    assert len(raw.pack(verify="header")) == 3


@pytest.mark.parametrize("layout", ["images/v1/patch8/x.jpg", "patch8/x.jpg", "x.jpg"])
def test_objects365_folder_layouts_and_names(raw, layout: str) -> None:
    raw.content["categories"] = [{"id": 3, "name": "Chair"}, {"id": 38, "name": "Moniter/TV"}]
    raw.content["images"][0]["file_name"] = "images/v1/patch8/x.jpg"
    for row, category in zip(raw.content["annotations"], (38, 3, 3), strict=True):
        row["category_id"] = category
    raw.content["annotations"][1].update(isfake=1, isreflected=1)
    target = raw.images / layout
    target.parent.mkdir(parents=True, exist_ok=True)
    (raw.images / "a.jpg").rename(target)
    index = raw.pack(format="objects365")
    assert [(category.id, category.name) for category in index.categories] == [(3, "Chair"), (38, "Monitor/TV")]
    assert repairs_of(index)["category_names_corrected"]["count"] == 1
    sample = index.sample_of(9)
    assert index.columns["flags"][index.columns["box_offsets"][sample]] == 0b111


def test_images_are_sought_in_every_folder_and_odd_paths_work(raw) -> None:
    other = raw.root / "50% more:images"
    other.mkdir()
    (raw.images / "b.jpg").rename(other / "b.jpg")
    raw.write()
    report = pack(raw.annotations, [raw.images, other], raw.root / "100%d:out", samples_per_shard=2)
    assert (report.samples, report.boxes, report.shards, report.repairs) == (3, 3, 2, {})
    assert Index.open(report.out).digest == report.digest


def test_progress_counts_to_the_end_of_every_phase(raw) -> None:
    calls: list[tuple[str, int, int]] = []
    raw.pack(progress=lambda *call: calls.append(call), samples_per_shard=2)
    size = raw.annotations.stat().st_size
    assert calls[-3:] == [("reading headers", 3, 3), ("writing shards", 2, 3), ("writing shards", 3, 3)]
    assert ("reading annotations", size, size) in calls


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(raw_scenes, packed_scenes, tmp_path, workers: int) -> None:
    split = raw_scenes["train"]
    pack(split.annotations, [split.images], tmp_path / "again", samples_per_shard=16, workers=workers)
    assert digests(tmp_path / "again") == digests(packed_scenes)


class Stop(Exception):
    pass


def interrupt_after(samples: int) -> Callable[[str, int, int], None]:
    def progress(phase: str, done: int, total: int) -> None:
        if phase == "writing shards" and done >= samples:
            raise Stop

    return progress


def test_an_interrupted_pack_goes_on_where_it_stopped(raw_scenes, packed_scenes, tmp_path) -> None:
    split, out = raw_scenes["train"], tmp_path / "out"
    with pytest.raises(Stop):
        pack(split.annotations, [split.images], out, samples_per_shard=16, progress=interrupt_after(32))
    partial = tmp_path / ".out.partial"
    finished = sorted(partial.glob("shard-*.tar"))
    assert len(finished) == 2 and not out.exists()
    os.utime(finished[0], (1, 1))
    finished[1].write_bytes(b"torn by a crash")
    (partial / "shard-00002.tar.partial-0123456789ab").write_bytes(b"half a shard")
    with pytest.raises(Stop):
        pack(split.annotations, [split.images], out, samples_per_shard=16, progress=interrupt_after(16))
    assert not list(partial.glob("*.partial-*")), "halves must not pile up"
    pack(split.annotations, [split.images], out, samples_per_shard=16)
    assert (out / "shard-00000.tar").stat().st_mtime == 1, "the finished shard was kept"
    assert digests(out) == digests(packed_scenes) and not partial.exists()


def test_a_changed_image_is_packed_anew_and_restart_forgets_all(raw) -> None:
    def keep_first(**options) -> None:
        with pytest.raises(Stop):
            raw.pack(samples_per_shard=1, **options)

    keep_first(progress=interrupt_after(2))
    first = raw.out.with_name(".shards.partial") / "shard-00000.tar"
    for path in raw.images.iterdir():
        Image.new("RGB", (20, 10), (200, 10, 10)).save(path)
    before = first.read_bytes()
    keep_first(progress=interrupt_after(1))
    assert first.read_bytes() != before
    os.utime(first, (1, 1))
    keep_first(progress=interrupt_after(1))
    assert first.stat().st_mtime == 1
    keep_first(progress=interrupt_after(1), restart=True)
    assert first.stat().st_mtime != 1
    assert len(raw.pack(samples_per_shard=1)) == 3


def test_a_killed_pack_goes_on(raw_scenes, packed_scenes, tmp_path) -> None:
    """The process itself is killed while shards are being written."""
    split, out = raw_scenes["train"], tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from data_pipeline.pack import pack\n"
        "def progress(phase, done, total):\n"
        "    if phase == 'writing shards': os.kill(os.getpid(), signal.SIGKILL)\n"
        "pack(sys.argv[1], [sys.argv[2]], sys.argv[3], samples_per_shard=16, progress=progress)\n"
    )
    command = [sys.executable, "-c", code, str(split.annotations), str(split.images), str(out)]
    assert subprocess.run(command, check=False).returncode == -9
    assert not out.exists()
    pack(split.annotations, [split.images], out, samples_per_shard=16)
    assert digests(out) == digests(packed_scenes)


def test_a_lost_packing_process_is_one_line() -> None:
    with pytest.raises(WorkerLostError, match="a packing process died"):
        list(ordered_map(os._exit, [3, 3], workers=2))


def test_two_packs_into_one_target_are_refused(raw) -> None:
    def meanwhile(phase: str, done: int, total: int) -> None:
        if phase == "writing shards":
            pack(raw.annotations, [raw.images], raw.out)

    with pytest.raises(UserError, match="is being packed by another process"):
        raw.pack(progress=meanwhile)
