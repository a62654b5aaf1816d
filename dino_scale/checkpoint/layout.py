"""Names in R/STAGE/checkpoints, and how folders get them and lose them.

    step_00001234/                 a checkpoint; the newest `keep_last` are kept
    best_00001200/                 the checkpoint of the best evaluation, if asked for
    .step_00001234.TOKEN.partial/  being written; TOKEN is different for every attempt of every process
    .step_00001234.TOKEN.retired/  being deleted

Only one rename makes a folder a checkpoint and one takes that away, so a folder called step_* or best_* is whole, or
was damaged later.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

STEP, BEST = "step_", "best_"
_PARTIAL, _RETIRED = ".partial", ".retired"


def checkpoint_name(step: int, best: bool = False) -> str:
    return f"{BEST if best else STEP}{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name[len(STEP) :])


def list_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoint folders, oldest first; not verified."""
    return _folders(root, STEP)


def list_best(root: Path) -> list[Path]:
    """Checkpoints of best evaluations, oldest first; there is one, but for a moment while it is replaced."""
    return _folders(root, BEST)


def list_candidates(root: Path) -> list[Path]:
    """What a run can be continued from, oldest first. A best one knows of its own evaluation, so it comes later."""
    found = [*list_checkpoints(root), *list_best(root)]
    return sorted(found, key=lambda folder: (step_of(folder), folder.name.startswith(BEST)))


def _folders(root: Path, prefix: str) -> list[Path]:
    if not root.is_dir():
        return []
    found = [folder for folder in root.iterdir() if folder.name.startswith(prefix) and folder.is_dir()]
    return sorted((folder for folder in found if folder.name[len(prefix) :].isdecimal()), key=step_of)


def partial_folder(root: Path, name: str, token: str) -> Path:
    return root / f".{name}.{token}{_PARTIAL}"


def commit(partial: Path, final: Path) -> None:
    """Make `partial` the checkpoint `final`; one of that name, which only a damaged one can be, is replaced."""
    sync(partial)
    if final.exists():
        retire(final)
    os.rename(partial, final)
    sync(final.parent)


def retire(folder: Path) -> None:
    """Delete a checkpoint; at no moment is half of it visible."""
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}{_RETIRED}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def remove_leftovers(root: Path) -> None:
    """Delete what killed processes were writing or deleting. Only for who has the run folder for himself."""
    if root.is_dir():
        for folder in root.iterdir():
            if folder.name.startswith(".") and folder.name.endswith((_PARTIAL, _RETIRED)):
                shutil.rmtree(folder, ignore_errors=True)


def delete_surplus(root: Path, step: int, keep_last: int) -> None:
    """Keep the newest `keep_last` up to `step`. Later ones were found damaged when the run was resumed before them;
    they do not count, and are replaced when the run comes to their step."""
    for folder in [found for found in list_checkpoints(root) if step_of(found) <= step][:-keep_last]:
        retire(folder)


def delete_other_best(root: Path, step: int) -> None:
    for folder in list_best(root):
        if step_of(folder) != step:
            retire(folder)


def write_synced(path: Path, text: str) -> None:
    """A new text file that survives a power failure."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
