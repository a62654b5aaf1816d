"""What is known about the published Objects365 v2 download and nowhere written in its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# Named in the training annotations, absent from every copy (mmdetection, configs/objects365, `objv2_ignore_list`).
KNOWN_MISSING = frozenset({"objects365_v2_00908726.jpg", "objects365_v1_00320532.jpg", "objects365_v1_00320534.jpg"})

# Unpacked archives put the patch folders below any of these, whatever the annotations say.
_FOLDERS = ("images/v1", "images/v2", "images", "v1", "v2")


def layout_folders(roots: Sequence[Path]) -> list[Path]:
    """The folders as given, then those below them in which copies of Objects365 keep their patches."""
    below = [root / folder for root in roots for folder in _FOLDERS if (root / folder).is_dir()]
    return [*roots, *below]
