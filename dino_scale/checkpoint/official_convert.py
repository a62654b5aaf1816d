"""Weights from official names to ours and back; one is the exact inverse of the other, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dino_scale.checkpoint.official import official_names
from dino_scale.checkpoint.official_model import OfficialModel, window_of
from dino_scale.config.schema import ModelConfig
from dino_scale.errors import DataError, UserError
from dino_scale.model.dino import build_model

_TABLE, _INDEX = "relative_position_bias_table", "relative_position_index"
_SHOWN = 4  # names in an error message


@dataclass(frozen=True)
class Converted:
    """state: our names. sources: every official name -> our name, or None for a constant that our model computes."""

    state: dict[str, Tensor]
    sources: dict[str, str | None]


def from_official(state: Mapping[str, Tensor], model: OfficialModel) -> Converted:
    """Every entry in its place in our model. DataError where one is left over, missing, or not what it must be."""
    with torch.device("meta"):  # names, shapes and types without the numbers
        expected = build_model(model.config, model.classes, pretrained=False).state_dict()
    names = {own: official_names(own, model.config.decoder_layers, model.config.backbone.outputs) for own in expected}
    sources: dict[str, str | None] = {official: own for own, several in names.items() for official in several}
    indices = _position_indices(state)
    sources |= dict.fromkeys(indices)
    _require_same_names(state.keys(), sources.keys())
    for official, own in sources.items():
        if own is None:
            _require_same_bits(state[official], indices[official], official, "the one of its window size")
        else:
            _require_form(state[official], expected[own], official)
            _require_same_bits(state[official], state[names[own][0]], official, names[own][0])
    return Converted({own: state[several[0]].contiguous() for own, several in names.items()}, sources)


def to_official(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of the official model, heads of all decoder layers and constants included.

    UserError where the configuration is one that the official repository does not have.
    """
    _require_official(config)
    official = {
        name: value
        for own, value in state.items()
        for name in official_names(own, config.decoder_layers, config.backbone.outputs)
    }
    return official | _position_indices(official)


def official_settings(config: ModelConfig, classes: int) -> dict[str, Any]:
    """The official options that names and shapes do not show, under their official names."""
    return {
        "num_classes": classes,
        "nheads": config.heads,
        "dropout": config.dropout,
        "pe_temperatureH": config.position_temperature,
        "pe_temperatureW": config.position_temperature,
        "use_detached_boxes_dec_out": config.look_forward == "once",
        "dn_number": config.denoising.queries,
        "dn_box_noise_scale": config.denoising.box_noise,
        "dn_label_noise_ratio": config.denoising.label_noise,
    }


def position_index(window: int) -> Tensor:
    """Row of the relative position table for each pair of places in a window: (window ** 2, window ** 2) int64."""
    places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    steps = places[:, None] - places[None] + window - 1
    return steps[..., 0] * (2 * window - 1) + steps[..., 1]


def _position_indices(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The index that the official Swin stores beside each of its relative position tables."""
    return {
        name.removesuffix(_TABLE) + _INDEX: position_index(window_of(value.shape[0]))
        for name, value in state.items()
        if name.endswith(_TABLE)
    }


def _require_same_names(given: Iterable[str], expected: Iterable[str]) -> None:
    left_over, missing = sorted(set(given) - set(expected)), sorted(set(expected) - set(given))
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for names, what in ((left_over, "left over"), (missing, "missing"))
        if names
    ]
    if problems:
        raise DataError(f"entries {' and '.join(problems)}: expected exactly the entries of an official DINO model")


def _require_form(value: Tensor, expected: Tensor, name: str) -> None:
    if value.shape != expected.shape or value.dtype != expected.dtype:
        raise DataError(
            f"'{name}' is {value.dtype} of shape {tuple(value.shape)}: expected {expected.dtype} of shape "
            f"{tuple(expected.shape)}, as its other entries imply"
        )


def _require_same_bits(value: Tensor, expected: Tensor, name: str, other: str) -> None:
    if value is expected:
        return
    if value.dtype != expected.dtype or value.shape != expected.shape or _bits(value) != _bits(expected):
        raise DataError(
            f"'{name}' differs from {other}: expected equal values; heads that decoder layers do not share "
            "(dec_pred_*_embed_share False) and other position indices have no place in this model"
        )


def _bits(value: Tensor) -> bytes:
    return value.contiguous().numpy().tobytes()


def _require_official(config: ModelConfig) -> None:
    backbone = config.backbone
    family = "frozen_batch" if backbone.name.startswith("resnet") else "native"
    wanted = (
        ("backbone.name", backbone.name, backbone.name.startswith(("resnet", "swin_")), "a ResNet or a Swin"),
        ("backbone.norm", backbone.norm, backbone.norm == family, f"'{family}'"),
        ("query_selection", config.query_selection, config.query_selection == "mixed", "'mixed'"),
        ("query_form", config.query_form, config.query_form == "anchor", "'anchor'"),
        ("refinement", config.refinement, config.refinement, "true"),
        ("denoising.kind", config.denoising.kind, config.denoising.kind == "contrastive", "'contrastive'"),
    )
    for key, value, holds, expected in wanted:
        if not holds:
            raise UserError(
                f"model.{key} of these weights is '{value}', which the official model does not have: expected "
                f"{expected}; export with --format safetensors instead"
            )
