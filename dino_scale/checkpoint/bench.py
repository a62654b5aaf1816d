"""What saving and loading cost: against a plain torch.save of the same state, and against the bare disk.

`measure` runs on every rank of a joined process group; times are those of the slowest rank, bytes the sum of all. What
is done several times counts with its least time: the rest is other work of the machine.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from dino_scale.checkpoint import store
from dino_scale.checkpoint.manifest import Position
from dino_scale.checkpoint.reshard import reshard
from dino_scale.checkpoint.saver import Saver
from dino_scale.config.schema import LossConfig, ModelConfig, OptimizerConfig
from dino_scale.loss.criterion import Criterion
from dino_scale.model.dino import build_model
from dino_scale.training import distributed
from dino_scale.training.ema import WeightAverage
from dino_scale.training.objective import Objective
from dino_scale.training.optimizer import parameter_groups
from dino_scale.training.zero import ZeroEngine

_BLOCK = 4 << 20
_CLASSES = 80
_MATRIX = 512  # rows of the matrices whose product stands for a step's work
_PARTS = 3  # shards after resharding


@dataclass(frozen=True)
class Row:
    """One figure. against, ratio: what it is compared with, and how many times that it is."""

    what: str
    value: float
    unit: str
    against: str = ""
    ratio: float | None = None


def build_engine(config: ModelConfig) -> ZeroEngine:
    """A detector under ZeRO 1 with moments and average, as after some training: no two kinds are alike."""
    torch.manual_seed(0)
    model = build_model(config, _CLASSES, pretrained=False)
    optimizer = OptimizerConfig()
    engine = ZeroEngine(
        Objective(model, Criterion(LossConfig()), precision="fp32", mean=(0.5,) * 3, std=(0.25,) * 3),
        model,
        parameter_groups(model, optimizer),
        stage=1,
        microbatch=1,
        accumulation=1,
        clip_norm=optimizer.clip_norm,
        betas=optimizer.betas,
        epsilon=optimizer.epsilon,
    )
    WeightAverage(engine, 0.9997)
    for fragment in engine.fragments:
        for number, kind in enumerate(engine.kinds, start=1):
            fragment.tensors[kind].copy_(fragment.tensors["fp32"] * number)
    return engine


def measure(engine: ZeroEngine, folder: Path, turns: int) -> list[Row]:
    """Rows about saving, loading and resharding; `folder` is new and lies on the disk to be measured."""
    rows, plain = _plain_save(engine, folder / "plain", turns)
    before = _resident()
    _forget_peak()
    saver = Saver(folder / "checkpoints", engine, 1, _refuse)
    size = _sum(saver.bytes)
    rows.insert(0, Row("state, all kinds", size / 1e9, "GB"))
    rows += _saves(saver, size, plain, turns, _raw_write(folder / "raw", saver.bytes, turns))
    rows.append(_memory("peak extra memory of saving", before, size))
    rows += _loads(engine, folder, size, turns)
    return rows + distributed.on_rank_zero(lambda: _resharding(folder, size))


def _plain_save(engine: ZeroEngine, folder: Path, turns: int) -> tuple[list[Row], float]:
    """torch.save by every rank of what it owns, not synced: what the training loop would wait for."""
    state = {(item.name, item.start, kind): item.tensors[kind] for item in engine.fragments for kind in engine.kinds}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / str(distributed.rank())
    seconds: list[float] = []
    before = _resident()
    _forget_peak()
    for _ in range(turns):
        path.unlink(missing_ok=True)
        os.sync()
        with _timed(seconds):
            torch.save(state, path)
    size = sum(values.numel() * values.element_size() for values in state.values())
    rows = [
        Row("plain torch.save, not synced", min(seconds), "s"),
        _memory("peak extra memory of torch.save", before, _sum(size)),
    ]
    path.unlink()
    return rows, min(seconds)


def _saves(saver: Saver, size: float, plain: float, turns: int, raw: float) -> list[Row]:
    stopped: list[float] = []
    whole: list[float] = []
    for turn in range(turns + 1):
        os.sync()
        with _timed(whole):
            with _timed(stopped):
                saver.save(Position(turn, 0, turn, 0, "bench"), required=True)
            saver.settle()
    alone = _work(lambda: True)
    saver.save(Position(turns + 1, 0, 0, 0, "bench"), required=True)
    beside = _work(saver.writing)
    saver.settle()
    first, stop, total = stopped[0], min(stopped[1:]), min(whole[1:])
    return [
        Row("training stopped by the first save", first, "s", "plain torch.save", first / plain),
        Row("training stopped by a save", stop, "s", "plain torch.save", stop / plain),
        Row("raw write and sync of as many bytes", raw, "s"),
        Row("save until committed", total, "s", "raw write and sync", total / raw),
        Row("save, throughput", size / total / 1e9, "GB/s"),
        Row("a step of matrix products beside a save", beside[0], "s", "alone", beside[0] / alone[0]),
        Row("a step of Python beside a save", beside[1], "s", "alone", beside[1] / alone[1]),
    ]


def _work(go_on: Callable[[], bool]) -> tuple[float, float]:
    """Median seconds of matrix products and of pure Python, repeated while `go_on` and for at most a second."""
    matrix = torch.ones(_MATRIX, _MATRIX)
    products: list[float] = []
    python: list[float] = []
    end = time.perf_counter() + 1.0
    while (go_on() or not products) and time.perf_counter() < end:
        begin = time.perf_counter()
        matrix @ matrix
        middle = time.perf_counter()
        sum(range(50_000))
        products.append(middle - begin)
        python.append(time.perf_counter() - middle)
    return _slowest(median(products)), _slowest(median(python))


def _loads(engine: ZeroEngine, folder: Path, size: float, turns: int) -> list[Row]:
    root = folder / "checkpoints"
    files = sorted(root.glob("*/*"))
    verifying: list[float] = []
    reading: list[float] = []
    raw: list[float] = []
    own = files[distributed.rank() :: distributed.world_size()]
    for _ in range(turns):
        _forget(own)
        with _timed(raw):
            _raw_read(own)
        _forget(own)
        with _timed(verifying):
            newest = store.find_newest_together(root, _refuse)
        assert newest is not None
        with _timed(reading):
            store.load(*newest, engine)
    total = min(map(sum, zip(verifying, reading, strict=True)))
    return [
        Row("raw read of as many bytes, from disk", min(raw), "s"),
        Row("load", total, "s", "raw read", total / min(raw)),
        Row("of which verifying digests", min(verifying), "s"),
        Row("load, throughput", size / total / 1e9, "GB/s"),
    ]


def _resharding(folder: Path, size: float) -> list[Row]:
    source = store.list_checkpoints(folder / "checkpoints")[-1]
    begin = time.perf_counter()
    reshard(source, folder / "resharded", _PARTS)
    seconds = time.perf_counter() - begin
    shutil.rmtree(folder / "resharded")
    return [Row(f"resharding to {_PARTS} files", seconds / (size / 1e9), "s per GB")]


def _raw_write(path: Path, size: int, turns: int) -> float:
    """Seconds until every rank has written and synced `size` bytes of its own."""
    block = os.urandom(_BLOCK)
    seconds: list[float] = []
    path.mkdir(exist_ok=True)
    own = path / str(distributed.rank())
    for _ in range(turns):
        os.sync()
        with _timed(seconds), own.open("wb", buffering=0) as file:
            for _ in range(size // _BLOCK):
                file.write(block)
            os.fsync(file.fileno())
        own.unlink()
    return min(seconds)


def _raw_read(paths: list[Path]) -> None:
    block = bytearray(_BLOCK)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def _forget(paths: list[Path]) -> None:
    """Drop files from the page cache, so that they are read from the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    """Append the time of the slowest rank."""
    distributed.barrier()
    begin = time.perf_counter()
    yield
    seconds.append(_slowest(time.perf_counter() - begin))


def _slowest(seconds: float) -> float:
    return max(distributed.gather_objects(seconds))


def _sum(value: float) -> float:
    return sum(distributed.gather_objects(value))


def _memory(what: str, before: int, size: float) -> Row:
    extra = _sum(_status("VmHWM") - before)
    return Row(what, extra / 1e9, "GB", "state", extra / size)


def _resident() -> int:
    return _status("VmRSS")


def _status(name: str) -> int:
    """Bytes, from what Linux tells of this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _refuse(text: str) -> None:
    raise RuntimeError(f"nothing should have gone wrong: {text}")
