"""One checkpoint on its way to disk: a thread on every rank writes its files, that of rank 0 commits the whole.

The threads talk through the folder alone, which all machines share: a rank that has written and synced its files leaves
a mark with their digests, and rank 0, when all marks are there, writes the manifest and renames the folder. No
collective is used, because it would race with those of training.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from dino_scale.checkpoint import layout
from dino_scale.checkpoint.manifest import FILE_NAME, FileEntry, Manifest, Piece
from dino_scale.checkpoint.tensor_writer import write_tensors

_POLL_SECONDS = 0.05
VISIBLE_SECONDS = 60.0  # NFS shows a new file of another machine within this time


@dataclass(frozen=True)
class Shipment:
    """What this rank adds to a checkpoint.

    token: the same on all ranks and new for every attempt. contents: file name to tensors. manifest: without files and
    pieces. keep_last: how many ordinary checkpoints stay; None: this one is a best one, and the only such.
    """

    root: Path
    name: str
    token: str
    rank: int
    world: int
    contents: Mapping[str, Mapping[str, Tensor]]
    pieces: tuple[tuple[str, Piece], ...]
    manifest: Manifest
    keep_last: int | None

    @property
    def partial(self) -> Path:
        return layout.partial_folder(self.root, self.name, self.token)

    def mark(self, rank: int) -> Path:
        return self.partial / f"done-{rank:05d}.json"


class BackgroundWrite:
    """Begins when made. The tensors of the shipment must not change until `join` has returned.

    error: why this rank failed, or None. notes: what else is to be told; both are final after `join`.
    """

    def __init__(self, shipment: Shipment) -> None:
        self.shipment = shipment
        self.error: str | None = None
        self.notes: list[str] = []
        self._written = threading.Event()  # or failed: this rank writes no more data
        self._all_written = threading.Event()
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"save {shipment.name}", daemon=True)
        self._thread.start()

    def wait_for_own_files(self) -> None:
        self._written.wait()

    def expect_marks(self) -> None:
        """All ranks are known to have left their marks; those not seen soon will never be."""
        self._all_written.set()

    def cancel(self) -> None:
        """Do not commit."""
        self._cancelled.set()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._write_own_files()
            self._written.set()
            if self.shipment.rank == 0:
                self._commit()
        except OSError as error:
            self.error = _described(error, self.shipment.partial)
        except Exception as error:  # it would end with the thread, unseen
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self._written.set()

    def _write_own_files(self) -> None:
        shipment = self.shipment
        shipment.partial.mkdir(parents=True, exist_ok=True)
        files = {}
        for name, tensors in shipment.contents.items():
            files[name] = asdict(write_tensors(shipment.partial / name, tensors))
        pieces = [(name, asdict(piece)) for name, piece in shipment.pieces]
        mark = shipment.mark(shipment.rank)
        unfinished = mark.with_suffix(".partial")
        unfinished.write_text(json.dumps({"files": files, "pieces": pieces}), encoding="utf-8")
        os.rename(unfinished, mark)

    def _commit(self) -> None:
        marks = [self.shipment.mark(rank) for rank in range(self.shipment.world)]
        if not self._wait_for(marks):
            return
        manifest = _complete(self.shipment.manifest, marks)
        for mark in marks:
            mark.unlink()
        layout.write_synced(self.shipment.partial / FILE_NAME, manifest.to_json())
        layout.commit(self.shipment.partial, self.shipment.root / self.shipment.name)
        self._tidy(manifest.step)

    def _wait_for(self, marks: list[Path]) -> bool:
        """Until all marks are there; False when cancelled, or when some stay away."""
        deadline = None
        while missing := [rank for rank, mark in enumerate(marks) if not mark.exists()]:
            if self._cancelled.wait(_POLL_SECONDS):
                return False
            if deadline is None and self._all_written.is_set():
                deadline = time.monotonic() + VISIBLE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                ranks = ", ".join(map(str, missing))
                self.error = (
                    f"the files that rank {ranks} wrote to {self.shipment.root} cannot be seen from rank 0: the run "
                    "folder must be on a file system that all machines share"
                )
                return False
        return not self._cancelled.is_set()

    def _tidy(self, step: int) -> None:
        """The checkpoint is safe; what goes wrong from here on is told but is no failure."""
        try:
            if self.shipment.keep_last is None:
                layout.delete_other_best(self.shipment.root, step)
            else:
                layout.delete_surplus(self.shipment.root, step, self.shipment.keep_last)
        except OSError as error:
            self.notes.append(f"an old checkpoint stays: {_described(error, self.shipment.root)}")


def _complete(manifest: Manifest, marks: list[Path]) -> Manifest:
    files: dict[str, FileEntry] = {}
    pieces: dict[str, list[Piece]] = {}
    for mark in marks:
        content = json.loads(mark.read_text(encoding="utf-8"))
        files |= {name: FileEntry(**entry) for name, entry in content["files"].items()}
        for name, piece in content["pieces"]:
            pieces.setdefault(name, []).append(Piece(**piece))
    in_order = {name: tuple(sorted(items, key=lambda piece: piece.start)) for name, items in pieces.items()}
    return replace(manifest, files=files, pieces=in_order)


def _described(error: OSError, place: Path) -> str:
    """A failed write names no file in its error, so the folder stands in."""
    return f"{error.filename or place}: {(error.strerror or str(error)).lower()}"
