"""The criterion: its promise about global batches, and its values against plain loops."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dino_scale.boxes import giou, to_corners
from dino_scale.config.schema import LossConfig
from dino_scale.loss.criterion import Criterion
from dino_scale.loss.matcher import match_layers
from dino_scale.model.outputs import DenoisingOutputs, Outputs
from dino_scale.structures import Targets
from tests.support.tiny_detector import CLASSES, targets

LAYERS, QUERIES, GROUPS = 3, 12, 2


def outputs_for(counts: tuple[int, ...], seed: int = 0) -> Outputs:
    """Random predictions of 3 layers; denoising as the model lays it out (a positive and a negative block a group)."""
    generator = torch.Generator().manual_seed(seed)
    batch, most = len(counts), max(counts)

    def logits(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, CLASSES, generator=generator).requires_grad_()

    def boxes(*shape: int) -> torch.Tensor:
        return (0.05 + 0.6 * torch.rand(*shape, 4, generator=generator)).requires_grad_()

    within = torch.cat([torch.arange(count) for count in counts])
    positives = torch.stack([2 * group * most + within for group in range(GROUPS)])
    size = 2 * GROUPS * most
    denoising = DenoisingOutputs(logits(LAYERS, batch, size), boxes(LAYERS, batch, size), positives, GROUPS)
    return Outputs(
        logits(LAYERS, batch, QUERIES),
        boxes(LAYERS, batch, QUERIES),
        logits(batch, QUERIES),
        boxes(batch, QUERIES),
        denoising,
    )


def one_image(outputs: Outputs, targets: Targets, image: int) -> tuple[Outputs, Targets]:
    """What the model would have returned for this image alone (with the same padding of the denoising queries)."""
    assert outputs.denoising is not None and outputs.encoder_logits is not None and outputs.encoder_boxes is not None
    start = sum(targets.counts[:image])
    own = slice(start, start + targets.counts[image])
    denoising = replace(
        outputs.denoising,
        logits=outputs.denoising.logits[:, image : image + 1],
        boxes=outputs.denoising.boxes[:, image : image + 1],
        positives=outputs.denoising.positives[:, own],
    )
    alone = Outputs(
        outputs.logits[:, image : image + 1],
        outputs.boxes[:, image : image + 1],
        outputs.encoder_logits[image : image + 1],
        outputs.encoder_boxes[image : image + 1],
        denoising,
    )
    return alone, Targets(targets.labels[own], targets.boxes[own], (targets.counts[image],))


def test_microbatches_add_up_to_the_batch() -> None:
    counts = (3, 0, 5)
    outputs, boxes = outputs_for(counts), targets(*counts)
    criterion = Criterion(LossConfig())
    whole = criterion(outputs, boxes, box_count=8.0)
    parts = [criterion(*one_image(outputs, boxes, image), box_count=8.0) for image in range(3)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-5, atol=1e-6)


def test_values_of_a_plain_loop() -> None:
    counts = (2, 4)
    outputs, boxes = outputs_for(counts), targets(*counts)
    config = LossConfig()
    losses = Criterion(config)(outputs, boxes, box_count=torch.tensor(5.0))
    query = match_layers(outputs.logits, outputs.boxes, boxes, config)
    for layer in range(LAYERS):
        classes = distance = overlap = 0.0
        start = 0
        for image, count in enumerate(counts):
            wanted = torch.zeros(QUERIES, CLASSES)
            for target in range(start, start + count):
                slot = int(query[layer, target])
                wanted[slot, boxes.labels[target]] = 1
                found = outputs.boxes[layer, image, slot].detach()
                distance += float((found - boxes.boxes[target]).abs().sum())
                overlap += 1 - float(giou(to_corners(found), to_corners(boxes.boxes[target])))
            start += count
            p = outputs.logits[layer, image].detach().sigmoid()
            focal = -0.25 * wanted * (1 - p) ** 2 * p.log() - 0.75 * (1 - wanted) * p**2 * (1 - p).log()
            classes += float(focal.sum())
        expected = torch.tensor([classes, distance, overlap]) / 5
        ours = torch.stack([losses[f"decoder{layer}/{part}"] for part in ("class", "box", "giou")])
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_total_is_the_weighted_sum() -> None:
    counts = (2, 1)
    config = LossConfig(class_weight=1.5, box_weight=3.0, giou_weight=0.5, encoder_weight=0.25)
    losses = Criterion(config)(outputs_for(counts), targets(*counts), box_count=3.0)
    by_part = {"class": 1.5, "box": 3.0, "giou": 0.5}
    total = sum(
        by_part[name.split("/")[1]] * (0.25 if name.startswith("encoder/") else 1.0) * float(value)
        for name, value in losses.items()
        if name != "total"
    )
    assert float(losses["total"].detach()) == pytest.approx(total, rel=1e-5)
    sources = {name.split("/")[0] for name in losses if name != "total"}
    assert sources == {f"{source}{layer}" for source in ("decoder", "denoising") for layer in range(3)} | {"encoder"}


def test_denoising_positives_answer_for_their_target() -> None:
    """Boxes set to their targets at the positive slots leave no box loss; the negatives' boxes do not matter."""
    counts = (2, 3)
    outputs, boxes = outputs_for(counts), targets(*counts)
    assert outputs.denoising is not None
    exact = outputs.denoising.boxes.detach().clone()
    image = torch.tensor([0, 0, 1, 1, 1])
    for group in outputs.denoising.positives:
        exact[:, image, group] = boxes.boxes
    outputs = replace(outputs, denoising=replace(outputs.denoising, boxes=exact))
    losses = Criterion(LossConfig())(outputs, boxes, box_count=5.0)
    for layer in range(LAYERS):
        assert float(losses[f"denoising{layer}/box"]) == 0
        assert float(losses[f"denoising{layer}/giou"]) == pytest.approx(0, abs=1e-3)
        assert float(losses[f"denoising{layer}/class"]) > 0


