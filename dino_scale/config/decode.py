"""A chain's configuration: YAML and `--set` in, checked dataclasses out, every problem reported at once.

    config = load_chain(Path("configs/chain/demo.yaml"), ["launch.workers=1"])

Each problem reads `file:line: key: problem (did you mean X?)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dino_scale.config.dump import dump_chain
from dino_scale.config.schema import ChainConfig
from dino_scale.config.source import List, Mapping, Problems, Scalar, Tree, merge, override_tree, read_tree, text_tree
from dino_scale.errors import ConfigError

__all__ = ["decode_text", "dump_chain", "load_chain"]

Decoded = TypeVar("Decoded")

_INTEGER = re.compile(r"[+-]?[0-9](_?[0-9])*")
_FLOAT = re.compile(r"[+-]?([0-9](_?[0-9])*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NULLS = ("", "~", "null", "Null", "NULL")
_INVALID = object()  # stands for a value whose problem is already noted


def load_chain(path: Path, overrides: Sequence[str] = ()) -> ChainConfig:
    """The chain in the YAML file `path`, each `a.b.c=value` of `overrides` applied in order.

    Raises ConfigError, whose message lists every problem, one per line.
    """
    problems = Problems()
    root = read_tree(Path(path), problems)
    tree: Tree = root
    stages = root.entries.get("stages")
    names = list(stages.entries) if isinstance(stages, Mapping) else []
    for override in overrides:
        change = override_tree(override, problems)
        if change is None or _names_a_missing_stage(override, names, problems):
            continue
        tree = merge(tree, change)
    value = _Decoder(problems).decode(tree, ChainConfig, "")
    problems.raise_if_any()
    assert isinstance(value, ChainConfig)
    return value


def decode_text(text: str, kind: type[Decoded], where: str, overrides: Sequence[str] = ()) -> Decoded:
    """The dataclass `kind` from a YAML or JSON text found at `where` (the header of a weights file, say).

    Each `a.b=value` of `overrides` is applied in order. Raises ConfigError, whose message lists every problem, one per
    line.
    """
    problems = Problems()
    tree = text_tree(text, where, problems)
    for override in overrides:
        change = override_tree(override, problems)
        if change is not None:
            tree = merge(tree, change)
    value = _Decoder(problems).decode(tree, kind, "")
    problems.raise_if_any()
    assert isinstance(value, kind)
    return value


def _names_a_missing_stage(override: str, stages: list[str], problems: Problems) -> bool:
    """A typing error in a stage's name must not make a new stage of one key."""
    dotted = override.partition("=")[0]
    first, *rest = dotted.split(".")
    if first != "stages" or not rest or rest[0] in stages:
        return False
    text = f"there is no stage '{rest[0]}'{_nearest(rest[0], stages, 'the stages are')}"
    problems.add(f"--set {dotted}", f"stages.{rest[0]}", text)
    return True


