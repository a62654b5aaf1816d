"""Checkpoints in official naming: recorded names, thinned to a small model, with values from `fill`."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from tests.support import fill

FOLDER = Path(__file__).parents[1] / "data" / "goldens"
ENCODER_LAYERS, DECODER_LAYERS, QUERIES = 1, 2, 30


def recorded_shapes(name: str) -> dict[str, list[int]]:
    """Name to shape of the official state dict `name`, such as "r50_4scale"."""
    return json.loads((FOLDER / f"state_dict_{name}.json").read_text(encoding="utf-8"))


def small_r50_shapes() -> dict[str, list[int]]:
    """The official 4-scale ResNet model with one block per stage, 1 + 2 layers and 30 queries."""
    shapes = {name: shape for name, shape in recorded_shapes("r50_4scale").items() if _is_kept(name)}
    return shapes | {"transformer.tgt_embed.weight": [QUERIES, 256]}


def _is_kept(name: str) -> bool:
    limits = {
        r"transformer\.encoder\.layers": ENCODER_LAYERS,
        r"transformer\.decoder\.layers": DECODER_LAYERS,
        r"(?:transformer\.decoder\.)?(?:class|bbox)_embed": DECODER_LAYERS,
        r"backbone\.0\.body\.layer\d": 1,
    }
    found = [(re.match(rf"{pattern}\.(\d+)\.", name), limit) for pattern, limit in limits.items()]
    return all(match is None or int(match[1]) < limit for match, limit in found)


def filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """float32 values made from the names; the same ones under all names of a shared head."""
    state = {}
    for name, shape in shapes.items():
        values = fill.values(name, shape)
        assert values is not None, name
        state[name] = torch.from_numpy(values)
    return state


def checkpoint(state: dict[str, Tensor], **options: object) -> dict[str, object]:
    """What the official training script saves, as far as it is of plain values."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 11)
    args = Namespace(**{"num_classes": 91, "nheads": 8, "pe_temperatureH": 20, "pe_temperatureW": 20, **options})
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 11,
        "args": args,
    }
