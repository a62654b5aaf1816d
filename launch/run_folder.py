"""The folder of a run: its configuration and the state of every stage, readable after a crash at any moment.

    R/config.yaml   the resolved configuration
    R/chain.json    {"format", "name", "config", "stages": {NAME: {"state", "step", "metrics", "seconds"}}}
    R/STAGE/...     what the worker writes

Every file is replaced by one rename, so it is old or new, never half.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dino_scale.config.decode import dump_chain, load_chain
from dino_scale.config.dump import differences, leaves
from dino_scale.config.schema import ChainConfig
from dino_scale.errors import RunFolderError
from launch.same_samples import require_same_samples

FORMAT = 1
CONFIG, STATE, LOCK, WEIGHTS = "config.yaml", "chain.json", "lock", "weights.safetensors"
State = Literal["pending", "running", "done", "interrupted", "failed"]
_LOCK_SECONDS = 10.0  # how long the processes of a killed driver may take to let go


@dataclass
class StageState:
    """step: optimizer steps done. metrics: COCO numbers of the last evaluation. seconds: of all attempts together."""

    state: State = "pending"
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class RunFolder:
    """An existing run folder; `stages` in order of execution."""

    path: Path
    config: ChainConfig
    stages: dict[str, StageState]

    @classmethod
    def create(cls, path: Path, config: ChainConfig, beside: Sequence[str] = ()) -> RunFolder:
        """A new run folder. RunFolderError where `path` exists, unless it holds nothing but the names in `beside`."""
        require_new(path, beside)
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path, config, {name: StageState() for name in config.stages})
        folder._write_config()
        folder._write_state()
        return folder

    @classmethod
    def open(cls, path: Path, overrides: Sequence[str] = ()) -> RunFolder:
        """An existing one, with `overrides` applied to its configuration.

        RunFolderError: no run folder, torn, its configuration has changed in a key that no override names, or in one
        that decides which images a stage that has begun reads next.
        """
        content = _read_state(path)
        config = load_chain(path / CONFIG, overrides)
        folder = cls(path, config, _decode_stages(path / STATE, content, config))
        _require_same_config(path, content["config"], config, overrides)
        unfinished = [name for name, stage in folder.stages.items() if stage.state != "done"]
        require_same_samples(path, config, unfinished, differences(content["config"], leaves(config)))
        folder._require_results()
        return folder

    def next_stage(self) -> str | None:
        """The first stage that is not done."""
        return next((name for name, stage in self.stages.items() if stage.state != "done"), None)

    def record(self, name: str, state: State, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Note a stage's state on disk. seconds: added to those of earlier attempts."""
        before = self.stages[name].seconds
        self.stages[name] = StageState(state, step, dict(metrics), round(before + seconds, 1))
        self._write_state()

    def accept_config(self) -> None:
        """Make the present configuration (with its overrides) the run's own."""
        self._write_config()
        self._write_state()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other drivers out of this folder; the lock ends with the process. RunFolderError names who has it."""
        with (self.path / LOCK).open("a+", encoding="utf-8") as file:
            deadline = time.monotonic() + _LOCK_SECONDS
            while not _try_lock(file.fileno()):
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise RunFolderError(
                        f"{self.path} is in use by process {file.read().strip() or 'unknown'}: wait for it, or end it"
                    )
                time.sleep(0.2)
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            file.flush()
            yield

    def _require_results(self) -> None:
        for name, stage in self.stages.items():
            weights = self.path / name / WEIGHTS
            if stage.state == "done" and not weights.is_file():
                raise RunFolderError(
                    f"{self.path / STATE} says that stage {name} is done, but {weights} is missing: put it back, or "
                    "start a new run"
                )

    def _write_config(self) -> None:
        write_text(self.path / CONFIG, dump_chain(self.config))

    def _write_state(self) -> None:
        content = {
            "format": FORMAT,
            "name": self.config.name,
            "config": leaves(self.config),
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
        }
        write_text(self.path / STATE, json.dumps(content, indent=1) + "\n")


def require_new(path: Path, beside: Sequence[str] = ()) -> None:
    """RunFolderError unless a run can begin at `path`: nothing is there, or only the names in `beside`."""
    if path.is_dir() and all(entry.name in beside for entry in path.iterdir()):
        return
    if path.exists():
        remedy = f"continue it with `dino-scale resume {path}` or choose" if (path / STATE).exists() else "choose"
        raise RunFolderError(f"{path} exists already: {remedy} another --run-dir")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step that survives a power failure."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise RunFolderError(f"{path} is not a folder: expected the run folder of `dino-scale train`")
    for name in (STATE, CONFIG):
        if not (path / name).is_file():
            raise RunFolderError(f"{path} has no {name}: it is not a run folder, or it is torn")
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _torn(path / STATE, f"cannot be read ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _torn(path / STATE, f"does not have format {FORMAT}")
    if not isinstance(content.get("config"), dict) or not isinstance(content.get("stages"), dict):
        raise _torn(path / STATE, "has no config or no stages")
    return content


def _decode_stages(path: Path, content: dict[str, Any], config: ChainConfig) -> dict[str, StageState]:
    written = content["stages"]
    if list(written) != list(config.stages):
        raise _torn(path, f"lists the stages {', '.join(written)}, config.yaml {', '.join(config.stages)}")
    stages = {}
    for name, value in written.items():
        try:
            stage = StageState(value["state"], int(value["step"]), dict(value["metrics"]), float(value["seconds"]))
        except (KeyError, TypeError, ValueError) as error:
            raise _torn(path, f"has a stage {name} of the wrong form ({error})") from None
        if stage.state not in get_args(State):
            raise _torn(path, f"has a stage {name} in the unknown state '{stage.state}'")
        stages[name] = stage
    return stages


def _torn(path: Path, what: str) -> RunFolderError:
    return RunFolderError(f"{path} {what}: the run folder is torn or was made by another program")


def _require_same_config(path: Path, before: dict[str, Any], config: ChainConfig, overrides: Sequence[str]) -> None:
    named = [override.partition("=")[0] for override in overrides]
    changed = differences(before, leaves(config))
    foreign = {
        key: values
        for key, values in changed.items()
        if not any(key == name or key.startswith(f"{name}.") for name in named)
    }
    if foreign:
        lines = [f"  {key}: was {_shown(old)}, is {_shown(new)}" for key, (old, new) in foreign.items()]
        raise RunFolderError(
            f"{path / CONFIG} is not what this run was started with: put it back, or name every change with --set\n"
            + "\n".join(lines)
        )


def _shown(value: Any) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)
