"""What two ranks see while they save in the background, and when one of them cannot write."""

from __future__ import annotations

import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch

from dino_scale.checkpoint import store
from dino_scale.checkpoint.layout import list_checkpoints
from dino_scale.checkpoint.manifest import COMMON, Best
from dino_scale.checkpoint.saver import Saver
from dino_scale.checkpoint.snapshot import Snapshot
from dino_scale.errors import SaveError
from dino_scale.training import distributed
from tests.support.tiny_training import build, digests, position, train


def save_and_train_on(stage: int, root: str) -> dict[str, Any]:
    """State at step 2, which is saved while training goes on to step 4, and what loading it gives."""
    engine, average = build(stage)
    train(engine, average, range(2))
    saved = digests(engine)
    said: list[str] = []
    saver = Saver(Path(root), engine, 3, said.append)
    best = Best("AP", 0.25, 1)
    at_two = store.Position(**vars(position(2)) | {"best": best})
    saver.save(at_two)
    train(engine, average, range(2, 4))  # the thread may still write
    trained = digests(engine)
    saver.settle()
    written = (Path(root) / "step_00000002").stat().st_ctime_ns
    saver.save(at_two)  # the same position again: nothing is to be done
    saver.settle()
    again = (Path(root) / "step_00000002").stat().st_ctime_ns
    other = Saver(Path(root), engine, 3, said.append, present="step_00000002")  # as if resumed, and stopped at once
    other.save(at_two, required=True)
    other.settle()
    again = max(again, (Path(root) / "step_00000002").stat().st_ctime_ns)
    saver.save(at_two, best=True)
    saver.save(position(4))  # waits for the one before
    saver.close()
    distributed.barrier()
    newest = distributed.on_rank_zero(lambda: store.find_newest(Path(root), said.append))
    assert newest is not None
    store.load(*newest, engine)
    return {
        "saved": saved,
        "trained": trained,
        "loaded": digests(engine),
        "newest": newest[0].name,
        "found": sorted(folder.name for folder in Path(root).iterdir()),
        "best": distributed.on_rank_zero(lambda: store.verify(Path(root) / "step_00000002").best),
        "rewritten": again != written,
        "said": said,
        "copies": copies(3),
    }


def copies(stage: int) -> dict[str, bool]:
    """Whether a second snapshot uses the memory of the first, shares none with the engine, and who holds the rest."""
    engine, average = build(stage)
    snapshot = Snapshot(engine)
    snapshot.take()
    first = _addresses(snapshot)
    train(engine, average, range(1))
    snapshot.take()
    live = {tensor.untyped_storage().data_ptr() for item in engine.fragments for tensor in item.tensors.values()}
    held = {tensor.untyped_storage().data_ptr() for tensor in next(iter(snapshot.contents.values())).values()}
    return {
        "reused": _addresses(snapshot) == first,
        "apart": not live & held,
        "common": COMMON in snapshot.contents,
        "exact": snapshot.bytes == 4 * len(engine.kinds) * sum(item.owned[1] for item in engine.fragments),
    }


def _addresses(snapshot: Snapshot) -> list[int]:
    return [tensor.data_ptr() for tensor in next(iter(snapshot.contents.values())).values()]


def fail_on_one_rank(stage: int, root: str) -> dict[str, Any]:
    """Rank 1 may not write files beyond 300 bytes for a while; what each rank hears of it."""
    engine, average = build(stage)
    said: list[str] = []
    saver = Saver(Path(root), engine, 3, said.append)
    saver.save(position(1))
    saver.settle()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limit[1]))
    saver.save(position(2))
    deadline = time.monotonic() + 60
    while distributed.rank() == 1 and not saver.failed() and time.monotonic() < deadline:
        time.sleep(0.01)
    noticed = distributed.gather_objects(saver.failed())
    saver.settle()
    losses = train(engine, average, range(1, 3))
    error = ""
    try:
        saver.save(position(3), required=True)
        saver.settle()
    except SaveError as problem:
        error = str(problem)
    after_failures = [folder.name for folder in list_checkpoints(Path(root))]
    if distributed.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    saver.save(position(4), required=True)
    saver.settle()
    return {
        "said": said,
        "noticed": noticed,
        "losses": len([loss for loss in losses if torch.isfinite(torch.tensor(loss))]),
        "error": error,
        "after_failures": after_failures,
        "found": sorted(folder.name for folder in Path(root).iterdir()),
    }
