"""One pool of helper threads for work that releases the interpreter lock."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def in_threads(run: Callable[[int, int], None], items: int) -> None:
    """Calls run(start, stop) on ranges that cover [0, items), in as many threads as torch may use.

    The calling thread takes the first range; with one thread it takes everything. An exception of any range is raised
    here, after all of them have ended.
    """
    threads = min(torch.get_num_threads(), items)
    if threads <= 1:
        run(0, items)
        return
    bounds = [items * index // threads for index in range(threads + 1)]
    pool = _pool(os.getpid(), threads - 1)
    others = [pool.submit(run, start, stop) for start, stop in itertools.pairwise(bounds[1:])]
    try:
        run(bounds[0], bounds[1])
    finally:
        errors = [other.exception() for other in others]
    for error in errors:
        if error is not None:
            raise error


@functools.lru_cache(maxsize=8)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Keyed by process, because threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")
