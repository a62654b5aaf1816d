"""Saving while training goes on: a copy at the step boundary, then a thread that writes (`background.py`).

`save` and `settle` are collective: every rank calls them in the same order, from the thread that trains.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from dino_scale.checkpoint import layout
from dino_scale.checkpoint.background import BackgroundWrite, Shipment
from dino_scale.checkpoint.manifest import Group, Manifest, Position
from dino_scale.checkpoint.snapshot import Snapshot
from dino_scale.errors import SaveError
from dino_scale.training import distributed
from dino_scale.training.zero import ZeroEngine

_LAST_SECONDS = 5.0  # that a run which ends with an error gives a save in progress; a driver waits 10


class Saver:
    """Writes the state of an engine into a folder of checkpoints, at most one at a time."""

    def __init__(
        self, root: Path, engine: ZeroEngine, keep_last: int, say: Callable[[str], None], present: str = ""
    ) -> None:
        """Takes the memory for the copies. `root` lies where all ranks see it, and only this run writes there.

        say: called on every rank with what the user should know. present: the checkpoint that the engine was loaded
        from, if any; it is not written again.
        """
        self.root, self._engine, self._keep_last, self._say = root, engine, keep_last, say
        self._snapshot = Snapshot(engine)
        self._token = distributed.broadcast_object(uuid.uuid4().hex[:12])
        self._attempts = 0
        self._write: BackgroundWrite | None = None
        self._required = False
        self._saved = present  # the last one that was begun and has not failed
        self._libraries = {name: metadata.version(name) for name in ("torch", "deepspeed", "safetensors")}
        if distributed.rank() == 0:
            layout.remove_leftovers(root)
        distributed.barrier()

    def save(self, position: Position, *, required: bool = False, best: bool = False) -> None:
        """Copy the present state and begin to write it; waits for the save before it.

        required: if it fails, the `settle` that finds out raises SaveError; otherwise it says so and the run goes on.
        best: keep it as the checkpoint of the best evaluation, apart from the ordinary ones.
        """
        self.settle()
        name = layout.checkpoint_name(position.step, best)
        if self._saved == name:
            return  # no step has been done since; replacing a whole checkpoint would be a risk for nothing
        self._snapshot.take()
        self._saved, self._required = name, required
        self._attempts += 1
        self._write = BackgroundWrite(
            Shipment(
                self.root,
                name,
                f"{self._token}-{self._attempts}",
                distributed.rank(),
                distributed.world_size(),
                self._snapshot.contents,
                self._snapshot.pieces,
                self._manifest(position),
                None if best else self._keep_last,
            )
        )

    @property
    def bytes(self) -> int:
        """Memory of this rank's copy."""
        return self._snapshot.bytes

    def writing(self) -> bool:
        """Whether this rank is at work on a save. Not collective."""
        return self._write is not None and self._write.is_alive()

    def failed(self) -> bool:
        """Whether this rank's part of the save in progress has failed; then all ranks should `settle`."""
        return self._write is not None and self._write.error is not None

    def settle(self) -> None:
        """Wait until the save in progress, if any, is committed or has failed; SaveError if that one was required."""
        write, self._write = self._write, None
        if write is None:
            return
        write.wait_for_own_files()
        errors = distributed.gather_objects(write.error)
        if any(errors):
            write.cancel()
        write.expect_marks()
        write.join()
        errors[0], notes = distributed.broadcast_object((write.error, write.notes))
        for note in notes:
            self._say(note)
        reason = next((f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None), None)
        if reason is not None:
            self._give_up(write, reason)

    def _give_up(self, write: BackgroundWrite, reason: str) -> None:
        self._saved = ""
        shipment = write.shipment
        if distributed.rank() == 0:
            shutil.rmtree(shipment.partial, ignore_errors=True)  # on a full disk, room for the next attempt
        newest = distributed.broadcast_object([folder.name for folder in layout.list_checkpoints(self.root)][-1:])
        remains = f"the newest checkpoint is {newest[0]}" if newest else "there is no checkpoint yet"
        if self._required:
            raise SaveError(
                f"{shipment.name} could not be written ({reason}); {remains}: put that right, then continue with "
                "`dino-scale resume`"
            )
        self._say(f"SAVING FAILED: {shipment.name} could not be written ({reason}); {remains}, training goes on")

    def close(self) -> None:
        """On the way out after an error: a save in progress may end if that is soon done. Not collective."""
        if self._write is not None:
            self._write.join(_LAST_SECONDS)
            self._write.cancel()
            self._write = None

    def _manifest(self, position: Position) -> Manifest:
        engine = self._engine
        return Manifest(
            step=position.step,
            optimizer_steps=engine.optimizer_steps(),
            skipped_steps=position.skipped_steps,
            samples_seen=position.samples_seen,
            seed=position.seed,
            world_size=distributed.world_size(),
            zero_stage=engine.stage,
            index_digest=position.index_digest,
            kinds=engine.kinds,
            parameters=engine.shapes(),
            pieces={},
            files={},
            libraries=self._libraries,
            best=position.best,
            bf16_parameters=engine.bf16_parameters,
            groups={
                group.name: Group(group.learning_rate, group.weight_decay, len(group.parameters))
                for group in engine.groups
            },
        )
