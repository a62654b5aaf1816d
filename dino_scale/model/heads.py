"""Prediction heads. One of each serves all decoder layers; query selection has its own pair."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class CoordinateLinear(nn.Linear):
    """A Linear whose result decides where something is: float32, whatever autocast says and the weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.float(), self.weight.float(), self.bias.float())


class Perceptron(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return self.layers[-1](x)


class BoxHead(Perceptron):
    """(..., C) to a step (..., 4) in logit space, always float32: its last layer decides coordinates."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, hidden, hidden)
        self.layers.append(CoordinateLinear(hidden, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """Linear, ReLU, Linear, with dropout after each."""

    def __init__(self, hidden: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.expand = nn.Linear(hidden, inner)
        self.contract = nn.Linear(inner, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.contract(self.dropout(functional.relu(self.expand(x)))))
