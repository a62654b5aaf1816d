"""A process with everything imported, of which ranks are forked: `python -m tests.support.rank_server DESCRIPTOR`.

Importing torch and DeepSpeed takes seconds, a test of a few steps less than one; the suite starts a hundred ranks. The
server has one thread and no process group of its own, so a fork of it is as good as a new process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

PROVISION = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True)
class Call:
    """A function for `world` ranks; what each returns goes to a file in `folder`.

    content: the pickle of (function, arguments), opened by the ranks. environment: of the test when it calls. timeout:
    seconds that a rank may take.
    """

    world: int
    port: int
    folder: str
    content: bytes
    environment: dict[str, str]
    timeout: float


def serve(connection: Connection) -> None:
    """Answer calls, one after the other, until the other end is closed."""
    _import_everything()
    context = multiprocessing.get_context("fork")
    while True:
        try:
            call: Call = connection.recv()
        except EOFError:
            return
        processes = [context.Process(target=_rank, args=(rank, call, connection)) for rank in range(call.world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(call.timeout)
            if process.is_alive():
                process.kill()
                process.join()
        connection.send("done")


def _import_everything() -> None:
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking CUDA itself would leave it unusable after a fork
    import kernels.deform_attn.cpu_loops  # noqa: F401
    import launch.worker  # noqa: F401
    from dino_scale.training.zero import load_deepspeed

    load_deepspeed()
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 (its first engine imports it, and all of Inductor)

    gc.freeze()  # or every rank's first collection would touch, and so copy, all of it
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        raise RuntimeError(f"the server of ranks has {len(threads)} threads: expected one, or forks could hang")


def _rank(rank: int, call: Call, connection: Connection) -> None:
    connection.close()
    os.environ.clear()
    os.environ.update(call.environment | PROVISION)
    import torch

    from dino_scale.training import distributed

    torch.set_num_threads(1)
    try:
        function, arguments = pickle.loads(call.content)
        distributed.join(rank, call.world, rank, call.world, "127.0.0.1", call.port)
        outcome = (True, function(*arguments))
        distributed.leave()
    except BaseException:
        outcome = (False, traceback.format_exc())
    Path(call.folder, str(rank)).write_bytes(pickle.dumps(outcome))
    if not outcome[0]:
        os._exit(1)  # the other ranks may wait in a collective for ever


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
