"""Weights of one model made to fit another that has other feature levels, queries or decoder layers.

What both models have is carried over, what only the new one has keeps its initial values, and what only the old one has
is left out; each change is told in one line. Everything else must be equal: `transfer.carry_over` sees to that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dino_scale.config.schema import ModelConfig

_QUERIES = ("queries.content.weight", "queries.anchors.weight", "queries.positions.weight")
_PER_LEVEL = re.compile(r"(neck\.projections|neck\.norms|backbone\.norms)\.(\d+)\.(.+)")
_ATTENTION = re.compile(r"(encoder|decoder)\.layers\.\d+\.(cross_)?attention\.(offsets|weights)\.(weight|bias)")
_DECODER_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass
class Reshaped:
    """state: tensors under the new model's names and, where it is about these changes, of its shapes.

    changes: one line for each kind of change.
    """

    state: dict[str, Tensor]
    changes: list[str] = field(default_factory=list)


@torch.no_grad()
def reshape(state: Mapping[str, Tensor], old: ModelConfig, target: Mapping[str, Tensor], new: ModelConfig) -> Reshaped:
    """state: of a model `old`. target: initial tensors of a model `new`. Neither is changed."""
    result = Reshaped(dict(state))
    if level_names(old) != level_names(new):
        _change_levels(result, old, target, new)
    if old.queries != new.queries:
        _change_queries(result, old, target, new)
    if old.decoder_layers != new.decoder_layers:
        _change_decoder_layers(result, old, target, new)
    if old.denoising.kind != "none" and new.denoising.kind == "none":
        _drop(result, re.compile(r"denoiser\."))
        result.changes.append("denoising: its label embedding is left out")
    return result


def level_names(config: ModelConfig) -> list[str]:
    """What each feature level is made from: a backbone output, or a number of convolutions after the last one.

    Levels of equal name in two models with the same backbone show the image at the same scale.
    """
    outputs = config.backbone.outputs
    further = range(1, config.levels - len(outputs) + 1)
    return [f"output {index}" for index in outputs] + [f"output {outputs[-1]} + {count}" for count in further]


def _change_levels(result: Reshaped, old: ModelConfig, target: Mapping[str, Tensor], new: ModelConfig) -> None:
    old_names, new_names = level_names(old), level_names(new)
    pairs = [(new_names.index(name), old_names.index(name)) for name in new_names if name in old_names]
    _rename_by_level(result, target, pairs)
    for name, initial in target.items():
        source = result.state.get(name)
        if source is None:
            continue
        if name == "level_embedding.weight":
            result.state[name] = _rows(source, initial, pairs)
        elif _ATTENTION.fullmatch(name) and (old.heads, old.points) == (new.heads, new.points):
            by_level = (
                source.unflatten(0, (old.heads, old.levels, -1)),
                initial.unflatten(0, (new.heads, new.levels, -1)),
            )
            result.state[name] = _rows(*by_level, pairs, dim=1).flatten(0, 2)
    result.changes.append(
        f"levels {len(old_names)} -> {len(new_names)}: carried over {_listed(new_names[i] for i, _ in pairs)}; new "
        f"{_listed(name for name in new_names if name not in old_names)}; left out "
        f"{_listed(name for name in old_names if name not in new_names)}"
    )


def _rename_by_level(result: Reshaped, target: Mapping[str, Tensor], pairs: list[tuple[int, int]]) -> None:
    before = {name: value for name, value in result.state.items() if _PER_LEVEL.fullmatch(name)}
    _drop(result, _PER_LEVEL)
    old_of = dict(pairs)
    for name, initial in target.items():
        if found := _PER_LEVEL.fullmatch(name):
            part, level, rest = found[1], int(found[2]), found[3]
            source = before.get(f"{part}.{old_of[level]}.{rest}") if level in old_of else initial
            if source is not None:
                result.state[name] = source


def _change_queries(result: Reshaped, old: ModelConfig, target: Mapping[str, Tensor], new: ModelConfig) -> None:
    """The first ones: with mixed selection they belong to the proposals of the highest scores."""
    kept = min(old.queries, new.queries)
    for name in _QUERIES:
        if name in target and name in result.state:
            result.state[name] = _rows(result.state[name], target[name], [(row, row) for row in range(kept)])
    end = "the others start anew" if new.queries > kept else "the others are left out"
    result.changes.append(f"queries {old.queries} -> {new.queries}: the first {kept} are carried over, {end}")


def _change_decoder_layers(result: Reshaped, old: ModelConfig, target: Mapping[str, Tensor], new: ModelConfig) -> None:
    kept = min(old.decoder_layers, new.decoder_layers)
    for name in list(result.state):
        if (found := _DECODER_LAYER.match(name)) and int(found[1]) >= kept:
            del result.state[name]
    for name, initial in target.items():
        if (found := _DECODER_LAYER.match(name)) and int(found[1]) >= kept:
            result.state[name] = initial
    end = "the others start anew" if new.decoder_layers > kept else "the others are left out"
    result.changes.append(
        f"decoder layers {old.decoder_layers} -> {new.decoder_layers}: the first {kept} are carried over, {end}"
    )


def _rows(source: Tensor, initial: Tensor, pairs: list[tuple[int, int]], dim: int = 0) -> Tensor:
    """A copy of `initial` with slices of `source` where (new, old) pairs say so; `source` where the rest differs.

    A `source` that differs in more than the number of slices is returned as it is, so that its shape is refused.
    """
    if source.shape[:dim] + source.shape[dim + 1 :] != initial.shape[:dim] + initial.shape[dim + 1 :]:
        return source
    result = initial.clone()
    for new, old in pairs:
        result.select(dim, new).copy_(source.select(dim, old))
    return result


def _drop(result: Reshaped, pattern: re.Pattern[str]) -> None:
    result.state = {name: value for name, value in result.state.items() if not pattern.match(name)}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
