"""Work for Ray tasks that goes wrong once; by name, so that Ray's processes can import it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.shard_writer import ShardTask
from data_pipeline.tasks import Runner


@dataclass(frozen=True)
class Deadly:
    """A Runner of which one process dies, once, at shard 1: before it is written or after."""

    runner: Runner
    mark: Path
    before: bool

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        return self.runner.map(partial(work_and_die, function, self.mark, self.before), tasks)


def work_and_die(function: Callable[[Any], Any], mark: Path, before: bool, task: Any) -> Any:
    deadly = isinstance(task, ShardTask) and task.number == 1
    if deadly and before:
        die_once(mark)
    result = function(task)
    if deadly:
        die_once(mark)
    return result


def die_once(mark: Path) -> None:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
