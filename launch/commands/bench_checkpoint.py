"""`dino-scale bench checkpoint`: what saving and loading cost at the sizes people train, as a CSV file."""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console

from dino_scale.checkpoint.bench import Row, build_engine, measure
from dino_scale.config.decode import load_chain
from dino_scale.config.schema import ModelConfig
from dino_scale.errors import UserError
from dino_scale.training import distributed
from launch.commands.output import new_table, require_new_file, today_here
from launch.local_engine import free_port

_CHAINS = Path(__file__).parents[2] / "configs" / "chain"
_MODELS = {
    "r50": "coco_r50_4scale_12_epochs",
    "swin_l": "coco_swin_l_4scale_12_epochs",
    "small": "demo",
}
_COLUMNS = ("date", "machine", "model", "parameters", "workers", "what", "value", "unit", "ratio", "against")


def run(arguments: argparse.Namespace) -> None:
    require_new_file(arguments.out)
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("bench checkpoint measures memory by /proc/self/clear_refs: run it on Linux")
    console = Console(highlight=False, soft_wrap=True)
    with new_table(arguments.out, _COLUMNS) as add:
        for name in arguments.models:
            for workers in arguments.workers:
                console.print(f"{name}, {workers} worker(s)")
                parameters, rows = _measure(name, workers, arguments.turns, arguments.out.parent)
                for row in rows:
                    console.print(f"  {row.what}: {_figures(row)}")
                    add(_fields(name, parameters, workers, row))


def _figures(row: Row) -> str:
    compared = "" if row.ratio is None else f", {row.ratio:.2f} of {row.against}"
    return f"{row.value:.3g} {row.unit}{compared}"


def _fields(name: str, parameters: int, workers: int, row: Row) -> tuple[object, ...]:
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    return *today_here(), name, parameters, workers, row.what, f"{row.value:.4g}", row.unit, ratio, row.against


def _measure(name: str, workers: int, turns: int, parent: Path) -> tuple[int, list[Row]]:
    """Parameters of the model and the figures, from `workers` processes that save into a folder inside `parent`."""
    path = _CHAINS / f"{_MODELS[name]}.yaml"
    if not path.is_file():
        raise UserError(f"{path} is missing: bench checkpoint runs from a checkout of the repository")
    model = load_chain(path).model
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=parent))
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, workers, port, model, turns, folder, sender), daemon=True)
        for rank in range(workers)
    ]
    try:
        for process in processes:
            process.start()
        sender.close()
        return _result(receiver)
    finally:
        for process in processes:
            process.kill()
            process.join()
        shutil.rmtree(folder)


def _result(receiver: Connection) -> tuple[int, list[Row]]:
    try:
        outcome = receiver.recv()
    except EOFError:
        raise RuntimeError("a measuring process died without a word: out of memory?") from None
    if isinstance(outcome, str):
        raise RuntimeError(f"a measuring process failed\n{outcome}")
    parameters, rows = outcome
    return parameters, rows


def _rank(rank: int, world: int, port: int, model: ModelConfig, turns: int, folder: Path, results: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        distributed.join(rank, world, rank, world, "127.0.0.1", port)
        engine = build_engine(model)
        rows = measure(engine, folder, turns)
        if rank == 0:
            results.send((sum(parameter.numel() for parameter in engine.model.parameters()), rows))
        distributed.barrier()
    except BaseException:
        results.send(traceback.format_exc())
        raise
