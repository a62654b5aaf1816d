"""The process group of a stage: joining, leaving, and the few collectives that training needs.

Everything works at world size 1 too, so that no caller asks which engine it runs under.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dino_scale.errors import DinoScaleError

T = TypeVar("T")


def join(
    rank: int, world: int, local_rank: int, local_world: int, address: str, port: int, timeout_seconds: int = 600
) -> None:
    """Join the process group: NCCL where this process has a GPU, gloo otherwise.

    Sets the environment variables that DeepSpeed reads, so it finds the group instead of making its own.
    """
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(local_world),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun serves the store itself
        dist.init_process_group(
            backend, init_method=f"tcp://{address}:{port}", rank=rank, world_size=world, timeout=timeout
        )
        return
    store = _open_store(rank, world, address, port, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _open_store(rank: int, world: int, address: str, port: int, timeout: datetime.timedelta) -> dist.TCPStore:
    """Where the ranks find one another; rank 0 serves it at `address` only (torch alone would listen everywhere)."""
    if rank != 0:
        return dist.TCPStore(address, port, world, is_master=False, timeout=timeout)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family, backlog=1024)
    return dist.TCPStore(
        address,
        port,
        world,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def leave() -> None:
    """Leave the process group; harmless when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def device() -> torch.device:
    """The device this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def sum_over_ranks(value: Tensor) -> Tensor:
    """Element-wise sum over all ranks, in place; returns `value`."""
    dist.all_reduce(value)
    return value


def any_rank(flag: bool) -> bool:
    """True on every rank when `flag` is true on at least one."""
    return bool(sum_over_ranks(torch.tensor(float(flag))).item() > 0)


def gather_objects(value: T) -> list[T]:
    """`value` of every rank, in rank order, on every rank."""
    gathered: list[T | None] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]


def gather_on_zero(value: T) -> list[T] | None:
    """`value` of every rank, in rank order, on rank 0 alone."""
    gathered: list[T | None] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered  # type: ignore[return-value]


def broadcast_object(value: T | None, source: int = 0) -> T:
    """The `value` of rank `source`, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]  # type: ignore[return-value]


def on_rank_zero(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and return its result on every rank; an error of our family is raised on every rank."""
    result: T | None = None
    error: DinoScaleError | None = None
    if rank() == 0:
        try:
            result = function()
        except DinoScaleError as problem:
            error = problem
    result, error = broadcast_object((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def barrier() -> None:
    dist.barrier()
