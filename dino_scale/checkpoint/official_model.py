"""The model configuration behind an official checkpoint, from its names and shapes and the options stored with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from dino_scale.config.schema import BackboneConfig, DenoisingConfig, ModelConfig
from dino_scale.errors import DataError

RESNETS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
# (width, blocks, heads, window) -> timm name
SWINS: dict[tuple[int, tuple[int, ...], tuple[int, ...], int], str] = {
    (96, (2, 2, 6, 2), (3, 6, 12, 24), 7): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2), (3, 6, 12, 24), 7): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2), (4, 8, 16, 32), 7): "swin_base_patch4_window7_224",
    (128, (2, 2, 18, 2), (4, 8, 16, 32), 12): "swin_base_patch4_window12_384",
    (192, (2, 2, 18, 2), (6, 12, 24, 48), 7): "swin_large_patch4_window7_224",
    (192, (2, 2, 18, 2), (6, 12, 24, 48), 12): "swin_large_patch4_window12_384",
}
# Options that shapes do not show and that this model knows in one setting only.
_FIXED: dict[str, tuple[Any, ...]] = {
    "pre_norm": (False,),
    "dilation": (False,),
    "num_patterns": (0,),
    "position_embedding": ("sine",),
    "transformer_activation": ("relu",),
    "decoder_sa_type": ("sa",),
    "decoder_layer_noise": (False,),
    "two_stage_type": ("standard",),
    "two_stage_learn_wh": (False,),
    "two_stage_keep_all_tokens": (False,),
    "embed_init_tgt": (True,),
    "masks": (False,),
}


@dataclass(frozen=True)
class OfficialModel:
    """config: of the model. classes: rows of its class head."""

    config: ModelConfig
    classes: int


def infer_model(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> OfficialModel:
    """DataError names the tensor or option that no model of ours has."""
    for option, known in _FIXED.items():
        if option in settings and settings[option] not in known:
            raise DataError(f"the checkpoint was made with {option}={settings[option]!r}: expected {known[0]!r}")
    levels, hidden = _shape(state, "transformer.level_embed", 2)
    queries, _ = _shape(state, "transformer.tgt_embed.weight", 2)
    feedforward, _ = _shape(state, "transformer.encoder.layers.0.linear1.weight", 2)
    (weights,) = _shape(state, "transformer.encoder.layers.0.self_attn.attention_weights.bias", 1)
    (classes,) = _shape(state, "transformer.decoder.class_embed.0.bias", 1)
    heads = int(_number(settings, "nheads", 8))
    if heads < 1 or weights % (heads * levels) or hidden % heads:
        raise DataError(
            f"nheads is {heads}: expected a divisor of {hidden} channels and of {weights} attention weights on "
            f"{levels} levels"
        )
    config = ModelConfig(
        backbone=_backbone(state),
        hidden=hidden,
        heads=heads,
        levels=levels,
        points=weights // (heads * levels),
        feedforward=feedforward,
        encoder_layers=_count(state, r"transformer\.encoder\.layers\.(\d+)\."),
        decoder_layers=_count(state, r"transformer\.decoder\.layers\.(\d+)\."),
        dropout=_number(settings, "dropout", 0.0),
        queries=queries,
        position_temperature=_temperature(settings),
        look_forward="once" if settings.get("use_detached_boxes_dec_out") else "twice",
        denoising=_denoising(settings),
    )
    return OfficialModel(config, classes)


def _temperature(settings: Mapping[str, Any]) -> float:
    vertical, horizontal = (_number(settings, f"pe_temperature{axis}", 20.0) for axis in "HW")
    if vertical != horizontal:
        raise DataError(f"pe_temperatureH={vertical} and pe_temperatureW={horizontal}: expected the same for both")
    return vertical


def _denoising(settings: Mapping[str, Any]) -> DenoisingConfig:
    usual = DenoisingConfig()
    return DenoisingConfig(
        queries=int(_number(settings, "dn_number", usual.queries)),
        box_noise=_number(settings, "dn_box_noise_scale", usual.box_noise),
        label_noise=_number(settings, "dn_label_noise_ratio", usual.label_noise),
    )


def _number(settings: Mapping[str, Any], option: str, usual: float) -> float:
    value = settings.get(option, usual)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"the checkpoint was made with {option}={value!r}: expected a number")
    return float(value)


def _backbone(state: Mapping[str, Tensor]) -> BackboneConfig:
    if "backbone.0.body.conv1.weight" in state:
        return _resnet(state)
    if "backbone.0.patch_embed.proj.weight" in state:
        return _swin(state)
    own = next((name for name in state if name.startswith("backbone.")), "none of it")
    raise DataError(f"the backbone is neither a ResNet nor a Swin (it holds '{own}'): expected one of the two")


def _resnet(state: Mapping[str, Tensor]) -> BackboneConfig:
    layers = tuple(_count(state, rf"backbone\.0\.body\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
    widths = [_shape(state, f"backbone.0.body.layer{stage}.0.conv3.weight", 4)[0] for stage in range(1, 5)]
    outputs = tuple(1 + index for index in _outputs(state, widths))  # timm's feature 0 is the stem
    if layers in RESNETS:
        return BackboneConfig(name=RESNETS[layers], outputs=outputs)
    return BackboneConfig(name="resnet50", arguments={"layers": list(layers)}, outputs=outputs)


def _swin(state: Mapping[str, Tensor]) -> BackboneConfig:
    width = _shape(state, "backbone.0.patch_embed.proj.weight", 4)[0]
    stages = _count(state, r"backbone\.0\.layers\.(\d+)\.")
    depths = tuple(_count(state, rf"backbone\.0\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages))
    tables = [
        _shape(state, f"backbone.0.layers.{stage}.blocks.0.attn.relative_position_bias_table", 2)
        for stage in range(stages)
    ]
    heads, window = tuple(table[1] for table in tables), window_of(tables[0][0])
    outputs = _outputs(state, [width * 2**stage for stage in range(stages)])
    name = SWINS.get((width, depths, heads, window))
    arguments: dict[str, Any] = {}
    if name is None:
        name = "swin_tiny_patch4_window7_224"
        arguments = {"embed_dim": width, "depths": list(depths), "num_heads": list(heads), "window_size": window}
    return BackboneConfig(name=name, arguments=arguments, outputs=outputs, norm="native", frozen_stages=0)


def window_of(rows: int) -> int:
    """Side of the window whose relative position table has `rows` = (2 * side - 1) ** 2 rows."""
    return (isqrt(rows) + 1) // 2


def _outputs(state: Mapping[str, Tensor], widths: list[int]) -> tuple[int, ...]:
    """Stages that feed a level of their own, told by the width that the level's 1x1 convolution expects."""
    outputs = []
    for level in range(_count(state, r"input_proj\.(\d+)\.")):
        _, width, side, _ = _shape(state, f"input_proj.{level}.0.weight", 4)
        if side == 1:
            if width not in widths:
                raise DataError(f"input_proj.{level} expects {width} channels: the backbone's stages have {widths}")
            outputs.append(widths.index(width))
    return tuple(outputs)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers stand at the pattern's group, at the beginning of a name."""
    return len({found[1] for name in state if (found := re.match(pattern, name))})


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise DataError(f"'{name}' is missing: expected a DINO checkpoint of the official repository")
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise DataError(f"'{name}' has shape {shape}: expected {dimensions} dimensions, none of them 0")
    return shape
