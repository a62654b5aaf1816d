"""Carrying weights between stages: rows follow class names, everything else must fit exactly."""

from __future__ import annotations

import pytest
import torch

from dino_scale.checkpoint.transfer import carry_over, match_classes
from dino_scale.errors import CheckpointError, ConfigError
from dino_scale.structures import Category

OLD = [Category(3, "Person"), Category(7, "Monitor/TV"), Category(9, "Kite")]
NEW = [Category(1, "tv"), Category(2, "zebra"), Category(5, "person")]
ALIASES = [("tv", "Monitor/TV")]


def _state(classes: int, value: float) -> dict[str, torch.Tensor]:
    rows = torch.arange(classes).float()[:, None] + value
    return {
        "head.weight": rows.repeat(1, 2),
        "labels": torch.cat([rows, torch.tensor([[value + 50]])]).repeat(1, 4),
        "body.weight": torch.full((2, 2), value),
    }


@pytest.mark.parametrize("aliases", [ALIASES, [("Monitor/TV", "tv")]])
def test_names_match_without_case_and_through_aliases_in_either_direction(aliases: list[tuple[str, str]]) -> None:
    assert match_classes(OLD, NEW, aliases) == [(0, 1), (2, 0)]


def test_a_choice_goes_before_the_table() -> None:
    assert match_classes(OLD, NEW, ALIASES, {"TV": "Person", "zebra": "Monitor/TV"}) == [(0, 0), (1, 1), (2, 0)]
    for choices, culprit in (
        ({"lamp": "Person"}, "'lamp' is no class of the data"),
        ({"tv": "Lamp"}, "'lamp' is no class of the weights"),
    ):
        with pytest.raises(ConfigError, match=culprit):
            match_classes(OLD, NEW, ALIASES, choices)


def test_class_rows_follow_names_and_new_classes_keep_their_initialisation() -> None:
    old, new = _state(3, 100), _state(3, 0)
    transfer = carry_over(old, new, {"head.weight", "labels"}, match_classes(OLD, NEW, ALIASES), OLD, NEW)
    assert new["head.weight"][:, 0].tolist() == [101, 1, 100]
    assert new["labels"][:, 0].tolist() == [101, 1, 100, 150], "the spare row is copied as it is"
    assert new["body.weight"].tolist() == [[100, 100], [100, 100]]
    assert transfer.classes == (("tv", "Monitor/TV"), ("zebra", None), ("person", "Person"))
    assert "2 of 3 classes" in transfer.summary()


def test_another_number_of_classes_fits() -> None:
    old, new = _state(3, 100), _state(2, 0)
    carry_over(old, new, {"head.weight", "labels"}, match_classes(OLD, NEW[:2], ALIASES), OLD, NEW[:2])
    assert new["head.weight"][:, 0].tolist() == [101, 1]
    assert new["labels"][:, 0].tolist() == [101, 1, 150]


def test_other_shapes_are_refused_by_name() -> None:
    old, new = _state(3, 100), _state(3, 0)
    old["body.weight"] = torch.zeros(3, 2)
    with pytest.raises(CheckpointError, match=r"body.weight has shape \(3, 2\)"):
        carry_over(old, new, {"head.weight", "labels"}, [], OLD, NEW)
    del old["body.weight"]
    with pytest.raises(CheckpointError, match=r"body\.weight is not in the weights"):
        carry_over(old, new, {"head.weight", "labels"}, [], OLD, NEW)
