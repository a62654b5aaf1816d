"""The loss of a global batch does not depend on how it is cut into microbatches, for the whole detector."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dino_scale.config.schema import DenoisingConfig, LossConfig
from dino_scale.loss.criterion import Criterion
from dino_scale.model.denoising import Draws, draw, group_count
from dino_scale.model.dino import Dino, build_model
from dino_scale.structures import Targets
from tests.support.tiny_detector import CLASSES, generator, images, targets, tiny

IMAGES, BOXES = 4, 3  # equal counts: microbatches then make as many denoising groups as the whole batch
NOISE = DenoisingConfig(queries=6)


@pytest.fixture(scope="module")
def model() -> Dino:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(tiny(denoising=NOISE), CLASSES).train()
    # Sampling offsets and box steps start at zero, where much of the gradient is zero too.
    for name, parameter in model.named_parameters():
        if "offsets" in name or "box_head" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def draws_of_images() -> list[Draws]:
    """Each image's own noise, as a microbatch of one image draws it."""
    count = group_count(NOISE.queries, BOXES) * 2 * BOXES
    return [draw(count, NOISE.label_noise, CLASSES, generator(image)) for image in range(IMAGES)]


def joined(parts: Sequence[Draws]) -> Draws:
    """The noise of several images in the order of their common microbatch: block by block, image by image."""

    def blocks(tensors: list[Tensor]) -> Tensor:
        cut = [tensor.unflatten(0, (-1, BOXES)) for tensor in tensors]
        return torch.cat(cut, dim=1).flatten(0, 1)

    labels = []
    for part in parts:
        label = torch.full(part.label_p.shape, -1)
        label[part.label_p < NOISE.label_noise / 2] = part.new_label
        labels.append(label)
    label = blocks(labels)
    label_p, sign, part = (blocks([getattr(one, name) for one in parts]) for name in ("label_p", "sign", "part"))
    return Draws(label_p, label[label >= 0], sign, part)


def losses_and_gradients(model: Dino, microbatch: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Of one global batch of four images in microbatches of this size, each one's backward added up."""
    pixels, padding = images(IMAGES)
    boxes, draws = targets(*[BOXES] * IMAGES), draws_of_images()
    criterion = Criterion(LossConfig())
    model.zero_grad()
    sums: dict[str, float] = {}
    for start in range(0, IMAGES, microbatch):
        own = slice(start, start + microbatch)
        rows = slice(start * BOXES, (start + microbatch) * BOXES)
        part = Targets(boxes.labels[rows], boxes.boxes[rows], boxes.counts[own])
        outputs = model(pixels[own], padding[own], part, draws=joined(draws[own]))
        losses = criterion(outputs, part, box_count=float(IMAGES * BOXES))
        losses["total"].backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
    return sums, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("microbatch", [1, 2])
def test_microbatches_add_up_to_one_batch(model: Dino, microbatch: int) -> None:
    expected, whole = losses_and_gradients(model, IMAGES)
    losses, gradients = losses_and_gradients(model, microbatch)
    assert "denoising0/box" in losses
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, gradient in whole.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-7, msg=name)
