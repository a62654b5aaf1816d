"""`dino-scale import-official`: a checkpoint of the authors' repository becomes a weights file."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from data_pipeline.categories import coco_categories, objects365_categories, rows_by_raw_id
from dino_scale.checkpoint.official_convert import Converted, from_official
from dino_scale.checkpoint.official_file import read_official
from dino_scale.checkpoint.official_model import OfficialModel, infer_model
from dino_scale.checkpoint.weights import Preparation, Weights, save_weights
from dino_scale.config.schema import DataConfig, ModelConfig
from dino_scale.errors import DataError, UserError
from dino_scale.structures import Category
from launch.commands.output import require_new_file

# The rows of an official class head are raw category ids, the ids that no class has included.
_KNOWN_HEADS = {91: coco_categories, 366: objects365_categories}
_COMPUTED = "(constant, computed)"


def run(arguments: argparse.Namespace) -> None:
    console = Console(highlight=False, soft_wrap=True)
    _require_usable(arguments)
    file = read_official(arguments.checkpoint, arguments.part)
    try:
        model = infer_model(file.state, file.settings)
        categories = _categories(model)
        converted = from_official(file.state, model)
    except DataError as error:
        raise DataError(f"{arguments.checkpoint}, part '{arguments.part}': {error}") from None
    data = DataConfig()
    preparation = Preparation(data.mean, data.std, arguments.short_side, arguments.max_size)
    save_weights(arguments.out, Weights(converted.state, model.config, categories, preparation))
    _show(converted.sources, arguments.names, console)
    console.print(_summary(arguments, converted, model))


def _require_usable(arguments: argparse.Namespace) -> None:
    require_new_file(arguments.out)
    if not 0 < arguments.short_side <= arguments.max_size:
        raise UserError(
            f"--short-side is {arguments.short_side} and --max-size {arguments.max_size}: expected "
            "0 < short side <= max size"
        )


def _categories(model: OfficialModel) -> tuple[Category, ...]:
    if model.classes not in _KNOWN_HEADS:
        raise DataError(
            f"the class head has {model.classes} rows: expected 91 (row = raw COCO id) or 366 (row = raw Objects365 "
            "id), the ones whose classes are known"
        )
    return rows_by_raw_id(_KNOWN_HEADS[model.classes](), model.classes)


def _show(sources: Mapping[str, str | None], every_name: bool, console: Console) -> None:
    if every_name:
        for official, own in sources.items():
            console.print(f"{official} -> {own or _COMPUTED}", markup=False)
    entries = Counter(_part_of(official) for official in sources)
    tensors = Counter(_part_of(own) for own in {own: official for official, own in sources.items() if own}.values())
    table = Table("official part", "entries", "tensors")
    for part, count in entries.items():
        table.add_row(part, str(count), str(tensors[part]))
    console.print(table)


def _part_of(official: str) -> str:
    """`transformer.encoder.layers.0.norm1.weight` -> `transformer.encoder`."""
    first = re.match(r"(transformer|backbone)\.\w+|\w+", official)
    assert first is not None
    return first[0]


def _summary(arguments: argparse.Namespace, converted: Converted, model: OfficialModel) -> str:
    own = set(converted.sources.values()) - {None}
    return (
        f"{len(converted.sources)} entries of part '{arguments.part}' mapped to {len(own)} tensors, none left over: "
        f"{_described(model.config)}, {model.classes} class rows, in {arguments.out}"
    )


def _described(config: ModelConfig) -> str:
    return (
        f"{config.backbone.name}, {config.levels} levels, {config.encoder_layers}+{config.decoder_layers} layers, "
        f"{config.queries} queries"
    )
