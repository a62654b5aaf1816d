"""A configuration as YAML that decodes to the same, and as a flat list of leaves to compare."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

import yaml

from dino_scale.config.schema import ChainConfig

_BARE = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_WORDS_WITH_MEANING = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})


def dump_chain(config: ChainConfig, without: Collection[str] = ()) -> str:
    """YAML text with every leaf, resolved; `load_chain` of it gives an equal configuration.

    without: dotted keys of leaves that the text shall lack.
    """
    content = _plain(config)
    _remove(content, "", frozenset(without))
    text: str = yaml.dump(
        content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20, default_flow_style=False
    )
    return text


def leaves(config: ChainConfig) -> dict[str, Any]:
    """Dotted key -> value, tuples as lists, in the order of the schema."""
    found: dict[str, Any] = {}
    _collect(_plain(config), "", found)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value before, value after) of every leaf that changed; None where there was none."""
    keys = [*before, *(key for key in after if key not in before)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _remove(tree: dict[str, Any], prefix: str, keys: frozenset[str]) -> None:
    """Take the leaves called `keys` out of `tree`, and the sections that held nothing else."""
    for name, item in list(tree.items()):
        key = prefix + name
        if isinstance(item, dict) and item:
            _remove(item, f"{key}.", keys)
            if not item:
                del tree[name]
        elif key in keys:
            del tree[name]


def _collect(value: Any, key: str, found: dict[str, Any]) -> None:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            _collect(item, f"{key}.{name}" if key else name, found)
    else:
        found[key] = value


class _Dumper(yaml.SafeDumper):
    """Quotes every text that could be read as something else, writes lists on one line."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    bare = _BARE.fullmatch(value) is not None and value.lower() not in _WORDS_WITH_MEANING
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if bare else '"')


def _list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)
