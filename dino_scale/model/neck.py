"""Backbone features to maps of one width; further levels by stride-2 convolutions (official input_proj)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dino_scale.model.norms import group_norm


class Neck(nn.Module):
    """One projection per level: convolution and group normalisation.

    channels: of the backbone's outputs. levels: at least len(channels); the first additional level is made from the
    last raw backbone feature, each further one from the level before it.
    """

    def __init__(self, channels: Sequence[int], hidden: int, levels: int) -> None:
        super().__init__()
        self.outputs = len(channels)
        lateral = [nn.Conv2d(width, hidden, kernel_size=1) for width in channels]
        widths = [channels[-1], *[hidden] * levels]
        further = [
            nn.Conv2d(widths[extra], hidden, kernel_size=3, stride=2, padding=1)
            for extra in range(levels - len(channels))
        ]
        self.projections = nn.ModuleList(lateral + further)
        self.norms = nn.ModuleList(group_norm(hidden) for _ in range(levels))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """features: (B, channels[i], h, w) each. Returns one (B, hidden, h, w) per level, finest first."""
        maps: list[Tensor] = []
        for level, (project, norm) in enumerate(zip(self.projections, self.norms, strict=True)):
            if level < self.outputs:
                source = features[level]
            elif level == self.outputs:
                source = features[-1]
            else:
                source = maps[-1]
            maps.append(norm(project(source)))
        return maps
