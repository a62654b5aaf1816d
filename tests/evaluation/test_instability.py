"""The measure of a matching that changes: by hand, and on detectors whose queries mean different things."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dino_scale.config.schema import LossConfig, ModelConfig
from dino_scale.evaluation.instability import Instability, instability, matched_queries
from dino_scale.model.dino import Dino, build_model
from dino_scale.structures import Batch
from tests.support.tiny_detector import ANCESTORS, CLASSES, targets, tiny


def test_by_hand() -> None:
    before = [torch.tensor([3, 5, 7, 9]), torch.tensor([1])]
    swapped = [torch.tensor([5, 3, 7, 9]), torch.tensor([1])]
    moved = [torch.tensor([3, 5, 7, 8]), torch.tensor([2])]
    assert instability(before, before) == Instability(0.0, 0.0)
    # Two of four boxes have another query and two queries have another box; the second image is as it was.
    assert instability(before, swapped) == Instability((2 / 4 + 0) / 2, (2 + 0) / 2)
    # A box that goes from a matched to a free query changes two queries: the one it leaves and the one it takes.
    assert instability(before, moved) == Instability((1 / 4 + 1) / 2, (2 + 2) / 2)


def test_boxes_without_a_query() -> None:
    before, after = [torch.tensor([4, -1, -1])], [torch.tensor([-1, 4, -1])]
    assert instability(before, after) == Instability(2 / 3, 1.0)  # query 4 alone has changed its box


def test_without_any_box_nothing_changes() -> None:
    assert instability([], []) == Instability(0.0, 0.0)


def batch(*counts: int) -> Batch:
    pixels = torch.randint(
        0, 256, (len(counts), 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    sizes = ((64, 96),) * len(counts)
    ids = tuple(range(len(counts)))
    return Batch(pixels, sizes, sizes, ids, ids, targets(*counts))


def built(config: ModelConfig) -> Dino:
    torch.manual_seed(0)
    return build_model(config, CLASSES)


def matched(model: Dino, *counts: int) -> list[Tensor]:
    zero, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return matched_queries(model, [batch(*counts)], LossConfig(), mean=zero, std=one, precision="fp32")


@pytest.mark.parametrize("name", ["deformable_detr_two_stage", "dab_deformable_detr", "dn_deformable_detr", "dino"])
def test_equal_weights_do_not_change_and_others_do(name: str) -> None:
    model = built(tiny(**ANCESTORS[name]))
    before = matched(model, 3, 0, 2)
    assert [len(one) for one in before] == [3, 2], "the image without boxes is left out"
    assert instability(before, matched(model, 3, 0, 2)) == Instability(0.0, 0.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    change = instability(before, matched(model, 3, 0, 2))
    assert 0 < change.share <= 1 and 0 < change.queries <= 2 * 2.5


def test_selected_queries_are_known_by_their_token_not_by_their_rank() -> None:
    """Other class scores select the same tokens in another order: every rank changes, no place does."""
    model = built(replace(tiny(), queries=126 + 32))  # more queries than tokens: all are selected
    with torch.no_grad():
        for layer in model.decoder.layers:  # the content is learned by rank; without it a query is its place alone
            layer.self_attention.output.weight.zero_()
        model.queries.content.weight.zero_()
        before = matched(model, 4)
        model.queries.class_head.weight.neg_()
        reversed_ranks = matched(model, 4)
    assert instability(before, reversed_ranks) == Instability(0.0, 0.0)
