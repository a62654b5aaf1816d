"""Exponential moving average of the weights, held in the same fragments as the optimizer state.

Each rank averages what it owns, in float32, so the average costs 1/world of a model copy under ZeRO 1 to 3. Every
parameter is counted once per step, also those that several decoder layers share (the official code counts shared heads
12 times: docs/differences.md).
"""

from __future__ import annotations

import torch

from dino_scale.training.zero import ZeroEngine

KIND = "ema"


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, once per optimizer step."""

    def __init__(self, engine: ZeroEngine, decay: float) -> None:
        """Attach the average to the engine's fragments; it starts as the present weights."""
        engine.attach(KIND)
        self.decay = decay
        self._averages = [fragment.tensors[KIND] for fragment in engine.fragments]
        self._weights = [fragment.tensors["fp32"] for fragment in engine.fragments]

    @torch.no_grad()
    def update(self) -> None:
        """Account for one optimizer step."""
        torch._foreach_lerp_(self._averages, self._weights, 1.0 - self.decay)
