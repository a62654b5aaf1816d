"""The checkpoints of one stage: what the trainer asks for, in the words of `dino_scale.checkpoint`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dino_scale.checkpoint.manifest import Best, Position
from dino_scale.checkpoint.saver import Saver
from dino_scale.config.schema import CheckpointConfig
from dino_scale.training.trainer import Progress
from dino_scale.training.zero import ZeroEngine

METRIC = "AP"


class StageCheckpoints:
    """As `dino_scale.training.trainer.Checkpoints`; all methods but `failed` and `close` are collective."""

    def __init__(
        self,
        root: Path,
        engine: ZeroEngine,
        config: CheckpointConfig,
        *,
        seed: int,
        index_digest: str,
        global_size: int,
        say: Callable[[str], None],
        present: str,
    ) -> None:
        """present: name of the checkpoint that the engine was loaded from, empty when there is none."""
        self._saver = Saver(root, engine, config.keep_last, say, present)
        self._keep_best = config.keep_best
        self._seed, self._index_digest, self._global_size = seed, index_digest, global_size

    def save(self, progress: Progress, required: bool = False) -> None:
        self._saver.save(self._position(progress), required=required)

    def failed(self) -> bool:
        return self._saver.failed()

    def settle(self) -> None:
        self._saver.settle()

    def close(self) -> None:
        self._saver.close()

    def evaluated(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Note an evaluation of the present weights; if it is the best so far, keep its checkpoint where configured."""
        value = metrics[METRIC]
        if value < 0 or (progress.best is not None and value <= progress.best.value):
            return  # -1: nothing could be measured
        progress.best = Best(METRIC, value, progress.step)
        if self._keep_best:
            self._saver.save(self._position(progress), best=True)

    def _position(self, progress: Progress) -> Position:
        return Position(
            step=progress.step,
            skipped_steps=progress.skipped,
            samples_seen=progress.step * self._global_size,
            seed=self._seed,
            index_digest=self._index_digest,
            best=progress.best,
        )