class _Decoder:
    """Turns trees into values of the types a dataclass declares; notes every problem it meets."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems

    def decode(self, tree: Tree, kind: Any, key: str) -> Any:
        """The value of `tree` as type `kind`, or _INVALID with the problem noted."""
        origin = get_origin(kind)
        if dataclasses.is_dataclass(kind):
            return self._dataclass(tree, kind, key)
        if origin is dict:
            return self._dict(tree, get_args(kind)[1], key)
        if origin in (tuple, list):
            return self._sequence(tree, kind, key)
        if origin is Literal:
            return self._literal(tree, get_args(kind), key)
        if origin in (Union, types.UnionType):
            return self._union(tree, get_args(kind), key)
        return self._scalar(tree, kind, key)

    def _wrong(self, tree: Tree, key: str, expected: str) -> Any:
        self.problems.add(tree.where, key, f"is {_shown(tree)}, expected {expected}")
        return _INVALID

    def _dataclass(self, tree: Tree, kind: Any, key: str) -> Any:
        if not isinstance(tree, Mapping):
            return self._wrong(tree, key, f"a mapping with keys such as {_some(_field_names(kind))}")
        hints = get_type_hints(kind)
        values: dict[str, Any] = {}
        for name, value in tree.entries.items():
            full = f"{key}.{name}" if key else name
            if name in hints:
                values[name] = self.decode(value, hints[name], full)
            else:
                self.problems.add(value.where, full, f"unknown key{_suggestion(name, kind, key)}")
                values[name] = _INVALID
        if any(value is _INVALID for value in values.values()):
            return _INVALID
        try:
            return kind(**values)
        except ConfigError as error:
            where, named = _place_of(str(error), tree, key)
            self.problems.add(where, named, str(error))
            return _INVALID

    def _dict(self, tree: Tree, kind: Any, key: str) -> Any:
        if not isinstance(tree, Mapping):
            return self._wrong(tree, key, "a mapping (name: value lines)")
        values = {name: self.decode(value, kind, f"{key}.{name}") for name, value in tree.entries.items()}
        return _INVALID if any(value is _INVALID for value in values.values()) else values

    def _sequence(self, tree: Tree, kind: Any, key: str) -> Any:
        arguments = get_args(kind)
        fixed = get_origin(kind) is tuple and arguments[-1] is not Ellipsis
        expected = f"a list of {f'{len(arguments)} values' if fixed else 'values'}, such as {_example(kind)}"
        if not isinstance(tree, List) or (fixed and len(tree.items) != len(arguments)):
            return self._wrong(tree, key, expected)
        kinds = arguments if fixed else (arguments[0],) * len(tree.items)
        values = [
            self.decode(item, k, f"{key}[{i}]") for i, (item, k) in enumerate(zip(tree.items, kinds, strict=True))
        ]
        if any(value is _INVALID for value in values):
            return _INVALID
        return tuple(values) if get_origin(kind) is tuple else values

    def _literal(self, tree: Tree, choices: tuple[Any, ...], key: str) -> Any:
        if isinstance(tree, Scalar):
            for choice in choices:
                if tree.text == str(choice) and (tree.plain or isinstance(choice, str)):
                    return choice
        names = [str(choice) for choice in choices]
        near = difflib.get_close_matches(tree.text, names, n=1, cutoff=0.5) if isinstance(tree, Scalar) else []
        hint = f" (did you mean {near[0]}?)" if near else ""
        return self._wrong(tree, key, f"one of {', '.join(names)}{hint}")

    def _union(self, tree: Tree, kinds: tuple[Any, ...], key: str) -> Any:
        """The narrowest alternative that takes the value; text only when nothing else does."""
        grouped = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if grouped and isinstance(tree, Mapping):
            return self._dataclass(tree, grouped[0], key)
        for kind in (*(k for k in (bool, int, float) if k in kinds), *(k for k in kinds if get_origin(k)), str):
            if kind not in kinds:
                continue
            attempt = Problems()
            value = _Decoder(attempt).decode(tree, kind, key)
            if value is not _INVALID:
                return value
        return self._wrong(tree, key, " or ".join(_described(kind) for kind in kinds))

    def _scalar(self, tree: Tree, kind: Any, key: str) -> Any:
        value = _parse_scalar(tree, kind) if isinstance(tree, Scalar) else _INVALID
        if value is not _INVALID:
            return value
        hint = ""
        if isinstance(tree, Scalar) and kind is int and tree.plain and _FLOAT.fullmatch(tree.text):
            number = float(tree.text)
            hint = f" (did you mean {int(number)}?)" if number.is_integer() else ""
        if isinstance(tree, Scalar) and kind is bool:
            guess = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
            near = guess.get(tree.text.lower())
            hint = f" (did you mean {near}?)" if near else ""
        return self._wrong(tree, key, f"{_described(kind)}{hint}")


def _parse_scalar(tree: Scalar, kind: Any) -> Any:
    """The scalar as `kind` (str, bool, int, float), or _INVALID."""
    if kind is str:
        return tree.text if not (tree.plain and tree.text in _NULLS) else _INVALID
    if not tree.plain:
        return _INVALID
    if kind is bool:
        return {"true": True, "false": False}.get(tree.text, _INVALID)
    if kind is int and _INTEGER.fullmatch(tree.text) and len(tree.text) <= 40:
        return int(tree.text)
    if kind is float and _FLOAT.fullmatch(tree.text) and math.isfinite(float(tree.text)):
        return float(tree.text)
    return _INVALID


def _described(kind: Any) -> str:
    names = {str: "text ('' for none)", bool: "true or false", int: "a whole number", float: "a finite number"}
    if dataclasses.is_dataclass(kind):
        return f"a mapping with {' and '.join(_field_names(kind))}"
    return names[kind] if kind in names else f"a list such as {_example(kind)}"


def _example(kind: Any) -> str:
    arguments = get_args(kind)
    fixed = get_origin(kind) is tuple and arguments[-1] is not Ellipsis
    sample = {int: "1", float: "0.5", str: "a"}
    return f"[{', '.join([sample.get(arguments[0], 'a')] * (len(arguments) if fixed else 2))}]"


def _shown(tree: Tree) -> str:
    """A value as the user wrote it, short."""
    if isinstance(tree, Mapping):
        return "a mapping"
    if isinstance(tree, List):
        return f"a list of {len(tree.items)}"
    if tree.plain and tree.text == "":
        return "empty"
    text = tree.text if len(tree.text) <= 60 else tree.text[:57] + "..."
    return text if tree.plain else f"'{text}' (quoted)"


def _field_names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3])


def _nearest(name: str, known: list[str], otherwise: str, prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {prefix}{near[0]}?)" if near else f" ({otherwise} {', '.join(known) or 'none'})"


def _suggestion(name: str, kind: Any, key: str) -> str:
    """A key that exists one floor further down is more likely misplaced than mistyped."""
    prefix = f"{key}." if key else ""
    below = [path for path in _paths_below(kind) if path.split(".")[-1] == name]
    if below:
        return f" (did you mean {prefix}{below[0]}?)"
    return _nearest(name, _field_names(kind), "known keys are", prefix)


def _paths_below(kind: Any) -> list[str]:
    paths: list[str] = []
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            paths += [f"{name}.{field}" for field in _field_names(hint)]
            paths += [f"{name}.{path}" for path in _paths_below(hint)]
    return paths


def _place_of(message: str, tree: Mapping, key: str) -> tuple[str, str]:
    """(where, key) of the value that a dataclass's own check names first, or of the mapping around it.

    The check knows its place in the schema (`schedule.epochs is ...`), the tree its place in the file.
    """
    parts = message.split(" ", 1)[0].rstrip(":").split(".")
    for start in range(len(parts)):
        node: Tree | None = tree
        for part in parts[start:]:
            node = node.entries.get(part) if isinstance(node, Mapping) else None
        if node is not None:
            full = ".".join(parts[start:])
            return node.where, f"{key}.{full}" if key else full
    return tree.where, key
