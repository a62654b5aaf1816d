"""How much of a checkpoint each rank reads, by the kernel's own count of bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dino_scale.checkpoint import store
from dino_scale.training.optimizer import ParameterGroup
from dino_scale.training.zero import ZeroEngine


class Wide(nn.Module):
    """Twelve megabytes of weights and moments."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(999, 500)
        self.second = nn.Linear(500, 1001)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.second(self.first(x)).pow(2).mean(), None


def wide_engine(stage: int) -> ZeroEngine:
    torch.manual_seed(0)
    module = Wide()
    groups = [ParameterGroup("all", 1e-2, 0.0, tuple(module.named_parameters()))]
    shape = {"microbatch": 1, "accumulation": 1, "clip_norm": 0.0, "betas": (0.9, 0.999), "epsilon": 1e-8}
    return ZeroEngine(module, module, groups, stage=stage, **shape)


def save_wide(stage: int, root: str) -> None:
    store.save(Path(root), wide_engine(stage), store.Position(1, 0, 1, 0, "none"), keep_last=1)


def bytes_read(stage: int, root: str) -> dict[str, int]:
    """Bytes that this process read to verify and to load, and those in all files together."""
    engine = wide_engine(stage)
    before = _count()
    newest = store.find_newest_together(Path(root), print)
    verified = _count()
    assert newest is not None
    store.load(*newest, engine)
    loaded = _count()
    total = sum(entry.bytes for entry in newest[1].files.values())
    return {"verify": verified - before, "load": loaded - verified, "total": total}


def what_is_said(root: str) -> tuple[str | None, list[str]]:
    """The name of the checkpoint that all ranks settle for, and what this rank was told."""
    said: list[str] = []
    newest = store.find_newest_together(Path(root), said.append)
    return (None if newest is None else newest[0].name), said


def _count() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])
