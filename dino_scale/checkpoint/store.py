"""Sharded checkpoints of a training engine: written by all ranks, read by any number of ranks under any ZeRO stage.

Layout of R/STAGE/checkpoints/step_00001234/ (names around it: `layout.py`):
    shard-00000.safetensors ...  what each writing rank owned: float32 pieces of weights, moments and average
    common.safetensors           frozen parameters and buffers, which are equal on all ranks
    manifest.json                table of contents with digests
Written by `saver.py`; here is what reads. Nothing reads a pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dino_scale.checkpoint.layout import list_candidates, list_checkpoints
from dino_scale.checkpoint.manifest import COMMON, RANDOM_RULE, Best, Manifest, Position, verify
from dino_scale.checkpoint.ranges import ParameterReader
from dino_scale.checkpoint.saver import Saver
from dino_scale.checkpoint.verification import verify_together
from dino_scale.errors import CheckpointError
from dino_scale.training import distributed
from dino_scale.training.zero import Fragment, ZeroEngine

__all__ = [
    "COMMON",
    "Best",
    "Manifest",
    "Position",
    "find_newest",
    "find_newest_together",
    "list_checkpoints",
    "load",
    "save",
]


def save(root: Path, engine: ZeroEngine, position: Position, keep_last: int) -> Path:
    """Write the engine's state as `root`/step_XXXXXXXX and wait for it; call on every rank. SaveError if it fails."""
    saver = Saver(root, engine, keep_last, print)
    saver.save(position, required=True)
    saver.settle()
    return list_checkpoints(root)[-1]


def find_newest(root: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest whole checkpoint in `root` with its manifest, None when there is none at all.

    A damaged one is skipped, with a message to `say` that names it and the one used instead. CheckpointError when every
    checkpoint is damaged: starting anew would throw work away without asking.
    """
    return _newest(root, list_candidates(root), verify, say)


def find_newest_together(root: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """`find_newest` on every rank at once, with the same result or error on all; each reads a share of the files."""
    return _newest(root, distributed.on_rank_zero(lambda: list_candidates(root)), verify_together, say)


def _newest(
    root: Path, folders: Sequence[Path], check: Callable[[Path], Manifest], say: Callable[[str], None]
) -> tuple[Path, Manifest] | None:
    problems: list[CheckpointError] = []
    for folder in reversed(folders):
        try:
            manifest = check(folder)
        except CheckpointError as error:
            problems.append(error)
            continue
        for problem in problems:
            say(f"{problem}; using {folder.name} instead")
        return folder, manifest
    if problems:
        raise CheckpointError(f"{problems[0]}; no whole checkpoint is left in {root}: delete that folder to start anew")
    return None


def load(folder: Path, manifest: Manifest, engine: ZeroEngine) -> None:
    """Put a checkpoint into the engine, whatever world size and stage wrote it; each rank reads only its own ranges.

    The caller has verified the folder (`find_newest`). CheckpointError when names, shapes or kinds differ.
    """
    _require_same_parameters(folder, manifest, engine)
    if manifest.random_rule != RANDOM_RULE:
        raise CheckpointError(
            f"{folder}: its run draws random numbers by rule {manifest.random_rule}, this program by {RANDOM_RULE}: "
            "resume with the dino-scale that wrote it"
        )
    try:
        with ParameterReader(folder, manifest) as reader:
            for fragment in engine.fragments:
                _fill(fragment, reader)
        untrained = load_file(folder / COMMON)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}: was changed or removed after it was verified ({error})") from None
    _set_untrained(folder / COMMON, untrained, engine)
    engine.set_optimizer_steps(manifest.optimizer_steps)
    engine.publish()


def _require_same_parameters(folder: Path, manifest: Manifest, engine: ZeroEngine) -> None:
    expected = engine.shapes()
    differing = sorted(
        name
        for name in expected.keys() | manifest.parameters.keys()
        if expected.get(name) != manifest.parameters.get(name)
    )
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{folder}: parameter {name} has shape {manifest.parameters.get(name)}, the model {expected.get(name)} "
            f"({len(differing)} parameters differ): resume with the configuration that wrote it"
        )
    missing = set(engine.kinds) - set(manifest.kinds)
    if missing:
        raise CheckpointError(
            f"{folder}: holds {', '.join(manifest.kinds)} but not {', '.join(sorted(missing))}: "
            "resume with the ema_decay that wrote it"
        )


def _fill(fragment: Fragment, reader: ParameterReader) -> None:
    """Read straight into the engine's memory, or into a buffer of one fragment where that is on a device."""
    for kind, values in fragment.tensors.items():
        host = values if values.device.type == "cpu" else torch.empty(fragment.numel)
        reader.read_into(kind, fragment.name, fragment.start, host.numpy().data.cast("B"))
        if host is not values:
            values.copy_(host)


def _set_untrained(path: Path, saved: dict[str, torch.Tensor], engine: ZeroEngine) -> None:
    present = engine.untrained()
    for name in sorted(saved.keys() | present.keys()):
        ours, theirs = _form(present.get(name)), _form(saved.get(name))
        if ours != theirs:
            raise CheckpointError(
                f"{path}: {name} is {theirs}, in the model {ours}: resume with the configuration that wrote it"
            )
    engine.set_untrained(saved)


def _form(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else f"of shape {list(tensor.shape)}"
