"""The benchmark measures what it says, on a small scale; no figure of time is judged."""

from __future__ import annotations

import csv
import datetime
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import bench
from data_pipeline.bench_memory import BOXES_PER_IMAGE, packing_memory, write_large_index
from data_pipeline.bench_official import MEAN, STD, official_batch
from data_pipeline.collate import collate
from data_pipeline.index import Index
from data_pipeline.loader import TrainingPreparation
from data_pipeline.reader import Reader, read_image
from dino_scale.config.schema import AugmentationConfig
from launch.cli import main


def test_a_large_index_opens_like_any_other(tmp_path: Path) -> None:
    write_large_index(tmp_path / "large", 5000)
    index = Index.open(tmp_path / "large")
    assert len(index) == 5000 and index.size(4999) == (640, 640)
    assert index.boxes(4999).boxes.shape == (BOXES_PER_IMAGE, 4) and len(index.categories) == 365


def test_both_ways_make_the_same_batch(scenes: Index) -> None:
    """Otherwise their costs could not be compared."""
    samples = range(12)
    plans = [bench.plan_of(scenes, sample) for sample in samples]
    images, padding, targets = official_batch(Reader(scenes), samples, plans)
    reader, preparation = Reader(scenes), TrainingPreparation(0, AugmentationConfig())
    found = collate([preparation.sample(reader, sample, 0) for sample in samples])
    assert images.shape == found.images.shape and bool((padding == found.padding_mask()).all())
    assert sum(found.targets.counts) > 0
    for row, (labels, boxes) in enumerate(found.targets.per_image()):
        assert targets[row]["labels"].tolist() == labels.tolist()
        np.testing.assert_allclose(targets[row]["boxes"], boxes, atol=1e-5)
    pixels = found.images.float().masked_fill(found.padding_mask()[:, None], 0)
    back = (images * STD + MEAN).masked_fill(padding[:, None], 0) * 255
    assert float((back - pixels).abs().mean()) < 1.5


def test_images_are_drawn_at_the_size_asked_for_with_their_boxes(scenes: Index, tmp_path: Path) -> None:
    drawn = bench.draw_at(scenes, 5, 640, 480, tmp_path)
    assert len(drawn) == 5 and all(drawn.size(sample) == (480, 640) for sample in range(5))
    for sample in range(5):
        before = drawn.image_id(sample)
        origin = scenes.sample_of(before)
        height, width = scenes.size(origin)
        expected = scenes.boxes(origin).boxes * np.array([640 / width, 480 / height] * 2)
        np.testing.assert_allclose(drawn.boxes(sample).boxes, expected, atol=1e-6)
        assert read_image(drawn, before).std() > 5


def test_the_command(packed_scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"REPEATS": 1, "LARGE": 20_000, "READS": 100, "SIZES": 512, "PACKED_BOXES": 9000}.items():
        monkeypatch.setattr(bench, name, value)
    out = tmp_path / "costs.csv"
    command = ["bench", "loader", str(packed_scenes), "--images", "4", "--out", str(out)]
    assert main(command) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(datetime.date.fromisoformat(row["date"]) and "CPU" in row["machine"] and row["commit"] for row in rows)
    value = {(row["what"], row["way"]): float(row["value"]) for row in rows}
    assert len(value) == len(rows) == 3 + 2 + 2 + 9 + 3 + 1 and min(value.values()) >= 0
    for row in rows:
        if row["ratio"]:
            usual = value[row["what"], row["against"]]
            assert float(row["ratio"]) == pytest.approx(usual / float(row["value"]), rel=0.01)
    for size in (2, 4, 8):
        what = f"padded pixels over real ones, microbatch {size}"
        assert value[what, "size_planned"] < min(value[what, "permutation"], value[what, "windowed"])
    own, whole = (value["index of 20000 samples", way] for way in (
        "memory that this adds to a process", "PSS of that process, libraries included",
    ))  # fmt: skip
    assert own < 100 and own < whole
    before = out.read_bytes()
    assert main(command) == 2 and out.read_bytes() == before, "a file that is there is left alone"


@pytest.mark.slow
def test_packing_takes_a_bounded_number_of_bytes_per_box() -> None:
    """Of the whole of pack. As dictionaries alone two million boxes would take 750 bytes each."""
    assert packing_memory(2_000_000) < 375
