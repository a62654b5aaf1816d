"""Where the matching queries come from: learned, or selected from the encoder's memory (paper 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino_scale.config.schema import ModelConfig
from dino_scale.model.heads import BoxHead, CoordinateLinear
from dino_scale.model.position import encode_boxes
from dino_scale.model.tokens import Layout, pixel_grid

_PROPOSAL_SIZE = 0.05  # side of a proposal on the finest level, doubled on each coarser one
_PROPOSAL_MARGIN = 0.01  # a proposal with a coordinate or side outside (0.01, 0.99) is not used


@dataclass(frozen=True)
class Queries:
    """The queries of a batch before the first decoder layer.

    content: (B, Q, C). reference: (B, Q, 2 | 4) float32, a point or a centred box in logit space.
    position: (B, Q, C), the positional query of all layers; None where each layer makes it from its boxes.
    encoder_logits (B, Q, C), encoder_boxes (B, Q, 4) in [0, 1]: of the selected proposals; None without selection.
    tokens: (B, Q) int64, the token of the memory that each query was selected from; None without selection.
    """

    content: Tensor
    reference: Tensor
    position: Tensor | None = None
    encoder_logits: Tensor | None = None
    encoder_boxes: Tensor | None = None
    tokens: Tensor | None = None


class LearnedQueries(nn.Module):
    """Queries that are parameters, the same for every image.

    Anchors: content and box are learned (DAB-DETR). Points: content and position are learned, and a projection of the
    position is the reference point (Deformable DETR).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.content = nn.Embedding(config.queries, config.hidden)
        self.anchors: nn.Embedding | None = None
        self.positions: nn.Embedding | None = None
        if config.query_form == "anchor":
            self.anchors = nn.Embedding(config.queries, 4)
        else:
            self.positions = nn.Embedding(config.queries, config.hidden)
            self.point = CoordinateLinear(config.hidden, 2)

    def forward(self, memory: Tensor, layout: Layout) -> Queries:
        batch = memory.shape[0]
        content = _for_batch(all_rows(self.content), batch)
        if self.anchors is not None:
            return Queries(content, _for_batch(all_rows(self.anchors).float(), batch))
        assert self.positions is not None
        positions = all_rows(self.positions)
        return Queries(content, _for_batch(self.point(positions), batch), _for_batch(positions, batch))


class SelectedQueries(nn.Module):
    """Queries from the best tokens of the memory, by class score (two-stage; paper 3.4).

    Every token proposes a box around itself, refined by a box head and scored by a class head of their own. Mixed
    selection takes the box from the proposal and learns the content; pure selection also takes the content from the
    token. Images with fewer tokens than queries give as many queries as they have tokens.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.queries = config.queries
        self.hidden = config.hidden
        self.points = config.query_form == "point"
        self.transform = nn.Linear(config.hidden, config.hidden)
        self.norm = nn.LayerNorm(config.hidden)
        self.class_head = nn.Linear(config.hidden, num_classes)
        self.box_head = BoxHead(config.hidden)
        self.content: nn.Embedding | None = None
        if config.query_selection == "mixed":
            self.content = nn.Embedding(config.queries, config.hidden)
        if self.points:
            self.position = nn.Linear(4 * (config.hidden // 2), config.hidden)
            self.position_norm = nn.LayerNorm(config.hidden)

    def forward(self, memory: Tensor, layout: Layout) -> Queries:
        proposals, usable = propose(layout)
        with torch.no_grad():  # scores decide only; the chosen few pass again, with gradient, far below the cost of all
            indices = self.choose(self.class_head(self._features(memory, usable)))
        chosen = self._features(_rows(memory, indices), usable.gather(1, indices))
        boxes = self.box_head(chosen) + _rows(proposals, indices)
        reference = boxes.detach()
        if self.content is None:
            content = chosen.detach()
        else:
            content = _for_batch(all_rows(self.content)[: indices.shape[1]], memory.shape[0])
        return Queries(
            content=content,
            reference=reference[..., :2] if self.points else reference,
            position=self._positions(reference) if self.points else None,
            encoder_logits=self.class_head(chosen),
            encoder_boxes=boxes.sigmoid(),
            tokens=indices,
        )

    def _features(self, memory: Tensor, usable: Tensor) -> Tensor:
        """Tokens (B, X, C) as the heads see them; unusable ones (B, X) all look the same."""
        return self.norm(self.transform(memory.masked_fill(~usable[..., None], 0)))

    def choose(self, logits: Tensor) -> Tensor:
        """logits (B, S, C) to the tokens with the highest class score, best first: (B, min(S, queries)) int64."""
        scores = logits.amax(dim=-1)
        return scores.topk(min(self.queries, scores.shape[1]), dim=1).indices

    def _positions(self, reference: Tensor) -> Tensor:
        """Positional query of a selected proposal (Deformable DETR, two-stage)."""
        return self.position_norm(self.position(encode_boxes(reference.sigmoid(), self.hidden // 2)))


def propose(layout: Layout) -> tuple[Tensor, Tensor]:
    """A box around every token: ((B, S, 4) float32 logits of centred boxes, (B, S) bool whether it can be used).

    Boxes of padding or too close to a border of the image are infinite in logit space (1 after the sigmoid).
    """
    boxes = []
    for level in range(len(layout.shapes)):
        centre = pixel_grid(layout, level)
        boxes.append(torch.cat([centre, torch.full_like(centre, _PROPOSAL_SIZE * 2.0**level)], dim=-1))
    proposals = torch.cat(boxes, dim=1)
    inside = ((proposals > _PROPOSAL_MARGIN) & (proposals < 1 - _PROPOSAL_MARGIN)).all(-1)
    usable = inside & ~layout.padding
    logits = torch.log(proposals / (1 - proposals))
    return logits.masked_fill(~usable[..., None], float("inf")), usable


def all_rows(embedding: nn.Embedding) -> Tensor:
    """The whole table, read through the module's own forward.

    Parameters belong to modules that return tensors: ZeRO stage 3 makes them whole for a backward pass when the
    gradient of such an output arrives, and does not look into dataclasses.
    """
    return embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device))


def _rows(tensor: Tensor, indices: Tensor) -> Tensor:
    """Rows (B, Q, X) of a (B, S, X) tensor."""
    return tensor.gather(1, indices[..., None].expand(-1, -1, tensor.shape[-1]))


def _for_batch(table: Tensor, batch: int) -> Tensor:
    return table[None].expand(batch, -1, -1)
