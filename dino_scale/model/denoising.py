"""Denoising queries: noised ground truth as additional queries during training (paper 3.3; official dn_components.py).

Shape letters: T boxes of all images, m most boxes of an image, G groups, K blocks of queries of a group (contrastive:
positives and negatives; plain: positives), P = G * K * m denoising queries of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino_scale.boxes import inverse_sigmoid, to_centred, to_corners
from dino_scale.config.schema import DenoisingConfig
from dino_scale.structures import Targets
from kernels.transfer import to_device


@dataclass(frozen=True)
class Draws:
    """Random numbers behind the queries, in the order they are drawn; N = G * K * T, block after block.

    label_p: (N,) float32 in [0, 1). new_label: (number of changed labels,) int64. sign: (N, 4) int64, 0 or 1.
    part: (N, 4) float32 in [0, 1).
    """

    label_p: Tensor
    new_label: Tensor
    sign: Tensor
    part: Tensor


@dataclass(frozen=True)
class DenoisingQueries:
    """content: (B, P, C). reference: (B, P, 4) float32 in logit space. positives: (G, T) int64. groups: G.

    positives[g, t] is the query, within its image, that shall find target t in group g.
    """

    content: Tensor
    reference: Tensor
    positives: Tensor
    groups: int


class Denoiser(nn.Module):
    """Makes denoising queries. Owns the label embedding (one spare row, as in official checkpoints)."""

    def __init__(self, config: DenoisingConfig, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.blocks = 2 if config.kind == "contrastive" else 1
        self.label_embedding = nn.Embedding(num_classes + 1, hidden)

    def forward(
        self, targets: Targets, generator: torch.Generator | None, draws: Draws | None = None
    ) -> DenoisingQueries:
        """Queries for all images; P is 0 when there is no box at all.

        generator: source of the random numbers, on the CPU so that they do not depend on the device. draws: recorded
        numbers used in its place.
        """
        groups = group_count(self.config.queries, max(targets.counts, default=0))
        if draws is None:
            if generator is None:
                raise ValueError("training with denoising needs a torch.Generator on the CPU: pass generator=")
            count = groups * self.blocks * len(targets.labels)
            draws = draw(count, self.config.label_noise, self.num_classes, generator)
        return self.build(targets, groups, draws)

    def build(self, targets: Targets, groups: int, draws: Draws) -> DenoisingQueries:
        """Queries from given random numbers."""
        device = targets.boxes.device
        most = max(targets.counts, default=0)
        size = groups * self.blocks * most
        labels = noised_labels(targets.labels, draws, self.config.label_noise)
        boxes = noised_boxes(targets.boxes, draws, self.config)
        image, slot = _places(targets.counts, groups * self.blocks, device)
        embedded = self.label_embedding(labels)
        content = embedded.new_zeros(len(targets.counts), size, embedded.shape[1])
        content = content.index_put((image, slot), embedded)
        reference = boxes.new_zeros(len(targets.counts), size, 4)
        reference = reference.index_put((image, slot), inverse_sigmoid(boxes))
        # Positives are the first block of every group; blocks follow one another in `slot`.
        positives = slot.view(groups, self.blocks, len(targets.labels))[:, 0]
        return DenoisingQueries(content, reference, positives, groups)


def group_count(queries: int, most: int) -> int:
    """Groups such that about `queries` positives fall on the image with the most boxes; at least 1.

    The official code takes 2 * queries groups when `queries` is below 50, whatever the boxes; that is not reproduced.
    """
    return max(1, queries // most) if most else 1


def draw(count: int, label_noise: float, num_classes: int, generator: torch.Generator) -> Draws:
    """Random numbers for `count` noised targets, in the official order."""
    label_p = torch.rand(count, generator=generator)
    changed = int((label_p < label_noise * 0.5).sum())
    new_label = torch.randint(0, num_classes, (changed,), generator=generator)
    sign = torch.randint(0, 2, (count, 4), generator=generator)
    part = torch.rand(count, 4, generator=generator)
    return Draws(label_p, new_label, sign, part)


def noised_labels(labels: Tensor, draws: Draws, label_noise: float) -> Tensor:
    """(N,) labels of all blocks, half of the share `label_noise` of them drawn anew."""
    chosen = torch.nonzero(draws.label_p < label_noise * 0.5)[:, 0]
    repeats = len(draws.label_p) // max(len(labels), 1)
    chosen, new_label = (to_device(tensor, labels.device) for tensor in (chosen, draws.new_label))
    return labels.repeat(repeats).index_put((chosen,), new_label)


def noised_boxes(boxes: Tensor, draws: Draws, config: DenoisingConfig) -> Tensor:
    """(N, 4) centred boxes of all blocks, clamped to the image.

    Contrastive: each corner moves by up to half a side, times box_noise; negatives by half a side to a whole one.
    Plain (DN-DETR, section 4.3): the centre moves by up to half a side, the sides change by up to themselves.
    """
    sign = to_device(draws.sign.to(boxes.dtype), boxes.device) * 2 - 1
    part = to_device(draws.part.to(boxes.dtype), boxes.device)
    repeated = boxes.repeat(len(part) // max(len(boxes), 1), 1)
    half = repeated[:, 2:] / 2
    if config.kind == "plain":
        reach = torch.cat([half, repeated[:, 2:]], dim=-1)
        return (repeated + sign * part * reach * config.box_noise).clamp(0, 1)
    negative = torch.arange(len(part) // max(len(boxes), 1), device=boxes.device) % 2
    part = part + negative.repeat_interleave(len(boxes))[:, None]
    corners = to_corners(repeated) + sign * part * torch.cat([half, half], dim=-1) * config.box_noise
    return to_centred(corners.clamp(0, 1))


def visibility(groups: int, size: int, matching: int, device: torch.device) -> Tensor:
    """(P + Q, P + Q) bool, True where a query (row) may see another (column).

    Groups see themselves and the matching queries; matching queries see only one another.
    """
    group = torch.cat(
        [torch.arange(size, device=device) // max(size // groups, 1), torch.full((matching,), -1, device=device)]
    )
    return (group[None, :] == -1) | (group[None, :] == group[:, None])


def _places(counts: tuple[int, ...], blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Image and query slot of each of the blocks * T noised targets; block k of every image starts at k * m."""
    most = max(counts, default=0)
    image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    within = torch.cat([torch.arange(count) for count in counts] or [torch.arange(0)])
    slot = (torch.arange(blocks)[:, None] * most + within).flatten()
    return to_device(image.repeat(blocks), device), to_device(slot, device)