def test_denoising_is_divided_by_boxes_and_groups() -> None:
    counts = (2, 3)
    outputs, boxes = outputs_for(counts), targets(*counts)
    assert outputs.denoising is not None
    found = outputs.denoising.boxes[
        0, torch.tensor([0, 0, 1, 1, 1]).repeat(GROUPS), outputs.denoising.positives.flatten()
    ]
    expected = (found - boxes.boxes.repeat(GROUPS, 1)).abs().sum() / (7.0 * GROUPS)
    losses = Criterion(LossConfig())(outputs, boxes, box_count=7.0)
    torch.testing.assert_close(losses["denoising0/box"], expected.detach(), rtol=1e-5, atol=0)


def test_order_of_targets_does_not_matter() -> None:
    outputs, boxes = outputs_for((5,)), targets(5)
    outputs = replace(outputs, denoising=None)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = Targets(boxes.labels[order], boxes.boxes[order], (5,))
    criterion = Criterion(LossConfig())
    torch.testing.assert_close(
        criterion(outputs, boxes, 5.0)["total"], criterion(outputs, shuffled, 5.0)["total"], rtol=1e-6, atol=0
    )


def test_a_batch_without_boxes_teaches_background_only() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, 2, QUERIES, CLASSES, generator=generator).requires_grad_()
    boxes = torch.rand(LAYERS, 2, QUERIES, 4, generator=generator).requires_grad_()
    losses = Criterion(LossConfig())(Outputs(logits, boxes), targets(0, 0), box_count=1.0)
    losses["total"].backward()
    assert float(losses["decoder2/class"]) > 0
    assert float(losses["decoder2/box"]) == 0 and float(losses["decoder2/giou"]) == 0
    assert boxes.grad is not None and not boxes.grad.any()
    assert logits.grad is not None and bool((logits.grad > 0).all())


def test_boxes_beyond_the_queries_teach_nothing() -> None:
    """An image with more boxes than queries learns from the boxes that were matched, as if only they were there."""
    outputs = replace(outputs_for((QUERIES + 5, 2)), denoising=None)
    boxes = targets(QUERIES + 5, 2)
    config = LossConfig()
    query = match_layers(outputs.logits, outputs.boxes, boxes, config)
    assert [int((row < 0).sum()) for row in query] == [5] * LAYERS
    losses = Criterion(config)(outputs, boxes, box_count=10.0)
    for layer in range(LAYERS):
        kept = torch.nonzero(query[layer] >= 0)[:, 0]
        fewer = Targets(boxes.labels[kept], boxes.boxes[kept], (QUERIES, 2))
        alone = Outputs(outputs.logits[layer : layer + 1], outputs.boxes[layer : layer + 1])
        expected = Criterion(config)(alone, fewer, box_count=10.0)
        for part in ("class", "box", "giou"):
            torch.testing.assert_close(losses[f"decoder{layer}/{part}"], expected[f"decoder0/{part}"])


def test_five_hundred_boxes_in_one_image() -> None:
    """Nothing grows with boxes times boxes, and nothing is lost but the boxes beyond the queries."""
    outputs, boxes = outputs_for((500, 0)), targets(500, 0)
    losses = Criterion(LossConfig())(outputs, boxes, box_count=500.0)
    losses["total"].backward()
    assert outputs.denoising is not None
    for tensor in (outputs.logits, outputs.boxes, outputs.denoising.logits, outputs.denoising.boxes):
        assert tensor.grad is not None and bool(torch.isfinite(tensor.grad).all())


class Operations(TorchDispatchMode):
    """Counts what is computed, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_all_layers_pass_at_once() -> None:
    """The work is the same number of operations for two layers as for three, and none of them asks for a value."""
    counts = (3, 0, 5)
    whole, boxes = outputs_for(counts), targets(*counts)
    assert whole.denoising is not None
    denoising = replace(whole.denoising, logits=whole.denoising.logits[:2], boxes=whole.denoising.boxes[:2])
    fewer = replace(whole, logits=whole.logits[:2], boxes=whole.boxes[:2], denoising=denoising)
    seen = []
    for outputs in (whole, fewer):
        with Operations() as operations:
            Criterion(LossConfig())(outputs, boxes, box_count=8.0)
        seen.append(operations.counts)
    assert seen[0] == seen[1]
    assert sum(seen[0].values()) > 50
    assert not [name for name in seen[0] if "_local_scalar_dense" in name or "nonzero" in name]
