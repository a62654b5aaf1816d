"""What to make of the errors that a group of workers ended with: whose fault, and whether trying again can help.

A mistake of the user, bad data, numbers that are not finite, too little memory and a bug of this program come again, so
they stop the run. A lost worker, machine or connection does not: the stage starts again from its newest checkpoint.
"""

from __future__ import annotations

import errno
from typing import Literal

import torch

from dino_scale.errors import USERS_FILE_ERRORS, DinoScaleError
from launch.ray_session import import_ray

Kind = Literal["ours", "memory", "file", "bug", "death", "device", "connection"]

# In order: the first one present among the errors of all workers is the cause, the others follow from it. A bug in one
# worker leaves the others waiting, it does not kill them; a death makes others fail in ways that look like bugs.
_PRECEDENCE: tuple[Kind, ...] = ("ours", "memory", "file", "death", "bug", "device", "connection")
FINAL: frozenset[Kind] = frozenset({"ours", "memory", "file", "bug"})
# Seconds to wait, after a failure of this kind, for one that explains it better.
PATIENCE: dict[Kind, float] = {"death": 0.5, "bug": 2.0, "device": 5.0, "connection": 10.0}

_PASSING_FILE_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO}
_CONNECTION_WORDS = ("gloo", "NCCL", "ProcessGroup", "Connection closed by peer", "Connection reset", "Broken pipe")
_MEMORY_WORDS = ("DefaultCPUAllocator", "CUDA out of memory", "Cannot allocate memory")


class Lost(Exception):
    """These workers cannot go on, but others can, from the newest checkpoint."""


def error_of(run: object) -> Exception | None:
    """The error a call ended with: the worker's own where a user can act on it; None if it succeeded or still runs."""
    ray = import_ray()
    try:
        ray.get(run, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return None
    except ray.exceptions.RayTaskError as error:
        return error.cause if isinstance(error.cause, DinoScaleError) or _is_the_users(error.cause) else error
    except ray.exceptions.RayError as error:
        return error
    return None


def kind_of(error: Exception) -> Kind:
    """error: as `error_of` gives it."""
    exceptions = import_ray().exceptions
    if isinstance(error, DinoScaleError):
        return "ours"
    if isinstance(error, exceptions.OutOfMemoryError) or "low on memory" in str(error):
        return "memory"  # Ray's own monitor; its other texts about a death list every conceivable cause
    if _is_the_users(error):
        return "file"
    if not isinstance(error, exceptions.RayTaskError):
        return "death"
    cause = error.cause
    if isinstance(cause, ConnectionError | torch.distributed.DistError):
        return "connection"
    if isinstance(cause, OSError) and cause.errno in _PASSING_FILE_ERRORS:
        return "connection"
    if isinstance(cause, torch.OutOfMemoryError | MemoryError) or _speaks_of(cause, _MEMORY_WORDS):
        return "memory"
    if isinstance(cause, RuntimeError) and "killed by signal" in str(cause):
        return "death"  # of a process that reads data for the worker
    if isinstance(cause, RuntimeError) and _speaks_of(cause, _CONNECTION_WORDS):
        return "connection"
    if isinstance(cause, RuntimeError) and "CUDA error" in str(cause):
        return "device"
    return "bug"


def cause_among(errors: dict[int, Exception]) -> tuple[int, Kind]:
    """The rank whose error explains those of the others, and its kind."""
    kinds = {rank: kind_of(error) for rank, error in errors.items()}
    rank = min(kinds, key=lambda rank: (_PRECEDENCE.index(kinds[rank]), rank))
    return rank, kinds[rank]


def in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _is_the_users(error: object) -> bool:
    return isinstance(error, OSError) and error.errno in USERS_FILE_ERRORS


def _speaks_of(error: BaseException, words: tuple[str, ...]) -> bool:
    text = str(error)
    return any(word in text for word in words)
