"""A run folder as the report sees it: what is there, and in words what is missing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_scale.config.decode import load_chain
from dino_scale.config.schema import ChainConfig, StageConfig
from dino_scale.errors import DataError, RunFolderError
from dino_scale.evaluation.charts import Point
from dino_scale.evaluation.result import EvaluationResult


@dataclass(frozen=True)
class StageRecord:
    """One stage: its configuration, its state in chain.json (may be empty), its log lines and evaluations by step."""

    name: str
    config: StageConfig
    state: dict[str, Any]
    log: tuple[dict[str, Any], ...]
    evaluations: tuple[tuple[int, EvaluationResult], ...]
    missing: tuple[str, ...]

    @property
    def final(self) -> EvaluationResult | None:
        """The evaluation of the latest step."""
        return self.evaluations[-1][1] if self.evaluations else None

    def curve(self, key: str, within: str = "") -> list[Point]:
        """(step, value) of a number of the log, or of one inside the mapping `within`; NaN where a line has none."""
        points = []
        for line in self.log:
            value = (line.get(within) or {}).get(key) if within else line.get(key)
            points.append((float(line["step"]), float(value) if isinstance(value, int | float) else math.nan))
        return points

    def names_within(self, key: str) -> list[str]:
        """Keys of a mapping that is part of every log line, in order of appearance."""
        names: dict[str, None] = {}
        for line in self.log:
            names.update(dict.fromkeys(line.get(key) or {}))
        return list(names)


@dataclass(frozen=True)
class RunRecord:
    """Everything the report is written from. `config_text` is config.yaml as it stands on disk."""

    chain: ChainConfig
    config_text: str
    state: dict[str, Any]
    stages: tuple[StageRecord, ...]
    missing: tuple[str, ...]


def read_run(run_dir: Path) -> RunRecord:
    """Reads a run folder; RunFolderError where `run_dir` is none. Absent or torn parts are named in `missing`."""
    config_path = run_dir / "config.yaml"
    if not config_path.is_file():
        raise RunFolderError(
            f"{run_dir} has no config.yaml: expected a run folder, as `dino-scale train` and `dino-scale demo` make it"
        )
    chain = load_chain(config_path)
    missing: list[str] = []
    state = _read_state(run_dir / "chain.json", missing)
    known = state.get("stages")
    states: dict[str, Any] = known if isinstance(known, dict) else {}
    stages = tuple(
        _read_stage(run_dir / name, name, config, states.get(name, {})) for name, config in chain.stages.items()
    )
    return RunRecord(chain, config_path.read_text(encoding="utf-8"), state, stages, tuple(missing))


def _read_state(path: Path, missing: list[str]) -> dict[str, Any]:
    if not path.is_file():
        missing.append("chain.json is not there yet: states and times of the stages are unknown")
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        missing.append(f"chain.json cannot be read ({error}): states and times of the stages are unknown")
        return {}
    return state if isinstance(state, dict) else {}


def _read_stage(folder: Path, name: str, config: StageConfig, state: Any) -> StageRecord:
    missing: list[str] = []
    log = _read_log(folder / "metrics.jsonl", missing)
    evaluations = _read_evaluations(folder / "evaluation", missing)
    return StageRecord(
        name=name,
        config=config,
        state=state if isinstance(state, dict) else {},
        log=log,
        evaluations=evaluations,
        missing=tuple(missing),
    )


def _read_log(path: Path, missing: list[str]) -> tuple[dict[str, Any], ...]:
    """Log lines by step; of several lines of one step the last, since a resumed run does steps again."""
    if not path.is_file():
        missing.append("No training step has been logged yet.")
        return ()
    lines: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            lines[int(line["step"])] = line
        except (ValueError, KeyError, TypeError):
            unreadable += 1
    if unreadable:
        missing.append(
            f"{unreadable} line(s) of metrics.jsonl cannot be read and are left out (a killed run tears one)."
        )
    return tuple(lines[step] for step in sorted(lines))


def _read_evaluations(folder: Path, missing: list[str]) -> tuple[tuple[int, EvaluationResult], ...]:
    found = []
    for path in sorted(folder.glob("step_*.json")):
        step = path.stem.removeprefix("step_")
        if not step.isdigit():  # step_..._detections.json
            continue
        try:
            found.append((int(step), EvaluationResult.from_json(path.read_text(encoding="utf-8"))))
        except DataError as error:
            missing.append(f"{path.name}: {error}")
    if not found:
        missing.append("No evaluation has been made yet: AP, curves and pictures appear after the first one.")
    return tuple(sorted(found, key=lambda pair: pair[0]))
