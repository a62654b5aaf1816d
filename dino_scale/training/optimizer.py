"""Parameter groups: what trains, at which rate, with which decay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dino_scale.config.schema import OptimizerConfig


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate (at schedule factor 1) and a weight decay."""

    name: str
    learning_rate: float
    weight_decay: float
    parameters: tuple[tuple[str, nn.Parameter], ...]


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[ParameterGroup]:
    """Two groups as in the official code: the backbone and everything else; frozen parameters are in none."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    backbone = tuple(item for item in trained if _in_backbone(item[0]))
    detector = tuple(item for item in trained if not _in_backbone(item[0]))
    groups = [
        ParameterGroup("detector", config.learning_rate, config.weight_decay, detector),
        ParameterGroup("backbone", config.backbone_learning_rate, config.weight_decay, backbone),
    ]
    return [group for group in groups if group.parameters]


def _in_backbone(name: str) -> bool:
    return name.startswith("backbone.")
