"""Small datasets that the tests of this folder share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.index import Index
from data_pipeline.pack import pack
from data_pipeline.synthetic import Split, write_synthetic

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def raw_scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Split]:
    return write_synthetic(tmp_path_factory.mktemp("raw") / "scenes", "scenes", seed=2, train=61, validation=7)


@pytest.fixture(scope="session")
def packed_scenes(raw_scenes: dict[str, Split], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "scenes"
    split = raw_scenes["train"]
    pack(split.annotations, [split.images], out, "coco", samples_per_shard=16)
    return out


@pytest.fixture
def scenes(packed_scenes: Path) -> Index:
    return Index.open(packed_scenes)


class RawFolder:
    """A COCO-format folder of three images (20 x 10 pixels) and three boxes, to be spoiled and packed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = root / "images"
        self.annotations = root / "instances.json"
        self.out = root / "out" / "shards"
        self.images.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            Image.fromarray(rng.integers(0, 256, (10, 20, 3), dtype=np.uint8)).save(self.images / name)
        self.content: dict[str, Any] = {
            "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
            "images": [
                {"id": 11, "file_name": "a.jpg", "width": 20, "height": 10},
                {"id": 5, "file_name": "b.jpg", "width": 20, "height": 10},
                {"id": 9, "file_name": "c.jpg", "width": 20, "height": 10},
            ],
            "annotations": [
                {"id": 1, "image_id": 11, "category_id": 7, "bbox": [1, 2, 5, 4], "area": 12.5, "iscrowd": 0},
                {"id": 2, "image_id": 9, "category_id": 3, "bbox": [0.25, 0, 19.75, 10], "area": 150, "iscrowd": 1},
                {"id": 4, "image_id": 11, "category_id": 3, "bbox": [3, 3, 2, 2], "area": 4, "iscrowd": 0},
            ],
        }

    def write(self) -> None:
        self.annotations.write_text(json.dumps(self.content))

    def pack(self, **options: Any) -> Index:
        if not self.annotations.exists():
            self.write()
        pack(self.annotations, [self.images], self.out, **options)
        return Index.open(self.out)

    def leftovers(self) -> list[str]:
        """What packing has left beside or in its target."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.glob("out/**/*"))


@pytest.fixture
def raw(tmp_path: Path) -> RawFolder:
    return RawFolder(tmp_path / "raw")


@pytest.fixture
def make_raw(tmp_path: Path) -> Callable[[str], RawFolder]:
    return lambda name: RawFolder(tmp_path / name)
