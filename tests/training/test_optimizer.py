"""Parameter groups: who trains at which rate, and that nobody is forgotten or counted twice."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dino_scale.config.schema import BackboneConfig, OptimizerConfig
from dino_scale.errors import ConfigError
from dino_scale.model.dino import Dino, build_model
from dino_scale.training.optimizer import aligned, group_table, parameter_groups
from tests.support.tiny_detector import CLASSES, TINY, TINY_BACKBONE, tiny

SWIN = BackboneConfig(
    name="swin_tiny_patch4_window7_224",
    arguments={"embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]},
    outputs=(1, 2, 3),
    norm="native",
    frozen_stages=0,
)
CONVNEXT = BackboneConfig(
    name="convnext_atto",
    arguments={"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]},
    outputs=(1, 2, 3),
    norm="native",
    frozen_stages=0,
)
DECAYING = OptimizerConfig(learning_rate=1e-3, backbone_learning_rate=1e-4, backbone_layer_decay=0.5)


def built(backbone: BackboneConfig = TINY_BACKBONE) -> Dino:
    with torch.device("meta"):
        return build_model(tiny(backbone=backbone), CLASSES)


def rates(model: Dino, config: OptimizerConfig) -> dict[str, float]:
    """Rate of every parameter that some group holds; fails where two hold it."""
    found: dict[str, float] = {}
    for group in parameter_groups(model, config):
        for name, _ in group.parameters:
            assert name not in found
            found[name] = group.learning_rate
    return found


@pytest.mark.parametrize("config", [OptimizerConfig(), DECAYING], ids=["one", "decaying"])
@pytest.mark.parametrize("backbone", [TINY_BACKBONE, SWIN, CONVNEXT], ids=["resnet", "swin", "convnext"])
@pytest.mark.parametrize("frozen", [0, 2])
def test_every_trained_parameter_is_in_one_group(
    backbone: BackboneConfig, frozen: int, config: OptimizerConfig
) -> None:
    model = built(replace(backbone, frozen_stages=frozen))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert rates(model, config).keys() == trained
    assert (len(trained) < len(list(model.parameters()))) == (frozen > 0)


def test_two_groups_and_decay_on_everything() -> None:
    """As in the official code: norms, biases and embeddings decay too."""
    config = OptimizerConfig()
    detector, backbone = parameter_groups(built(), config)
    assert (detector.name, detector.learning_rate, detector.weight_decay) == ("detector", 1e-4, 1e-4)
    assert (backbone.name, backbone.learning_rate, backbone.weight_decay) == ("backbone", 1e-5, 1e-4)
    held = {name for name, _ in detector.parameters}
    assert {"decoder.norm.weight", "decoder.norm.bias", "level_embedding.weight"} <= held


def test_rate_falls_block_by_block_towards_the_stem() -> None:
    """Depths 1, 1, 2, 1 make five blocks; Swin's downsampling goes with the block it precedes, its stem is alone."""
    found = rates(built(SWIN), DECAYING)
    expected = {
        "backbone.body.patch_embed.proj.weight": 5,
        "backbone.body.layers_0.blocks.0.norm1.weight": 4,
        "backbone.body.layers_1.downsample.reduction.weight": 3,
        "backbone.body.layers_1.blocks.0.norm1.weight": 3,
        "backbone.body.layers_2.blocks.0.norm1.weight": 2,
        "backbone.body.layers_2.blocks.1.norm1.weight": 1,
        "backbone.body.layers_3.blocks.0.norm1.weight": 0,
        "backbone.norms.0.weight": 0,
    }
    for name, depth in expected.items():
        assert found[name] == pytest.approx(1e-4 * 0.5**depth), name
    assert found["decoder.norm.weight"] == 1e-3


@pytest.mark.parametrize("backbone", [TINY_BACKBONE, CONVNEXT], ids=["resnet", "convnext"])
def test_rate_never_rises_towards_the_stem(backbone: BackboneConfig) -> None:
    model = built(backbone)
    depths = model.backbone.depths()
    by_stage: dict[int, set[int]] = {}
    for name, depth in depths.items():
        if match := re.match(r"body\.(?:layer|stages_)(\d)", name):
            by_stage.setdefault(int(match[1]), set()).add(depth)
    ordered = [by_stage[stage] for stage in sorted(by_stage)]
    assert len(ordered) == 4
    assert all(min(early) >= max(late) for early, late in pairwise(ordered))
    stem = next(iter(depths.values()))
    assert stem == max(depths.values()) > max(ordered[0])


@pytest.mark.parametrize("value", [0.0, -0.5, 1.1])
def test_layer_decay_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="backbone_layer_decay is"):
        OptimizerConfig(backbone_layer_decay=value)


def test_table_counts_what_is_there() -> None:
    model = build_model(TINY, CLASSES)
    rows = group_table(parameter_groups(model, OptimizerConfig()))
    assert rows[0] == ("parameter group", "lr", "decay", "tensors", "parameters")
    assert [row[0] for row in rows[1:]] == ["detector", "backbone"]
    assert sum(int(row[3]) for row in rows[1:]) == len(list(model.parameters()))
    assert sum(int(row[4].replace(",", "")) for row in rows[1:]) == sum(p.numel() for p in model.parameters())
    lines = aligned(rows)
    assert len({len(line) for line in lines}) == 1 and "1e-05" in lines[2]
