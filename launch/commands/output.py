"""Files that commands write for the user."""

from __future__ import annotations

from pathlib import Path

from dino_scale.errors import UserError


def require_new_file(path: Path) -> None:
    """UserError where --out exists: nobody's results are overwritten."""
    if path.exists():
        raise UserError(f"--out is {path}, which exists: give the name of a new file")
