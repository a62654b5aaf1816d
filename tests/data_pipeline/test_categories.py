from pathlib import Path

from data_pipeline.categories import (
    class_aliases,
    coco_categories,
    objects365_categories,
    objects365_misspelt,
    objects365_name_of,
    rows_by_raw_id,
)
from dino_scale.structures import Category


def test_tables_have_the_published_size_and_ids() -> None:
    coco, objects = coco_categories(), objects365_categories()
    assert len(coco) == 80
    assert {category.id for category in coco} == set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert [category.id for category in objects] == list(range(1, 366))
    assert len({category.name for category in objects}) == 365


def test_every_coco_class_has_a_counterpart_in_objects365() -> None:
    names = {category.name for category in objects365_categories()}
    aliases = class_aliases()
    assert [coco for coco, _ in aliases] == [category.name for category in coco_categories()]
    assert all(counterpart in names for _, counterpart in aliases)


def test_the_documented_table_is_the_one_in_use() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.partition("## COCO and")[2].splitlines()]
    table = [(int(row[0]), row[1], row[2], int(row[3])) for row in rows if row and row[0].isdigit()]
    number = {category.name: category.id for category in objects365_categories()}
    ids = {category.name: category.id for category in coco_categories()}
    assert table == [(ids[coco], coco, other, number[other]) for coco, other in class_aliases()]


def test_spellings() -> None:
    assert objects365_name_of("tv") == "Monitor/TV"
    assert objects365_name_of("dining table") == "Dining Table"
    assert objects365_name_of("unicorn") is None
    assert objects365_misspelt()["Moniter/TV"] == "Monitor/TV"
    assert objects365_misspelt()["Formula 1 "] == "Formula 1"


def test_rows_by_raw_id_leave_gaps_nameless() -> None:
    rows = rows_by_raw_id((Category(3, "c"), Category(1, "a")), 5)
    assert rows == (Category(0, ""), Category(1, "a"), Category(2, ""), Category(3, "c"), Category(4, ""))
