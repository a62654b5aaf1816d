"""Parameter groups: what trains, at which rate, with which decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dino_scale.config.schema import OptimizerConfig
from dino_scale.model.dino import Dino

_BACKBONE = "backbone."
_HEADINGS = ("parameter group", "lr", "decay", "tensors", "parameters")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate (at schedule factor 1) and a weight decay."""

    name: str
    learning_rate: float
    weight_decay: float
    parameters: tuple[tuple[str, nn.Parameter], ...]


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[ParameterGroup]:
    """Two groups as in the official code: the backbone and everything else; frozen parameters are in none.

    With `backbone_layer_decay` below 1 (a `Dino` only) the backbone is one group per block, from the first on. Weight
    decay is on every parameter, norms and biases too, as in the official code.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    backbone = tuple(item for item in trained if item[0].startswith(_BACKBONE))
    detector = tuple(item for item in trained if not item[0].startswith(_BACKBONE))
    groups = [ParameterGroup("detector", config.learning_rate, config.weight_decay, detector)]
    if config.backbone_layer_decay < 1:
        assert isinstance(model, Dino), "layer-wise decay needs a backbone that knows its blocks"
        groups += _by_depth(backbone, model.backbone.depths(), config)
    else:
        groups.append(ParameterGroup("backbone", config.backbone_learning_rate, config.weight_decay, backbone))
    return [group for group in groups if group.parameters]


def group_table(groups: Sequence[ParameterGroup]) -> list[tuple[str, ...]]:
    """Name, rate, decay, number of tensors and of parameters of every group as text, headings first."""
    rows = [
        (
            group.name,
            f"{group.learning_rate:.3g}",
            f"{group.weight_decay:.3g}",
            str(len(group.parameters)),
            f"{sum(parameter.numel() for _, parameter in group.parameters):,}",
        )
        for group in groups
    ]
    return [_HEADINGS, *rows]


def aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    """One line per row: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]


def _by_depth(
    parameters: Sequence[tuple[str, nn.Parameter]], depths: dict[str, int], config: OptimizerConfig
) -> list[ParameterGroup]:
    """One group per block; the last block trains at the backbone's rate, each one before it at a share of the next."""
    blocks: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        blocks.setdefault(depths[name.removeprefix(_BACKBONE)], []).append((name, parameter))
    return [
        ParameterGroup(
            f"backbone-{depth}",
            config.backbone_learning_rate * config.backbone_layer_decay**depth,
            config.weight_decay,
            tuple(blocks[depth]),
        )
        for depth in sorted(blocks, reverse=True)
    ]
