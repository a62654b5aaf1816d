"""How large the programs of the Triton kernels are: fixed in a table and a rule, never searched for while training.

What decides is head size, levels, points, dtype and kind of reference. The number of tokens or queries does not,
because it changes with every batch of images.

The rule gives every thread one part of one row, as wide as one memory instruction, and every program one warp. It comes
from reading compiled code: then nothing is spilled, and the arithmetic of a row stays in the threads that sample it;
with more rows per thread or warp the compiler passes it through shared memory, two barriers for every sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Direction = Literal["forward", "backward"]
WARP, WIDEST_ACCESS, WIDEST_ATOMIC = 32, 16, 4


@dataclass(frozen=True)
class LaunchShape:
    """queries: of one program, a power of two. warps: of 32 threads each."""

    queries: int
    warps: int


# (direction, channels, levels, points, dtype, box) -> a shape that was faster than the rule's when timed on a card.
# None has been timed yet.
TIMED: dict[tuple[Direction, int, int, int, torch.dtype, bool], LaunchShape] = {}


def launch_shape(
    direction: Direction, channels: int, levels: int, points: int, dtype: torch.dtype, box: bool
) -> LaunchShape:
    timed = TIMED.get((direction, channels, levels, points, dtype, box))
    return timed or rule(direction, channels, dtype)


def rule(direction: Direction, channels: int, dtype: torch.dtype) -> LaunchShape:
    width = WIDEST_ATOMIC if direction == "backward" else WIDEST_ACCESS // dtype.itemsize
    block = 1 << (max(channels, width) - 1).bit_length()
    return LaunchShape(max(1, WARP * width // block), 1)
