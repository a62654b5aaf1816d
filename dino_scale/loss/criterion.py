"""Set prediction loss (official SetCriterion): focal classification, L1 and GIoU of matched boxes, on every layer.

Shape letters: Lyr layers, B images, Q queries, C classes, T boxes of all images, G denoising groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dino_scale.boxes import giou, to_corners
from dino_scale.config.schema import LossConfig
from dino_scale.loss.matcher import match_layers
from dino_scale.model.outputs import DenoisingOutputs, Outputs
from dino_scale.structures import Targets
from kernels.transfer import to_device

Matcher = Callable[[Tensor, Tensor, Targets, LossConfig], Tensor]  # as `match_layers`
_PARTS = ("class", "box", "giou")


class Criterion:
    """Losses of all layers in one pass.

    Every sum is divided by `box_count`, the boxes of the whole global batch (at least 1), so that microbatches and
    workers add up to the loss of the batch; denoising sums are divided by box_count * groups.
    """

    def __init__(self, config: LossConfig, matcher: Matcher = match_layers) -> None:
        """matcher: another one only to compare with, or where tensors have no values (the plan of memory)."""
        self.config, self.matcher = config, matcher

    def __call__(self, outputs: Outputs, targets: Targets, box_count: float | Tensor) -> dict[str, Tensor]:
        """ "total" (weighted, differentiable) and the unweighted parts "decoder0/class", ..., "denoising0/giou".

        X/class, X/box, X/giou for X in decoder0.. (the last is the answer), encoder, denoising0.. (those that exist).
        """
        logits, boxes = _with_encoder(outputs)
        image = _image_of_targets(targets, logits.device)
        query = self.matcher(logits, boxes, targets, self.config)
        names = [f"decoder{layer}" for layer in range(len(outputs.logits))]
        if outputs.encoder_logits is not None:
            names.append("encoder")
        matching = self._parts(logits, boxes, targets, image, query, box_count)
        losses = _named(names, matching)
        decoder, encoder = self._weighted(matching).tensor_split([len(outputs.logits)])
        total = decoder.sum() + self.config.encoder_weight * encoder.sum()
        if outputs.denoising is not None:
            denoising = self._denoising_parts(outputs.denoising, targets, image, box_count)
            losses |= _named([f"denoising{layer}" for layer in range(len(outputs.logits))], denoising)
            total = total + self._weighted(denoising).sum()
        return {"total": total, **losses}

    def _denoising_parts(
        self, outputs: DenoisingOutputs, targets: Targets, image: Tensor, box_count: float | Tensor
    ) -> Tensor:
        """Positives answer for their target in every group; negatives and unused slots are background."""
        groups, layers = outputs.groups, len(outputs.logits)
        repeated = Targets(
            targets.labels.repeat(groups), targets.boxes.repeat(groups, 1), tuple(groups * n for n in targets.counts)
        )
        query = outputs.positives.flatten().expand(layers, -1)
        return self._parts(outputs.logits, outputs.boxes, repeated, image.repeat(groups), query, box_count * groups)

    def _parts(
        self, logits: Tensor, boxes: Tensor, targets: Targets, image: Tensor, query: Tensor, count: float | Tensor
    ) -> Tensor:
        """(3, Lyr): class, box and giou loss of each layer. image: (T,) of each target, query: (Lyr, T) for it, or -1.

        Targets without a query teach nothing. They are counted out, not cut out, which would need a host sync.
        """
        layer = torch.arange(len(logits), device=logits.device)[:, None].expand_as(query)
        matched = (query >= 0).float()
        places = (layer, image.expand_as(query), query.clamp(min=0))
        wanted = torch.zeros(logits.shape, device=logits.device)
        wanted.index_put_((*places, targets.labels.expand_as(query)), matched, accumulate=True)
        config = self.config
        classes = focal_loss(logits.float(), wanted, config.focal_alpha, config.focal_gamma).sum((1, 2, 3))
        found = boxes[places].float()
        distance = (functional.l1_loss(found, targets.boxes.expand_as(found), reduction="none").sum(2) * matched).sum(1)
        overlap = ((1 - giou(to_corners(found), to_corners(targets.boxes))) * matched).sum(1)
        return torch.stack([classes, distance, overlap]) / count

    def _weighted(self, parts: Tensor) -> Tensor:
        """(Lyr,) weighted sums of parts (3, Lyr). The weights stay numbers: a tensor of them would be a host sync."""
        classes, distance, overlap = parts.unbind(0)
        config = self.config
        return config.class_weight * classes + config.box_weight * distance + config.giou_weight * overlap


def focal_loss(logits: Tensor, wanted: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss (arXiv 1708.02002) of every element; wanted is 0 or 1."""
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    probability = logits.sigmoid()
    missed = probability + wanted - 2 * probability * wanted  # 1 - p of the right answer
    balance = alpha * wanted + (1 - alpha) * (1 - wanted)
    return balance * missed**gamma * cross_entropy


def _with_encoder(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Logits and boxes of all decoder layers and, as one more, of the selected proposals."""
    if outputs.encoder_logits is None or outputs.encoder_boxes is None:
        return outputs.logits, outputs.boxes
    logits = torch.cat([outputs.logits, outputs.encoder_logits[None].to(outputs.logits.dtype)])
    return logits, torch.cat([outputs.boxes, outputs.encoder_boxes[None]])


def _image_of_targets(targets: Targets, device: torch.device) -> Tensor:
    """(T,) int64."""
    counts = torch.tensor(targets.counts, dtype=torch.int64)
    images = torch.arange(len(counts))
    return to_device(torch.repeat_interleave(images, counts, output_size=sum(targets.counts)), device)


def _named(names: list[str], parts: Tensor) -> dict[str, Tensor]:
    """Parts (3, Lyr) under "name/part", detached."""
    return {
        f"{name}/{part}": value
        for name, row in zip(names, parts.detach().unbind(1), strict=True)
        for part, value in zip(_PARTS, row, strict=True)
    }
