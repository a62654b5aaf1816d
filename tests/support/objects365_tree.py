"""A generated tree in the layout of the Objects365 v2 download, with every known defect planted once."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.categories import objects365_categories, objects365_misspelt
from data_pipeline.objects365 import KNOWN_MISSING
from data_pipeline.packing_plan import Selection

SIZE = (48, 32)  # width, height of every image
EXIF_SIZE = (32, 48)  # what a viewer that turns images would see


def pixels(number: int) -> np.ndarray:
    coarse = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class Tree:
    """train/patchN/x.jpg and val/images/vM/patchN/x.jpg; file names in the annotations say images/vM/patchN/x.jpg."""

    def __init__(self, root: Path) -> None:
        self.root = root
        published = {fixed: misspelt for misspelt, fixed in objects365_misspelt().items()}
        names = [(row.id, published.get(row.name, row.name)) for row in objects365_categories()]
        self.categories = [{"id": number, "name": name} for number, name in names]
        self.train: dict[str, Any] = {"images": [], "annotations": [], "categories": self.categories}
        self.val: dict[str, Any] = {"images": [], "annotations": [], "categories": self.categories}
        self._defects()
        for number in range(900, 907):
            self.image(self.val, number, f"val/images/v2/patch16/{self.name(number, 2)}", version=2, patch=16)
            self.box(self.val, number, [1, 2, 10, 12])
        for part, name in ((self.train, "train"), (self.val, "val")):
            (root / name).mkdir(exist_ok=True)
            (root / name / f"zhiyuan_objv2_{name}.json").write_text(json.dumps(part))

    @staticmethod
    def name(number: int, version: int) -> str:
        return f"objects365_v{version}_{number:08d}.jpg"

    def image(
        self, part: dict, number: int, place: str, data: bytes | None = None, size: tuple[int, int] = SIZE,
        version: int = 1, patch: int = 0,
    ) -> None:  # fmt: skip
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(Image.fromarray(pixels(number)), quality=95) if data is None else data)
        self.entry(part, number, f"images/v{version}/patch{patch}/{path.name}", size)

    def entry(self, part: dict, number: int, name: str, size: tuple[int, int] = SIZE) -> None:
        part["images"].append({"id": number, "file_name": name, "width": size[0], "height": size[1], "license": 1})

    def box(self, part: dict, image: int, bbox: list[float], **flags: int) -> None:
        number = len(part["annotations"]) + 1
        flags = {"iscrowd": 0, "isfake": 0, "isreflected": 0, **flags}
        row = {"id": number, "image_id": image, "category_id": 1 + number % 365, "bbox": bbox, **flags}
        part["annotations"].append({**row, "area": bbox[2] * bbox[3]})

    def _defects(self) -> None:
        train = self.train
        self.image(train, 1, f"train/patch0/{self.name(1, 1)}")  # no images/v1 folders
        self.image(train, 2, f"train/images/v2/patch16/{self.name(2, 2)}", version=2, patch=16)
        self.image(train, 3, f"train/v1/patch3/{self.name(3, 1)}", patch=3)
        self.image(train, 4, f"train/patch0/{self.name(4, 1)}", size=(999, 7))  # wrong width and height
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees
        turned = encoded(Image.fromarray(pixels(5)), quality=95, exif=exif)
        self.image(train, 5, f"train/patch0/{self.name(5, 1)}", turned, size=EXIF_SIZE)
        grey = encoded(Image.fromarray(pixels(6)).convert("L"))
        self.image(train, 6, f"train/patch0/{self.name(6, 1)}", grey)
        self.image(train, 7, f"train/patch0/{self.name(7, 1)}", encoded(Image.fromarray(pixels(7)).convert("CMYK")))
        self.image(train, 8, f"train/patch0/{self.name(8, 1)}", encoded(Image.fromarray(pixels(8)), "PNG"))
        deep = Image.fromarray(pixels(9)[..., 0].astype(np.uint16) * 257)
        self.image(train, 9, f"train/patch0/{self.name(9, 1)}", encoded(deep, "PNG"))
        for number, name in enumerate(sorted(KNOWN_MISSING), start=20):
            self.entry(train, number, f"images/v1/patch6/{name}")
            self.box(train, number, [1, 1, 5, 5])
        for number in range(1, 10):
            self.box(train, number, [4, 4, 20, 16])
        self.box(train, 1, [30, 10, 40, 10])  # sticks out
        self.box(train, 2, [60, 10, 5, 5])  # outside
        self.box(train, 3, [3, 3, 0, 5])  # without width
        self.box(train, 6, [5, 5, 9, 9], isfake=1)
        self.box(train, 6, [6, 6, 9, 9], isreflected=1)
        self.box(train, 6, [7, 7, 9, 9], iscrowd=1)
        train["annotations"].append({**train["annotations"][3], "id": 77})  # the box of image 1 once more

    def arguments(self) -> dict[str, Any]:
        return {
            "annotations": self.root / "train/zhiyuan_objv2_train.json",
            "images": [self.root / "train", self.root / "val"],
            "format": "objects365",
            "selection": Selection(also=self.root / "val/zhiyuan_objv2_val.json", also_after=5),
        }


EXPECTED = {
    "annotation_ids_renumbered": 1,
    "boxes_clipped": 1,
    "boxes_outside_dropped": 1,
    "boxes_repeated_dropped": 1,
    "boxes_without_size_dropped": 1,
    "category_names_corrected": 2 * len(objects365_misspelt()),  # in both annotation files
    "images_known_missing_skipped": 3,
    "images_reencoded_as_jpeg": 3,
    "sizes_from_file": 2,
}
