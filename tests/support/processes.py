"""Running a function in several real processes that share a gloo process group."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.rank_server import PROVISION, Call

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 240) -> list[Any]:
    """`function(*arguments)` in `world` processes with torch.distributed joined; the results in rank order.

    `function` must be importable (a top-level function of a module). An exception in any rank fails the caller with its
    traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        content = pickle.dumps((function, arguments))
        server, _ = _server()
        try:
            server.send(Call(world, free_port(), folder, content, dict(os.environ), timeout))
            server.recv()
        except BaseException:  # of the test's time limit, too: what the server says next would be about this call
            server.close()
            _server.cache_clear()
            raise
        return [_result(Path(folder) / str(rank)) for rank in range(world)]


@functools.cache
def _server() -> tuple[Connection, subprocess.Popen[bytes]]:
    """The line to a process that forks ranks (`rank_server.py`), and that process; it ends when this one does."""
    ours, theirs = multiprocessing.Pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.rank_server", str(theirs.fileno())],
        cwd=ROOT,
        env=os.environ | PROVISION,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    return ours, process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _result(path: Path) -> Any:
    if not path.exists():
        raise AssertionError(f"rank {path.name} ended without a result")
    succeeded, value = pickle.loads(path.read_bytes())
    if not succeeded:
        raise AssertionError(f"rank {path.name} failed:\n{value}")
    return value
