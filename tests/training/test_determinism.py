"""Draws depend on (seed, step, microbatch) alone."""

from __future__ import annotations

import torch

from dino_scale.training.determinism import derive_seed, seed_microbatch


def _draws(*key: int) -> tuple[list[float], list[float]]:
    generator = seed_microbatch(*key)
    return torch.rand(3).tolist(), torch.rand(3, generator=generator).tolist()


def test_same_key_same_draws_whatever_ran_before() -> None:
    first = _draws(1, 2, 3)
    torch.rand(100)
    assert _draws(1, 2, 3) == first


def test_every_part_of_the_key_matters() -> None:
    keys = [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0), (12, 3, 0), (1, 23, 0)]
    assert len({tuple(_draws(*key)[1]) for key in keys}) == len(keys)


def test_seed_is_the_same_in_every_process_and_release() -> None:
    assert derive_seed("model", 0, 1, 2) == 2547020830052656257
