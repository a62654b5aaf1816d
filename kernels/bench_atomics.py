"""How fast a GPU adds rows of the value gradient: what bounds the backward kernel from below.

The additions of one encoder layer of DINO at 800x1333, batch 2, as that kernel makes them (rows of 32 float32, four
floats per instruction from compute capability 9.0 on), and nothing else: no reads, no arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from kernels.bench_timing import Row, least_times

CHANNELS, BLOCK, ROUNDS = 32, 4, 64
ADDITIONS = 22_756_352  # 2 images x 8 heads x 22,223 queries x 16 samples x 4 corners, to whole programs
# Rows that they go to: all of both images and heads, and those of the coarsest level alone.
TARGETS = {"all levels": 2 * 8 * 22_223, "the coarsest level": 2 * 8 * 273}


def measure_atomics(device: torch.device, turns: int) -> Iterator[Row]:
    """Milliseconds for all additions, which are 128 bytes each. No ratio: there is nothing to compare them with."""
    for name, rows in TARGETS.items():
        sums = torch.zeros((rows, CHANNELS), device=device)
        run = functools.partial(add_rows, sums, ADDITIONS)
        times = least_times({name: run}, device, turns)[name]
        gigabytes = ADDITIONS * CHANNELS * 4 / 1e9
        yield Row(f"atomic additions, {gigabytes:.2f} GB to the rows of {name}", "fp32", "forward", "triton", times)


def add_rows(sums: torch.Tensor, additions: int) -> None:
    """Adds one to rows of sums (R, 32) drawn by a hash, `additions` of them, to whole programs."""
    programs = triton.cdiv(additions, BLOCK * ROUNDS)
    atomic_rows_kernel[(programs,)](sums, sums.shape[0], ROUNDS=ROUNDS, BLOCK=BLOCK, CHANNELS=CHANNELS, num_warps=1)


@triton.jit(do_not_specialize=["rows"])
def atomic_rows_kernel(sums, rows, ROUNDS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.arange(0, CHANNELS)[None, :]
    ones = tl.full([BLOCK, CHANNELS], 1.0, tl.float32)
    for round in range(ROUNDS):
        number = (tl.program_id(0) * ROUNDS + round) * BLOCK + tl.arange(0, BLOCK)
        # Knuth's multiplicative hash: neighbours go far apart.
        row = ((number.to(tl.uint32) * 2654435761) >> 4) % rows.to(tl.uint32)
        tl.atomic_add(sums + row.to(tl.int64)[:, None] * CHANNELS + channel, ones, sem="relaxed")
