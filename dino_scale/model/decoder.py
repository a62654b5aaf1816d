"""The decoder: queries look at each other and at the memory, and refine their boxes layer by layer (paper 3.1, 3.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino_scale.boxes import inverse_sigmoid
from dino_scale.config.schema import ModelConfig
from dino_scale.model.attention import DeformableAttention, SelfAttention
from dino_scale.model.heads import BoxHead, FeedForward, Perceptron
from dino_scale.model.position import encode_boxes
from dino_scale.model.tokens import Layout


@dataclass(frozen=True)
class Decoded:
    """hidden: (Lyr, B, Q, C) normalised layer outputs. logits: (Lyr, B, Q, classes). boxes: (Lyr, B, Q, 4) float32.

    references: what each layer's boxes were predicted against, (B, Q, 2 | 4) in [0, 1] each.
    """

    hidden: Tensor
    references: list[Tensor]
    logits: Tensor
    boxes: Tensor


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and feed-forward, each followed by residual and normalisation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config.hidden, config.heads, config.dropout)
        self.self_attention_norm = nn.LayerNorm(config.hidden)
        self.cross_attention = DeformableAttention(
            config.hidden, config.heads, config.levels, config.points, config.attention
        )
        self.cross_attention_norm = nn.LayerNorm(config.hidden)
        self.feedforward = FeedForward(config.hidden, config.feedforward, config.dropout)
        self.feedforward_norm = nn.LayerNorm(config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, memory: Tensor, layout: Layout, allowed: Tensor | None
    ) -> Tensor:
        """x, position: (B, Q, C). reference: (B, Q, L, 2 | 4), on the padded maps. memory: (B, S, C)."""
        x = self.self_attention_norm(x + self.dropout(self.self_attention(x, position, allowed)))
        seen = self.cross_attention(x + position, reference, memory, layout.padding, layout.shapes)
        x = self.cross_attention_norm(x + self.dropout(seen))
        return self.feedforward_norm(x + self.feedforward(x))


class Decoder(nn.Module):
    """Decoder layers and the class and box heads they share."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.hidden = config.hidden
        self.refine = config.refinement
        self.look_twice = config.look_forward == "twice"
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.hidden)
        self.class_head = nn.Linear(config.hidden, num_classes)
        self.box_head = BoxHead(config.hidden)
        self.position_head: Perceptron | None = None
        if config.query_form == "anchor":
            self.position_head = Perceptron(4 * (config.hidden // 2), config.hidden, config.hidden)

    def forward(
        self,
        content: Tensor,
        reference: Tensor,
        position: Tensor | None,
        memory: Tensor,
        layout: Layout,
        allowed: Tensor | None,
    ) -> Decoded:
        """content: (B, Q, C). reference: (B, Q, 2 | 4) in logit space. position: (B, Q, C), None with anchors.

        allowed: (Q, Q) bool, which query may see which; None: all.
        """
        x, reference = content, reference.sigmoid()
        references, hidden = [reference], []
        for index, layer in enumerate(self.layers):
            scaled = _on_padded_maps(reference, layout)
            placed = position if position is not None else self._position(scaled)
            x = layer(x, placed, scaled, memory, layout, allowed)
            hidden.append(self.norm(x))
            if index + 1 < len(self.layers):
                # The un-normalised output refines, the normalised one predicts (official code, asked in its issue 85).
                refined = _moved(self.box_head(x), reference) if self.refine else reference
                reference = refined.detach() if self.refine else reference
                references.append(refined if self.look_twice else reference)
        return self._predict(torch.stack(hidden), references)

    def _position(self, scaled: Tensor) -> Tensor:
        """Positional query from the box on the finest level (DAB-DETR, section 4.2)."""
        assert self.position_head is not None
        return self.position_head(encode_boxes(scaled[:, :, 0], self.hidden // 2))

    def _predict(self, hidden: Tensor, references: list[Tensor]) -> Decoded:
        steps = self.box_head(hidden)
        boxes = torch.stack([_moved(step, reference) for step, reference in zip(steps, references, strict=True)])
        return Decoded(hidden, references, self.class_head(hidden), boxes)


def _moved(step: Tensor, reference: Tensor) -> Tensor:
    """The box (..., 4) one step in logit space away from a box, or from a point (which moves the centre only)."""
    start = inverse_sigmoid(reference)
    if reference.shape[-1] == 2:
        start = torch.cat([start, torch.zeros_like(start)], dim=-1)
    return (step + start).sigmoid()


def _on_padded_maps(reference: Tensor, layout: Layout) -> Tensor:
    """References of the image (B, Q, 2 | 4) as fractions of the padded maps: (B, Q, L, 2 | 4)."""
    ratios = layout.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)
    return reference[:, :, None] * ratios[:, None]
