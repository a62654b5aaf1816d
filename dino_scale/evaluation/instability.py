"""How much the matching changes from one moment of training to another (DN-DETR, arXiv 2203.01305).

DN-DETR looks at fixed images after every epoch and counts the queries whose matched box has changed. Its queries are
learned, so a query is the same one in every epoch. Selected queries (two-stage, DINO) have no such name: their index is
the rank of a score and says nothing. They are identified here by the token of the encoder's memory that they were
selected from, that is by a place and a level of the image; images must therefore be prepared alike every time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dino_scale.config.schema import LossConfig
from dino_scale.loss.matcher import match_layers
from dino_scale.model.dino import Dino
from dino_scale.model.preprocess import normalise
from dino_scale.precision import autocast
from dino_scale.structures import Batch


@dataclass(frozen=True)
class Instability:
    """Change of the last decoder layer's matching, mean over images with boxes.

    share: of an image's boxes, those whose matched query is another one, in [0, 1].
    queries: of an image, those whose matched box (or none) is another one; DN-DETR's IS, at most twice the boxes.
    """

    share: float
    queries: float


@torch.no_grad()
def matched_queries(
    model: Dino,
    batches: Iterable[Batch],
    loss: LossConfig,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    precision: str,
) -> list[Tensor]:
    """For each image with boxes the identity of the query matched to each box: (boxes of the image,) int64.

    Without denoising. A box without a query (more boxes than queries) has -1.
    """
    device = next(model.parameters()).device
    model.eval()
    identities: list[Tensor] = []
    for batch in batches:
        images, padding_mask = normalise(batch.to(device), mean, std)
        with autocast(device, precision):
            memory, layout = model.encode(images, padding_mask)
            queries = model.queries(memory, layout)
            decoded = model.decode(queries, None, memory, layout)
        targets = batch.targets.to(device)
        matched = match_layers(decoded.logits[-1:], decoded.boxes[-1:], targets, loss)[0].cpu()
        for image, one in enumerate(matched.split(list(targets.counts))):
            if len(one):
                identities.append(one if queries.tokens is None else _named(one, queries.tokens[image].cpu()))
    return identities


def instability(before: Sequence[Tensor], after: Sequence[Tensor]) -> Instability:
    """Change between two results of `matched_queries` on the same images; zero where no image has a box."""
    pairs = list(zip(before, after, strict=True))
    if not pairs:
        return Instability(0.0, 0.0)
    share = sum(int((old != new).sum()) / len(old) for old, new in pairs) / len(pairs)
    queries = sum(_changed_queries(old, new) for old, new in pairs) / len(pairs)
    return Instability(share, queries)


def _named(query: Tensor, tokens: Tensor) -> Tensor:
    """Tokens of queries (T,); -1 stays -1."""
    return torch.where(query >= 0, tokens[query.clamp(min=0)], query)


def _changed_queries(old: Tensor, new: Tensor) -> int:
    """Queries of one image whose box differs; a query that is matched on one side only counts too."""
    box_before = {query: box for box, query in enumerate(old.tolist()) if query >= 0}
    box_after = {query: box for box, query in enumerate(new.tolist()) if query >= 0}
    return sum(box_before.get(query) != box_after.get(query) for query in box_before.keys() | box_after.keys())
