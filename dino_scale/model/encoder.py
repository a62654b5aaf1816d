"""The deformable encoder (Deformable DETR, section 4.1): every token looks at a few places of every level."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_scale.config.schema import ModelConfig
from dino_scale.model.attention import DeformableAttention
from dino_scale.model.heads import FeedForward
from dino_scale.model.tokens import Layout, pixel_grid


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each followed by its residual and normalisation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = DeformableAttention(
            config.hidden, config.heads, config.levels, config.points, config.attention
        )
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.feedforward = FeedForward(config.hidden, config.feedforward, config.dropout)
        self.feedforward_norm = nn.LayerNorm(config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, position: Tensor, reference_points: Tensor, layout: Layout) -> Tensor:
        query = tokens + position
        seen = self.attention(query, reference_points, tokens, layout.padding, layout.shapes)
        tokens = self.attention_norm(tokens + self.dropout(seen))
        return self.feedforward_norm(tokens + self.feedforward(tokens))


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, tokens: Tensor, position: Tensor, layout: Layout) -> Tensor:
        """tokens, position: (B, S, C). Returns the memory (B, S, C)."""
        reference_points = reference_points_of(layout)
        for layer in self.layers:
            tokens = layer(tokens, position, reference_points, layout)
        return tokens


def reference_points_of(layout: Layout) -> Tensor:
    """(B, S, L, 2) float32: where each token's own centre lies on every level, as a fraction of that padded map."""
    centres = torch.cat([pixel_grid(layout, level) for level in range(len(layout.shapes))], dim=1)
    return centres[:, :, None] * layout.valid_ratios[:, None]
