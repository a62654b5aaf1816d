"""Batches on their way to the GPU: the copy of the next step's runs beside the computation of the present one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn, TypeVar

import torch

from dino_scale.structures import Batch

Item = TypeVar("Item")
Arrived = TypeVar("Arrived")


def on_device(steps: Iterable[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The same steps, in the same order, with their tensors on `device`.

    On CUDA, the copy of a step begins on a stream of its own before the step ahead of it is handed over, so that it
    runs while that one computes; the batches should be in pinned memory, otherwise the copy waits for itself.
    On the CPU this does nothing: the steps pass as they are and none is taken ahead of time.
    An error of `steps` is raised in the place of the step that it kept from coming, not earlier.
    """
    if device.type != "cuda":
        return iter(steps)
    return one_ahead(steps, _SideStream(device).begin)


def one_ahead(items: Iterable[Item], begin: Callable[[Item], Callable[[], Arrived]]) -> Iterator[Arrived]:
    """`begin(item)()` for every item, in order; an item is begun before the one ahead of it is handed over."""
    source = iter(items)
    finish = _begin_next(source, begin)
    while finish is not None:
        following = _begin_next(source, begin)
        yield finish()
        finish = following


def _begin_next(source: Iterator[Item], begin: Callable[[Item], Callable[[], Arrived]]) -> Callable[[], Arrived] | None:
    """What hands over the next item, or raises the error that came instead; None at the end."""
    try:
        return begin(next(source))
    except StopIteration:
        return None
    except Exception as error:
        return _raiser(error)


def _raiser(error: Exception) -> Callable[[], NoReturn]:
    def fail() -> NoReturn:
        raise error

    return fail


class _SideStream:
    """Copies on a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def begin(self, step: list[Batch]) -> Callable[[], list[Batch]]:
        with torch.cuda.stream(self.stream):
            copies = [batch.to(self.device) for batch in step]
            arrived = self.stream.record_event()

        def finish() -> list[Batch]:
            consumer = torch.cuda.current_stream(self.device)
            consumer.wait_event(arrived)  # the device waits, not this process
            for batch in copies:
                batch.record_stream(consumer)  # else their memory could be given out again while it is being read
            return copies

        return finish
