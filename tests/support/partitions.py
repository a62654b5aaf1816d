"""How DeepSpeed 0.19.8 cuts parameters among any number of workers, worked out without an engine."""

from __future__ import annotations

from launch.plan_memory import ModelSize


def parameter_sizes(size: ModelSize) -> list[int]:
    return [numel for group in size.groups for numel in group]


def pieces(size: ModelSize, stage: int, rank: int, world: int) -> list[tuple[int, int, int]]:
    """(parameter, start, elements) that `rank` writes: even shares of each parameter under stages 0 and 3, a slice of
    each concatenated group under 1 and 2. tests/launch/test_plan_memory.py compares
    real engines."""
    if stage in (0, 3):
        found = []
        for number, numel in enumerate(parameter_sizes(size)):
            share = -(-numel // world)
            begin = min(share * rank, numel)
            found.append((number, begin, min(share, numel - begin)))
        return [piece for piece in found if piece[2] > 0]
    found, number = [], 0
    for group in size.groups:
        share = -(-sum(group) // (2 * world)) * 2
        begin, end, place = share * rank, share * (rank + 1), 0
        for numel in group:
            low, high = max(begin, place), min(end, place + numel)
            if high > low:
                found.append((number, low - place, high - low))
            place, number = place + numel, number + 1
    return found
