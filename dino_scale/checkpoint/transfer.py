"""Carrying weights from one stage to the next: by parameter name, and rows that belong to classes by class name.

Class names match when they are equal without regard to case, or when the alias table says that they mean the same
(COCO "tv" is Objects365 "Monitor/TV"). Rows of classes that only the new data set has keep their initialisation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dino_scale.errors import CheckpointError, ConfigError
from dino_scale.structures import Category


@dataclass(frozen=True)
class Transfer:
    """What was carried over. classes: (new class name, old class name or None when it starts afresh).

    changes: a line for each difference between the models that was bridged (see `reshape.py`).
    """

    parameters: int
    classes: tuple[tuple[str, str | None], ...]
    reinitialised: tuple[str, ...]
    changes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for the person who watches."""
        mapped = sum(old is not None for _, old in self.classes)
        return (
            f"{self.parameters} tensors carried over, class rows of {mapped} of {len(self.classes)} classes by name"
            + (f", {len(self.reinitialised)} tensors initialised anew" if self.reinitialised else "")
            + "".join(f"; {change}" for change in self.changes)
        )

    def table(self) -> list[str]:
        """One line per change of the model and per class."""
        return [*self.changes, *self._classes()]

    def _classes(self) -> list[str]:
        return [f"{new} <- {old}" if old is not None else f"{new} (new)" for new, old in self.classes]


def match_classes(
    old: Sequence[Category],
    new: Sequence[Category],
    aliases: Iterable[tuple[str, str]],
    choices: Mapping[str, str] | None = None,
) -> list[tuple[int, int]]:
    """(new contiguous id, old contiguous id) of every class that both have.

    `aliases`: pairs of names with the same meaning; a class of an equal name is preferred to one of an alias.
    `choices`: new name -> old name, preferred to both. ConfigError where a choice names a class that is not there.
    """
    chosen = {name.casefold(): choice.casefold() for name, choice in (choices or {}).items()}
    _require_known(chosen, new, old)
    known = {category.name.casefold(): index for index, category in enumerate(old)}
    other_names: dict[str, list[str]] = {}
    for one, another in aliases:
        other_names.setdefault(one.casefold(), []).append(another.casefold())
        other_names.setdefault(another.casefold(), []).append(one.casefold())
    pairs = []
    for index, category in enumerate(new):
        name = category.name.casefold()
        candidates = [chosen[name]] if name in chosen else [name, *other_names.get(name, [])]
        found = [known[candidate] for candidate in candidates if candidate in known]
        if found:
            pairs.append((index, found[0]))
    return pairs


def _require_known(choices: Mapping[str, str], new: Sequence[Category], old: Sequence[Category]) -> None:
    for names, categories, side in ((choices, new, "the data"), (choices.values(), old, "the weights")):
        unknown = sorted(set(names) - {category.name.casefold() for category in categories})
        if unknown:
            raise ConfigError(
                f"start.class_choices: '{unknown[0]}' is no class of {side}: expected 'class of the data: class of the "
                "weights to start from'"
            )


@torch.no_grad()
def carry_over(
    state: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    class_tensors: Collection[str],
    pairs: Sequence[tuple[int, int]],
    old: Sequence[Category],
    new: Sequence[Category],
    changes: Sequence[str] = (),
) -> Transfer:
    """Copy `state` into `target` (references to the new model's tensors), class rows by `pairs`.

    class_tensors: names whose first dimension counts classes (and possibly one more row for "no class", copied as it
    is). changes: what was bridged before, for the record. CheckpointError when a tensor that is not about classes is
    missing, left over or of another shape.
    """
    class_tensors = set(class_tensors)
    if left := sorted(state.keys() - target.keys()):
        raise CheckpointError(
            f"{left[0]} is in the weights to start from but not in this model ({len(left)} such tensor(s)): the two "
            "stages need the same model but for levels, queries and decoder layers"
        )
    copied = 0
    for name, destination in target.items():
        if name not in state:
            raise CheckpointError(
                f"{name} is not in the weights to start from: the two stages need the same model but for levels, "
                "queries and decoder layers"
            )
        source = state[name]
        if name in class_tensors:
            _copy_rows(source, destination, pairs, len(old), len(new))
        elif source.shape != destination.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(source.shape)} in the weights to start from, but {tuple(destination.shape)} "
                "here: the two stages need the same model but for levels, queries and decoder layers"
            )
        else:
            destination.copy_(source)
        copied += 1
    by_new = dict(pairs)
    classes = tuple(
        (category.name, old[by_new[index]].name if index in by_new else None) for index, category in enumerate(new)
    )
    return Transfer(copied, classes, tuple(sorted(class_tensors)) if not pairs else (), tuple(changes))


def _copy_rows(
    source: Tensor, destination: Tensor, pairs: Sequence[tuple[int, int]], old_count: int, new_count: int
) -> None:
    for new_index, old_index in pairs:
        destination[new_index].copy_(source[old_index])
    extra = destination.shape[0] - new_count
    if extra > 0 and source.shape[0] - old_count == extra:
        destination[new_count:].copy_(source[old_count:])
