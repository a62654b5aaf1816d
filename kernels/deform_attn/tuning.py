"""How large the programs of the Triton kernels are: fixed in a table and a rule, never searched for while training.

What decides is head size, levels, points, dtype and kind of reference. The number of tokens or queries does not,
because it changes with every batch of images.

The rule gives every thread one part of one row, as wide as one memory instruction, and every program one warp. It comes
from reading compiled code, not from timing: then nothing is spilled, and the arithmetic of a row stays in the threads
that sample it; with more rows per thread or warp the compiler passes it through shared memory, two barriers for every
sample. docs/kernels.md has the registers that were found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Direction = Literal["forward", "backward"]
WARP, WIDEST_ACCESS, WIDEST_ATOMIC = 32, 16, 4
# The backward kernel keeps four numbers per query and sample until its end. Above so many samples the compiler, left
# alone, spills a few of them for the sake of more programs at once; told the real limit of the hardware, it does not.
SAMPLES_OF_ITS_OWN_ACCORD, REGISTERS_OF_A_THREAD = 16, 255
# Queries times samples (to the next power of two) of a backward program, above which even all registers do not do.
MOST_SLOPES = 512
WIDE_ROW, MANY_SAMPLES = 128, 32  # of the windowed kernel: bytes; samples of one query and head


@dataclass(frozen=True)
class LaunchShape:
    """queries: of one program, a power of two. warps: of 32 threads each. registers: limit per thread, None: the
    compiler's choice."""

    queries: int
    warps: int
    registers: int | None = None


@dataclass(frozen=True)
class WindowShape:
    """Of the windowed value gradient. cells: of the window, summed at once; warps: of one program."""

    cells: int
    warps: int


# (direction, channels, levels, points, dtype, box) -> a shape that was faster than the rule's when timed on a card.
# None has been timed yet.
TIMED: dict[tuple[Direction, int, int, int, torch.dtype, bool], LaunchShape] = {}


def launch_shape(
    direction: Direction, channels: int, levels: int, points: int, dtype: torch.dtype, box: bool, fixed: bool = False
) -> LaunchShape:
    """fixed: sums in fixed point."""
    timed = None if fixed else TIMED.get((direction, channels, levels, points, dtype, box))
    return timed or rule(direction, channels, levels * points, dtype, fixed)


def rule(direction: Direction, channels: int, samples: int, dtype: torch.dtype, fixed: bool = False) -> LaunchShape:
    """samples: of one query and head. fixed: sums in fixed point, whose integers take twice the registers."""
    # Rows of an odd head size begin anywhere; one instruction loads as much of them as is always aligned. The rows that
    # the backward kernel adds to are padded.
    loaded = min(WIDEST_ACCESS // dtype.itemsize, channels & -channels)
    width = WIDEST_ATOMIC if direction == "backward" else loaded
    queries = max(1, WARP * width // _power_of_two(max(channels, width)))
    if direction == "forward" or (samples <= SAMPLES_OF_ITS_OWN_ACCORD and not fixed):
        return LaunchShape(queries, 1)
    return LaunchShape(min(queries, MOST_SLOPES // _power_of_two(samples)), 1, REGISTERS_OF_A_THREAD)


def window_shape(row_bytes: int, samples: int) -> WindowShape:
    """With 64 cells and four warps, wide rows spill for compute capability 8.0, and rows half as wide of many samples.

    row_bytes: of the gradient of one query and head, its channels filled up to the next power of two.
    samples: of one query and head.
    """
    if row_bytes > WIDE_ROW:
        return WindowShape(cells=32, warps=8)
    return WindowShape(cells=64, warps=8 if row_bytes == WIDE_ROW and samples > MANY_SAMPLES else 4)


def _power_of_two(number: int) -> int:
    """The smallest that is not smaller."""
    return 1 << (number - 1).bit_length()
