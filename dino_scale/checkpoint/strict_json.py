"""JSON from a file that anybody may have written: no NaN, no repeated names, no nesting that exhausts the stack."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def parse(data: bytes) -> dict[str, Any]:
    """The object in `data`; ValueError says what is wrong with it."""
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, expected an object")
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"the number {constant} is not JSON")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return content
