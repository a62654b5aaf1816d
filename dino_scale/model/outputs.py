"""What the detector returns.

Shape letters: Lyr decoder layers, B images, Q matching queries, P denoising queries of an image, C classes,
G denoising groups, T boxes of all images.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenoisingOutputs:
    """Predictions of the denoising queries (paper 3.3).

    logits: (Lyr, B, P, C). boxes: (Lyr, B, P, 4) float32 centred in [0, 1]. P is 0 when no image has a box.
    positives: (G, T) int64, the query within its image that was made to find target t in group g.
    groups: G.
    """

    logits: Tensor
    boxes: Tensor
    positives: Tensor
    groups: int


@dataclass(frozen=True)
class Outputs:
    """Predictions of all decoder layers, the last one being the answer.

    logits: (Lyr, B, Q, C), class scores before the sigmoid. boxes: (Lyr, B, Q, 4) float32 centred in [0, 1],
    relative to the image without its padding. encoder_logits (B, Q, C), encoder_boxes (B, Q, 4): of the selected
    proposals, None without query selection. denoising: in training with denoising only.
    """

    logits: Tensor
    boxes: Tensor
    encoder_logits: Tensor | None = None
    encoder_boxes: Tensor | None = None
    denoising: DenoisingOutputs | None = None
