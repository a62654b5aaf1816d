"""What is copied ahead arrives in order, whole, and with its errors in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from dino_scale.structures import Batch, Targets
from dino_scale.training.prefetch import _SideStream, on_device, one_ahead


def batch(number: int, side: int = 8) -> Batch:
    boxes = number % 3
    return Batch(
        images=torch.full((1, 3, side, side), number % 251, dtype=torch.uint8),
        sizes=((side, side),),
        original_sizes=((side, side),),
        sample_ids=(number,),
        image_ids=(number,),
        targets=Targets(torch.full((boxes,), number), torch.full((boxes, 4), number / 7), (boxes,)),
    )


class Copier:
    """Begins and finishes items, and notes when."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def begin(self, item: int) -> Callable[[], int]:
        self.told.append(f"begin {item}")

        def finish() -> int:
            self.told.append(f"finish {item}")
            return -item

        return finish


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_item_in_order_and_each_begun_before_the_one_ahead_is_handed_over(count: int) -> None:
    copier = Copier()
    found = []
    for item in one_ahead(range(count), copier.begin):
        found.append(item)
        copier.told.append(f"use {-item}")
    assert found == [-number for number in range(count)]
    for number in range(count - 1):
        assert copier.told.index(f"begin {number + 1}") < copier.told.index(f"use {number}")
    for number in range(count - 2):
        assert copier.told.index(f"use {number}") < copier.told.index(f"begin {number + 2}"), "one ahead, not two"


def broken_after(count: int) -> Iterator[int]:
    yield from range(count)
    raise ValueError("item is lost")


@pytest.mark.parametrize("count", [0, 1, 4])
def test_an_error_comes_in_the_place_of_its_item(count: int) -> None:
    found = []
    with pytest.raises(ValueError, match="item is lost"):
        for item in one_ahead(broken_after(count), Copier().begin):
            found.append(item)
    assert found == [-number for number in range(count)], "all before it are used first"


def test_an_error_of_the_copy_comes_in_its_place() -> None:
    def begin(item: int) -> Callable[[], int]:
        if item == 2:
            raise RuntimeError("no memory")
        return lambda: item

    found = []
    with pytest.raises(RuntimeError, match="no memory"):
        for item in one_ahead(range(9), begin):
            found.append(item)
    assert found == [0, 1]


def test_an_interrupt_does_not_wait() -> None:
    def interrupted() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(one_ahead(interrupted(), Copier().begin))


def test_on_the_cpu_steps_pass_as_they_are_and_none_is_taken_ahead() -> None:
    taken = []

    def steps() -> Iterator[list[Batch]]:
        for number in range(3):
            taken.append(number)
            yield [batch(number)]

    source = on_device(steps(), torch.device("cpu"))
    first = next(source)
    assert taken == [0] and first[0].images.device.type == "cpu"
    assert [step[0].sample_ids for step in source] == [(1,), (2,)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pinned", [False, True])
def test_batches_arrive_whole_while_the_device_is_busy(pinned: bool) -> None:
    """Each step keeps the computing stream busy for longer than a copy takes, so that memory that was given back too
    early, or read before it arrived, would show."""
    device = torch.device("cuda", torch.cuda.current_device())
    busy = torch.randn(2048, 2048, device=device)
    sums = []

    def steps() -> Iterator[list[Batch]]:
        for number in range(40):
            step = [batch(3 * number + place, 512 + 64 * place) for place in range(3)]
            yield [one.pin_memory() for one in step] if pinned else step

    for number, step in enumerate(on_device(steps(), device)):
        for _ in range(10):
            busy = busy @ busy / busy.norm()
        assert [one.sample_ids for one in step] == [(3 * number + place,) for place in range(3)]
        assert all(one.images.device == one.targets.boxes.device == one.targets.labels.device == device for one in step)
        sums += [(one.images.long().sum(), one.targets.labels.sum(), one.targets.boxes.sum()) for one in step]
        del step
    for number, (pixels, labels, boxes) in enumerate(sums):
        expected = batch(number, 512 + 64 * (number % 3))
        assert int(pixels) == int(expected.images.long().sum()) and int(labels) == int(expected.targets.labels.sum())
        assert float(boxes) == pytest.approx(float(expected.targets.boxes.sum()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_run_on_a_stream_of_their_own() -> None:
    """A copy that was begun arrives although the computing stream is not done."""
    device = torch.device("cuda", torch.cuda.current_device())
    side = _SideStream(device)
    torch.cuda._sleep(2_000_000_000)  # about a second of the device's clock
    computed = torch.cuda.current_stream(device).record_event()
    finish = side.begin([batch(1).pin_memory()])
    side.stream.synchronize()
    assert not computed.query(), "the copy has not waited for the computation"
    assert int(finish()[0].images[0, 0, 0, 0]) == 1
