"""The part of the training state that this rank saves, copied to CPU memory at a step boundary.

The memory is taken once and used for every save; it is as large as what the rank owns, all kinds together, and pinned
where the state lies on a GPU, so that the copy runs at the speed of the bus.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dino_scale.checkpoint.manifest import COMMON, Piece, tensor_key
from dino_scale.training import distributed
from dino_scale.training.zero import ZeroEngine


class Snapshot:
    """contents: file name to the tensors it is to hold. pieces: what they are pieces of. Valid after `take`."""

    def __init__(self, engine: ZeroEngine) -> None:
        self._engine = engine
        rank = distributed.rank()
        self._is_first = rank == 0
        file = f"shard-{rank:05d}.safetensors"
        sources: dict[str, Tensor] = {}
        pieces = []
        for fragment in engine.fragments:
            offset, numel = fragment.owned
            if numel == 0:
                continue
            start = fragment.start + offset
            pieces.append((fragment.name, Piece(file, start, numel)))
            for kind, values in fragment.tensors.items():
                sources[tensor_key(kind, fragment.name, start)] = values.narrow(0, offset, numel)
        self.pieces = tuple(pieces)
        self._sources = list(sources.values())
        self._targets = _buffers(self._sources)
        self.contents: dict[str, dict[str, Tensor]] = {file: dict(zip(sources, self._targets, strict=True))}

    @property
    def bytes(self) -> int:
        """Size of the memory held."""
        return sum(target.numel() * target.element_size() for target in self._targets)

    @torch.no_grad()
    def take(self) -> None:
        """Copy the present state. Call on every rank (stage 3 gathers frozen parameters here)."""
        for target, source in zip(self._targets, self._sources, strict=True):
            target.copy_(source, non_blocking=True)
        untrained = self._engine.untrained()
        if self._is_first:
            self.contents[COMMON] = {name: value.contiguous() for name, value in untrained.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _buffers(sources: list[Tensor]) -> list[Tensor]:
    """CPU tensors like `sources`, cut from one block whose pages are there already (a first save must not wait)."""
    numel = sum(source.numel() for source in sources)
    pinned = any(source.is_cuda for source in sources)
    block = torch.empty(numel, dtype=torch.float32, pin_memory=pinned).fill_(0)
    return list(block.split([source.numel() for source in sources]))
