"""R/report.html: one self-contained page about a run, written from the run folder alone (and pixels from `image_of`).

No script, nothing fetched; every text that comes from data or configuration is escaped.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dino_scale.evaluation.pictures import ImageOf
from dino_scale.evaluation.report_stage import (
    anchor,
    badge,
    duration,
    missing_note,
    share,
    stage_facts,
    stage_section,
)
from dino_scale.evaluation.result import METRIC_NAMES, UNDEFINED
from dino_scale.evaluation.run_record import RunRecord, StageRecord, read_run
from dino_scale.evaluation.style import STYLE

_ALL_PICTURES = 24  # of all stages together; with two panels of about 30 kB each the page stays below 3 MB
_LIBRARIES = ("torch", "deepspeed", "ray", "timm", "torchvision", "numba", "triton", "pycocotools", "webdataset")


def write_report(run_dir: Path, image_of: ImageOf) -> Path:
    """Writes `run_dir`/report.html and returns its path; an older report is replaced in one piece.

    image_of: (stage name, raw image id) -> (H, W, 3) uint8 RGB picture of that stage's validation data. Where it raises
        one of our errors the page shows the message in place of the picture.
    RunFolderError: `run_dir` is no run folder. Stages that have not run and evaluations that are missing or unreadable
    are named on the page.
    """
    page = _page(read_run(run_dir), image_of)
    path = run_dir / "report.html"
    partial = path.with_suffix(".html.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def _page(run: RunRecord, image_of: ImageOf) -> str:
    evaluated = sum(stage.final is not None for stage in run.stages)
    pictures = min(5, max(1, _ALL_PICTURES // (2 * max(1, evaluated))))
    body = [
        f"<h1>{escape(run.chain.name)}</h1>",
        f'<p class="soft">{escape(_summary(run))}</p>',
        _navigation(run.stages),
        *(missing_note(note) for note in run.missing),
        f'<div class="cards">{"".join(_card(stage) for stage in run.stages)}</div>',
        *(_gain_card(gain) for gain in transfer_gains(run.stages)),
        _comparison(run.stages),
        *(stage_section(stage, image_of, pictures) for stage in run.stages),
        _environment(run),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(run.chain.name)}: training report</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>"
    )


def _summary(run: RunRecord) -> str:
    count = len(run.stages)
    facts = [f"Training report of {count} stage{'' if count == 1 else 's'}"]
    seconds = [stage.state.get("seconds") for stage in run.stages]
    known = [float(value) for value in seconds if isinstance(value, int | float)]
    if known:
        facts.append(f"{duration(sum(known))} in all")
    facts.append(f"seed {run.chain.seed}")
    facts.append(f"written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}")
    return " · ".join(facts)


def _navigation(stages: Sequence[StageRecord]) -> str:
    links = [f'<a href="#{anchor(stage.name)}">{escape(stage.name)}</a>' for stage in stages]
    return f'<nav>{"".join(links)}<a href="#environment">Configuration and environment</a></nav>'


def _card(stage: StageRecord) -> str:
    numbers = ""
    if stage.final:
        metrics = stage.final.metrics
        numbers = (
            f'<div class="big"><div>{share(metrics["AP"])}<span>AP</span></div>'
            f"<div>{share(metrics['AP50'])}<span>AP50</span></div></div>"
        )
    else:
        numbers = '<p class="missing">not evaluated</p>'
    return (
        f'<div class="card"><a href="#{anchor(stage.name)}">{escape(stage.name)}</a>{badge(stage)}{numbers}'
        f'<div class="facts">{escape(" · ".join(stage_facts(stage)[:3]))}</div></div>'
    )


class TransferGain:
    """Two stages of the same data, one started from earlier weights, its sibling from scratch."""

    def __init__(self, started: StageRecord, scratch: StageRecord) -> None:
        self.started, self.scratch = started, scratch

    def numbers(self, metric: str) -> tuple[float, float]:
        """The metric of (the stage that started from weights, its sibling from scratch)."""
        assert self.started.final is not None
        assert self.scratch.final is not None
        return self.started.final.metrics[metric], self.scratch.final.metrics[metric]


def transfer_gains(stages: Sequence[StageRecord]) -> list[TransferGain]:
    """Every pair of evaluated stages that differ in where their weights come from, but not in their data."""
    evaluated = [stage for stage in stages if stage.final]
    return [
        TransferGain(started, scratch)
        for started in evaluated
        if started.config.start.stage or started.config.start.weights
        for scratch in evaluated
        if not (scratch.config.start.stage or scratch.config.start.weights)
        and scratch.config.data.train == started.config.data.train
        and scratch.config.data.validation == started.config.data.validation
    ]


def _gain_card(gain: TransferGain) -> str:
    origin = gain.started.config.start.stage or gain.started.config.start.weights
    sentences = []
    for metric in ("AP", "AP50"):
        with_start, without = gain.numbers(metric)
        if UNDEFINED in (with_start, without):
            continue
        times = f", {with_start / without:.1f} times" if without > 0 else ""
        sentences.append(f"{metric} <b>{with_start:.3f}</b> against {without:.3f} ({with_start - without:+.3f}{times})")
    steps = [stage.evaluations[-1][0] for stage in (gain.started, gain.scratch)]
    length = f"both after {steps[0]} steps" if steps[0] == steps[1] else f"after {steps[0]} and {steps[1]} steps"
    ahead = gain.numbers("AP")[0] > gain.numbers("AP")[1]
    return (
        f'<div class="card gain{"" if ahead else " none"}"><b>Transfer gain</b> '
        f'<span class="soft">{escape(gain.started.name)} (from {escape(origin)}) against '
        f"{escape(gain.scratch.name)} (from scratch), {length}</span><br>{'; '.join(sentences)}</div>"
    )


def _comparison(stages: Sequence[StageRecord]) -> str:
    """The 12 COCO numbers, stages of the same validation data together."""
    groups: dict[str, list[StageRecord]] = {}
    for stage in stages:
        if stage.final:
            groups.setdefault(stage.config.data.validation, []).append(stage)
    if not groups:
        return ""
    head = "".join(f"<th>{name}</th>" for name in METRIC_NAMES)
    tables = [
        f'<div class="card" style="margin-top:14px"><h3>{escape(_group_title(data, members))}</h3>'
        f'<div class="scroll"><table><thead><tr><th>Stage</th>{head}</tr></thead><tbody>'
        f"{''.join(_metrics_row(stage) for stage in members)}</tbody></table></div></div>"
        for data, members in groups.items()
    ]
    return '<h3 class="wide">COCO numbers, side by side where the data are the same</h3>' + "".join(tables)


def _group_title(data: str, members: Sequence[StageRecord]) -> str:
    final = members[0].final
    assert final is not None
    boxes = sum(row.boxes for row in final.classes)
    return f"{data or 'validation data'}: {len(final.images)} images, {boxes} boxes, {len(final.classes)} classes"


def _metrics_row(stage: StageRecord) -> str:
    assert stage.final is not None
    cells = "".join(f"<td>{share(stage.final.metrics[name])}</td>" for name in METRIC_NAMES)
    return f'<tr><td class="name">{escape(stage.name)}</td>{cells}</tr>'


def _environment(run: RunRecord) -> str:
    recorded = run.state.get("environment")
    known: dict[str, Any] = recorded if isinstance(recorded, dict) else _environment_here()
    title = "Environment of the run" if known is recorded else "Environment in which this page was written"
    rows = "".join(
        f'<tr><td>{escape(str(name))}</td><td class="text">{escape(str(value))}</td></tr>'
        for name, value in known.items()
    )
    launch = run.chain.launch
    asked = f"engine {launch.engine}, {launch.workers} worker(s), {launch.threads} thread(s) each"
    return (
        '<h2 id="environment">Configuration and environment</h2>'
        "<details><summary>Resolved configuration (config.yaml)</summary>"
        f"<pre>{escape(run.config_text)}</pre></details>"
        f'<div class="card"><h3>{title}</h3><p class="facts">Asked for: {escape(asked)}. The workers that ran stand '
        f'with each stage.</p><div class="scroll"><table><tbody>{rows}</tbody></table></div></div>'
    )


def _environment_here() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    found["cores"] = str(os.cpu_count())
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found
