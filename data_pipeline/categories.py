"""The class tables of COCO 2017 and Objects365 v2 and the map between them (`categories.json` names its sources)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from dino_scale.structures import Category


@cache
def _tables() -> dict[str, Any]:
    return json.loads(resources.files("data_pipeline").joinpath("categories.json").read_text(encoding="utf-8"))


def coco_categories() -> tuple[Category, ...]:
    """The 80 COCO classes; ids 1..90 with gaps."""
    return tuple(Category(row["id"], row["name"]) for row in _tables()["coco"])


def objects365_categories() -> tuple[Category, ...]:
    """The 365 Objects365 v2 classes under their corrected names; ids 1..365."""
    return tuple(Category(row["id"], row["name_fixed"]) for row in _tables()["objects365"])


def rows_by_raw_id(categories: Sequence[Category], rows: int) -> tuple[Category, ...]:
    """Categories of a class head whose row k is the class with raw id k; nameless where no class has that id."""
    names = {category.id: category.name for category in categories}
    return tuple(Category(row, names.get(row, "")) for row in range(rows))


def objects365_misspelt() -> dict[str, str]:
    """Names as the published annotation files spell them -> corrected names, where the two differ."""
    return {row["name"]: row["name_fixed"] for row in _tables()["objects365"] if row["name"] != row["name_fixed"]}


def class_aliases() -> tuple[tuple[str, str], ...]:
    """(COCO name, Objects365 name) of all 80 COCO classes: the same thing under two spellings."""
    return tuple((row["coco_name"], row["o365_name"]) for row in _tables()["coco_to_objects365"])


def objects365_name_of(coco_name: str) -> str | None:
    """The Objects365 class that shows the same thing as a COCO class; None where the name is no COCO class."""
    return dict(class_aliases()).get(coco_name)
