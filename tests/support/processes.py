"""Running a function in several real processes that share a gloo process group."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 240) -> list[Any]:
    """`function(*arguments)` in `world` processes with torch.distributed joined; the results in rank order.

    `function` must be importable (a top-level function of a module). An exception in any rank fails the caller with its
    traceback.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        common = (world, port, folder, function, arguments)
        processes = [context.Process(target=_rank, args=(rank, *common)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
            if process.is_alive():
                process.kill()
        return [_result(Path(folder) / str(rank)) for rank in range(world)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(rank: int, world: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    import torch

    from dino_scale.training import distributed

    torch.set_num_threads(1)
    try:
        distributed.join(rank, world, rank, world, "127.0.0.1", port)
        outcome = (True, function(*arguments))
        distributed.leave()
    except BaseException:
        outcome = (False, traceback.format_exc())
    Path(folder, str(rank)).write_bytes(pickle.dumps(outcome))
    if not outcome[0]:
        os._exit(1)  # the other ranks may wait in a collective for ever


def _result(path: Path) -> Any:
    if not path.exists():
        raise AssertionError(f"rank {path.name} ended without a result")
    succeeded, value = pickle.loads(path.read_bytes())
    if not succeeded:
        raise AssertionError(f"rank {path.name} failed:\n{value}")
    return value
