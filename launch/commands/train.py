"""`dino-scale train` and `dino-scale resume`: a chain from its beginning, or from where it stopped."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from dino_scale.config.decode import load_chain
from dino_scale.config.dump import differences, leaves
from dino_scale.config.schema import ChainConfig
from launch.chain import run_chain
from launch.engine import Engine
from launch.engines import open_engine
from launch.memory_check import check_memory
from launch.preflight import check, with_absolute_paths
from launch.progress import Progress
from launch.run_folder import RunFolder
from launch.security import require_no_secrets
from launch.summary import print_summary


def train(chain: Path, run_dir: Path | None, overrides: Sequence[str]) -> None:
    config = with_absolute_paths(load_chain(chain, overrides))
    start(config, run_dir or default_run_dir(config))


def start(config: ChainConfig, run_dir: Path, beside: Sequence[str] = ()) -> None:
    """Run a chain in a new run folder, which may hold the entries named in `beside` already."""
    require_no_secrets(leaves(config))
    engine = open_engine(config.launch)
    check(config, engine.workers)
    if engine.is_primary:
        check_memory(config, engine.workers)
    path = Path(os.path.abspath(run_dir))
    with Progress() as progress, engine:
        folder = engine.on_primary(lambda: RunFolder.create(path, config, beside))
        if engine.is_primary:
            progress.message(f"run folder: {path}")
        with _held(folder, engine):
            _finish(folder, engine, progress)


def resume(run_dir: Path, overrides: Sequence[str]) -> None:
    path = Path(os.path.abspath(run_dir))
    folder = RunFolder.open(path, overrides)
    before = leaves(load_chain(path / "config.yaml"))
    folder.config = with_absolute_paths(folder.config)
    require_no_secrets(leaves(folder.config))
    engine = open_engine(folder.config.launch)
    if folder.next_stage() is not None:
        check(folder.config, engine.workers)
        if engine.is_primary:
            check_memory(folder.config, engine.workers)
    with Progress() as progress, engine, _held(folder, engine):
        if engine.is_primary:
            for key, (old, new) in differences(before, leaves(folder.config)).items():
                progress.message(f"changed: {key} from {old} to {new}")
            if folder.next_stage() is None:
                progress.message("every stage is done; only the report is written anew")
            folder.accept_config()
        _finish(folder, engine, progress)


def default_run_dir(config: ChainConfig) -> Path:
    return Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"


@contextlib.contextmanager
def _held(folder: RunFolder, engine: Engine) -> Iterator[None]:
    """The run folder is this driver's alone; where another has it, every process of the engine gets the error."""
    with contextlib.ExitStack() as stack:
        engine.on_primary(lambda: stack.enter_context(folder.locked()))
        yield


def _finish(folder: RunFolder, engine: Engine, progress: Progress) -> None:
    report = run_chain(folder, engine, progress)
    if engine.is_primary:
        print_summary(folder, report, progress.console)
