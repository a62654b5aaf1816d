"""Eight real COCO photographs through the whole data path."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.categories import coco_categories
from data_pipeline.index import Index, ground_truth
from data_pipeline.loader import evaluation_batches, training_microbatches
from data_pipeline.pack import pack
from data_pipeline.reader import read_image
from dino_scale.config.schema import AugmentationConfig, BatchConfig

FOLDER = Path(__file__).parents[1] / "data" / "coco_mini"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("coco") / "shards"
    report = pack(FOLDER / "instances.json", [FOLDER / "images"], out, samples_per_shard=3)
    assert (report.samples, report.shards, report.repairs) == (8, 3, {})
    return Index.open(out)


def test_ground_truth_is_the_annotation_file(index: Index) -> None:
    original = json.loads((FOLDER / "instances.json").read_text())
    truth = ground_truth(index)
    assert sorted(truth["annotations"], key=lambda row: row["id"]) == sorted(
        original["annotations"], key=lambda row: row["id"]
    )
    assert any(row["iscrowd"] for row in truth["annotations"])
    assert index.categories == coco_categories()


def test_pixels_are_pillows(index: Index) -> None:
    for sample in range(len(index)):
        with Image.open(FOLDER / "images" / index.file_name(sample)) as image:
            assert np.array_equal(read_image(index, index.image_id(sample)), np.asarray(image.convert("RGB")))


def test_batches_at_official_sizes(index: Index) -> None:
    steps = training_microbatches(
        index, seed=0, augmentation=AugmentationConfig(), batch=BatchConfig(4, 2), rank=0, world=1,
        first_step=0, last_step=2, loader_workers=0,
    )  # fmt: skip
    batches = [batch for step in steps for batch in step]
    assert sorted(sample for batch in batches for sample in batch.sample_ids) == list(range(8))
    for batch in batches:
        assert all(min(size) <= 800 and max(size) <= 1333 for size in batch.sizes)
    [batch] = evaluation_batches(index, short_side=800, max_size=1333, microbatch=8, rank=0, world=1)
    for (height, width), (original_height, original_width) in zip(batch.sizes, batch.original_sizes, strict=True):
        assert abs(height / width - original_height / original_width) < 0.01
    crowds = sum(row["iscrowd"] for row in ground_truth(index)["annotations"])
    assert len(batch.targets.labels) == len(ground_truth(index)["annotations"]) - crowds
