"""Reading checkpoints that training scripts of the official repository wrote, without running what is in them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dino_scale.errors import DataError, UserError

Part = Literal["model", "ema_model"]
# The official script stores its options in the file. A Namespace only holds values; nothing else is let through.
_ALLOWED: list[Any] = [argparse.Namespace]
_PARALLEL = "module."  # prefix of DistributedDataParallel
_FOREIGN = (
    (
        re.compile(
            r"^(neck\.(extra_)?convs\.|backbone\.(res\d|stem)\.|transformer\.\w+coder\.layers\.\d+\.attentions\.)"
        ),
        "a detrex checkpoint",
        "detrex gives each decoder layer heads of its own, 80 contiguous classes and position temperature 10000 with "
        "an offset of -0.5, none of which this model has",
    ),
    (
        re.compile(r"^(bbox_head\.|dn_query_generator\.)"),
        "an mmdetection checkpoint",
        "mmdetection gives each decoder layer heads of its own, which this model does not have",
    ),
)


@dataclass(frozen=True)
class OfficialFile:
    """state: official name to tensor, without the prefix of parallel training. settings: the script's options."""

    state: dict[str, Tensor]
    settings: Mapping[str, Any]


def read_official(path: Path, part: Part) -> OfficialFile:
    """One set of weights of an official checkpoint, on the CPU.

    UserError: no such file, or no such part in it. DataError: it cannot be read, holds objects other than tensors,
    plain values and an argparse.Namespace, or was written by another project.
    """
    content = _load(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}: expected a checkpoint with a part 'model'")
    state = content.get(part)
    if not isinstance(state, dict):
        parts = ", ".join(sorted(str(key) for key in content)[:8])
        raise UserError(f"{path}: has no part '{part}': expected one of its parts, which are {parts}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise DataError(f"{path}: entry {name!r} of part '{part}' is no tensor: expected a state dict")
    state = {name.removeprefix(_PARALLEL): value for name, value in state.items()}
    _refuse_foreign(path, state)
    return OfficialFile(state, _settings(path, content.get("args")))


def _load(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file: expected a checkpoint of the official DINO repository")
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged or hostile bytes can make the reader stumble in any way
        raise DataError(
            f"{path}: {_reason(error)}: expected a file of torch.save with tensors, plain values and an "
            "argparse.Namespace only"
        ) from None


def _reason(error: Exception) -> str:
    """torch's own message advises to load the file unsafely; only the name of the object is taken from it."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"refused, it would call {found[1]}" if found else f"cannot be read ({type(error).__name__})"


def _refuse_foreign(path: Path, names: Iterable[str]) -> None:
    for name in names:
        for pattern, kind, reason in _FOREIGN:
            if pattern.match(name):
                raise DataError(
                    f"{path}: is {kind} (it holds '{name}'); {reason}: use a checkpoint of the official repository"
                )


def _settings(path: Path, stored: Any) -> Mapping[str, Any]:
    if stored is None:
        return {}
    if isinstance(stored, argparse.Namespace):
        return vars(stored)
    if isinstance(stored, dict):
        return stored
    raise DataError(f"{path}: 'args' is a {type(stored).__name__}: expected an argparse.Namespace or a dictionary")
