"""Random draws as a function of (seed, step, microbatch), never of the number of workers or of what ran before."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of `parts`; equal on every machine and in every process."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_microbatch(seed: int, step: int, microbatch: int) -> torch.Generator:
    """Seed torch's own generators (drop path, dropout) and return a CPU generator for the denoising queries.

    `step` counts optimizer steps of the stage from 0, `microbatch` is its number within the global batch.
    """
    torch.manual_seed(derive_seed("model", seed, step, microbatch))
    return torch.Generator().manual_seed(derive_seed("denoising", seed, step, microbatch))
