"""The section of one stage in the report: curves of training, AP by class, precision-recall, confusions, pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from dino_scale.config.schema import StageConfig
from dino_scale.evaluation.charts import SERIES_COLOURS, Point, Series, line_chart, number, smoothed
from dino_scale.evaluation.pictures import ImageOf, gallery, picture_legend
from dino_scale.evaluation.result import UNDEFINED, ClassResult, EvaluationResult
from dino_scale.evaluation.run_record import StageRecord

_OPEN_CLASSES = 30  # rows of the class table that are shown without unfolding
_MOST_CONFUSIONS = 12


def stage_section(stage: StageRecord, image_of: ImageOf, pictures: int) -> str:
    """HTML of one stage; `pictures`: how many of the best and of the worst are shown."""
    parts = [f'<h2 id="{anchor(stage.name)}">{escape(stage.name)}{badge(stage)}</h2>']
    parts.append(f'<p class="facts">{" · ".join(escape(fact) for fact in stage_facts(stage))}</p>')
    parts.extend(missing_note(note) for note in stage.missing)
    if stage.log:
        parts.append('<h3 class="wide">Training</h3>' + _training_charts(stage) + _loss_table(stage))
    if stage.final:
        parts.append(_evaluation(stage, stage.final, image_of, pictures))
    return "".join(parts)


def anchor(name: str) -> str:
    return "stage-" + escape(name.replace(" ", "-"), quote=True)


def badge(stage: StageRecord) -> str:
    state = str(stage.state.get("state", "")) or ("unknown" if stage.log or stage.final else "not started")
    kind = {"done": "good", "failed": "bad", "interrupted": "warn", "running": "warn"}.get(state, "")
    return f'<span class="badge {kind}">{escape(state)}</span>'


def missing_note(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def share(value: float | None) -> str:
    """A COCO number for reading: 0.312, or a dash where it is undefined."""
    return "&ndash;" if value is None or value == UNDEFINED else f"{value:.3f}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def stage_facts(stage: StageRecord) -> list[str]:
    """Short facts: origin of the weights, length, time, batch, workers."""
    facts = [_origin(stage.config)]
    last = stage.log[-1] if stage.log else {}
    step = stage.state.get("step", last.get("step"))
    if isinstance(step, int):
        facts.append(
            f"{step} step{'' if step == 1 else 's'}" + (f", {last['epoch']:.1f} epochs" if "epoch" in last else "")
        )
    seconds = stage.state.get("seconds")
    if isinstance(seconds, int | float):
        facts.append(duration(float(seconds)))
    facts.append(f"{stage.config.batch.global_size} images per step")
    worlds = _worlds(stage)
    if worlds:
        facts.append(f"workers: {worlds}")
    facts.append(f"{stage.config.precision}, ZeRO stage {stage.config.zero_stage}")
    return facts


def _origin(config: StageConfig) -> str:
    if config.start.stage:
        return f"starts from stage {config.start.stage} (class head by {config.start.class_map})"
    return f"starts from {config.start.weights}" if config.start.weights else "starts from scratch"


def _worlds(stage: StageRecord) -> str:
    """Number of workers, with the steps at which it changed: "2, 1 from step 340"."""
    changes: list[str] = []
    previous = None
    for line in stage.log:
        world = line.get("world_size")
        if world is not None and world != previous:
            changes.append(f"{world} from step {line['step']}" if changes else str(world))
            previous = world
    return ", ".join(changes)


def _training_charts(stage: StageRecord) -> str:
    total = stage.curve("loss")
    charts = [
        ("Loss: total", line_chart(_raw_and_smooth("total loss", total), "step", "weighted sum")),
        *_part_charts(stage),
        ("Learning rate", _rates_chart(stage)),
        ("Gradient norm", _norm_chart(stage.curve("gradient_norm"))),
        (
            "Throughput",
            line_chart(
                _raw_and_smooth("images/s", stage.curve("images_per_second"), 2), "step", "images/s, all workers"
            ),
        ),
        (
            "Waiting for data",
            line_chart(
                _raw_and_smooth("waiting", _scaled(stage.curve("data_wait_share"), 100), 5), "step", "% of step time"
            ),
        ),
    ]
    if any(math.isfinite(y) for _, y in stage.curve("memory_mb")):
        memory = Series("memory", stage.curve("memory_mb"), 6)
        charts.append(("Peak memory of worker 0", line_chart([memory], "step", "MB")))
    if len(stage.evaluations) > 1:
        charts.append(("AP while training", _progress_chart(stage)))
    return f'<div class="charts">{"".join(chart_card(title, chart) for title, chart in charts)}</div>'


def chart_card(title: str, chart: str) -> str:
    return f'<div class="card"><h3>{escape(title)}</h3>{chart}</div>'


def _raw_and_smooth(name: str, points: Sequence[Point], colour: int = 0) -> list[Series]:
    if len(points) < 20:
        return [Series(name, points, colour)]
    return [Series(f"{name}, as logged", points, colour, faint=True), Series(name, smoothed(points), colour)]


def _scaled(points: Sequence[Point], factor: float) -> list[Point]:
    return [(x, y * factor) for x, y in points]


def _part_charts(stage: StageRecord) -> list[tuple[str, str]]:
    """One chart per kind of loss ("decoder5/class" is of kind class): the last layer of a family in colour, the layers
    before it faintly."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(stage.names_within("losses"), key=_by_layer):
        kinds.setdefault(name.rpartition("/")[2], []).append(name)
    return [(f"Loss: {kind}", _kind_chart(stage, names)) for kind, names in kinds.items()]


def _kind_chart(stage: StageRecord, names: Sequence[str]) -> str:
    """`names` in order of layers."""
    last_of_family = {_source(name).rstrip("0123456789"): name for name in names}
    colours = {family: place % (SERIES_COLOURS - 1) for place, family in enumerate(sorted(last_of_family))}
    series = []
    for name in names:
        family = _source(name).rstrip("0123456789")
        points = smoothed(stage.curve(name, "losses"))
        series.append(Series(_source(name), points, colours[family], faint=name != last_of_family[family]))
    note = '<p class="facts">Faint: earlier layers.</p>' if any(line.faint for line in series) else ""
    return line_chart(series, "step", "without its weight") + note


def _source(part: str) -> str:
    """ "decoder5/class" -> "decoder5"; a name without a slash stands for itself."""
    return part.rpartition("/")[0] or part


def _by_layer(name: str) -> tuple[int, str]:
    """Sorts decoder10 after decoder9."""
    return len(name), name


def _loss_table(stage: StageRecord) -> str:
    rows = []
    for name in stage.names_within("losses"):
        values = [y for _, y in stage.curve(name, "losses") if math.isfinite(y)]
        if values:
            cells = f"<td>{number(values[0])}</td><td>{number(values[-1])}</td><td>{number(min(values))}</td>"
            rows.append(f'<tr><td class="name">{escape(name)}</td>{cells}</tr>')
    head = "<tr><th>Part</th><th>First logged</th><th>Last</th><th>Lowest</th></tr>"
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<details><summary>All {len(rows)} parts of the loss</summary>{table}</details>" if rows else ""


def _rates_chart(stage: StageRecord) -> str:
    series = [
        Series(name, stage.curve(name, "learning_rates"), place % SERIES_COLOURS)
        for place, name in enumerate(stage.names_within("learning_rates"))
    ]
    return line_chart(series, "step", "learning rate")


def _norm_chart(points: Sequence[Point]) -> str:
    values = [y for _, y in points if math.isfinite(y) and y > 0]
    wide = bool(values) and max(values) > 50 * min(values)
    return line_chart(_raw_and_smooth("gradient norm", points, 3), "step", "L2 norm before clipping", logarithmic=wide)


def _progress_chart(stage: StageRecord) -> str:
    series = [
        Series(name, [(float(step), result.metrics[name]) for step, result in stage.evaluations], colour, dots=True)
        for colour, name in ((0, "AP"), (1, "AP50"))
    ]
    return line_chart(series, "step", "AP, AP50")


def _evaluation(stage: StageRecord, result: EvaluationResult, image_of: ImageOf, pictures: int) -> str:
    names = {row.id: row.name for row in result.classes}
    note = (
        f"Pictures and confusions use detections with a score of at least {result.operating_score:.2f}, where F1 over "
        f"all {len(result.images)} images is highest (IoU 0.5). AP uses all detections."
    )
    parts = [
        f'<h3 class="wide">Evaluation after step {stage.evaluations[-1][0]}</h3><p class="facts">{note}</p>',
        '<div class="charts">',
        chart_card("Precision and recall, IoU 0.5", _curves(result)),
        chart_card("Most frequent mistakes", _confusions(result, names)),
        "</div>",
        _class_table(result.classes),
    ]
    chosen = (("Best pictures", result.best[:pictures]), ("Worst pictures", result.worst[:pictures]))
    if any(examples for _, examples in chosen):
        parts.append(picture_legend().replace("<ul", '<h3 class="wide">Pictures</h3><ul', 1))
    for title, examples in chosen:
        if examples:
            parts.append(f'<h3 class="wide">{title}</h3>' + gallery(stage.name, examples, names, image_of))
    return "".join(parts)


def _curves(result: EvaluationResult) -> str:
    """All classes faintly, the two best and two worst in colour, the mean in front."""
    drawn = sorted((row for row in result.classes if row.precision), key=lambda row: -row.AP50)
    if not drawn:
        return missing_note("No class has a box in this data set: precision and recall are undefined.")
    marked = drawn if len(drawn) <= 5 else [*drawn[:2], *drawn[-2:]]
    plain = [row for row in drawn if row not in marked]
    series = [Series(row.name, _recall_points(row.precision), SERIES_COLOURS - 1, faint=True) for row in plain]
    series += [
        Series(f"{row.name} ({row.AP50:.2f})", _recall_points(row.precision), place + 1)
        for place, row in enumerate(marked)
    ]
    series.append(Series(f"mean ({result.metrics['AP50']:.2f})", _recall_points(result.mean_precision), 0))
    chart = line_chart(series, "recall", "precision", y_range=(0.0, 1.0), x_range=(0.0, 1.0))
    return chart + ('<p class="facts">Thin lines: the other classes. In brackets: AP50.</p>' if plain else "")


def _recall_points(precision: Sequence[float]) -> list[Point]:
    return [(place / (len(precision) - 1), value) for place, value in enumerate(precision)]


def _confusions(result: EvaluationResult, names: dict[int, str]) -> str:
    rows = [row for row in result.confusions if row.truth != row.detected]
    if not rows:
        return "<p>None at this score.</p>"
    cells = "".join(
        f'<tr><td class="name">{_side(row.truth, names, "background")}</td>'
        f'<td class="name text">{_side(row.detected, names, "not detected")}</td><td>{row.count}</td></tr>'
        for row in rows[:_MOST_CONFUSIONS]
    )
    head = '<tr><th>Is</th><th class="text">Detected as</th><th>Boxes</th></tr>'
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{cells}</tbody></table></div>'


def _side(category: int | None, names: dict[int, str], otherwise: str) -> str:
    if category is None:
        return f'<span class="soft">{otherwise}</span>'
    return escape(names.get(category, str(category)))


def _class_table(classes: Sequence[ClassResult]) -> str:
    """One row per class, best AP first, classes without boxes last."""
    rows = [_class_row(row) for row in sorted(classes, key=lambda row: (-row.AP, row.name))]
    columns = "".join(f"<th>{name}</th>" for name in ("Class", "Raw id", "Boxes", "AP", "AP50"))
    columns += '<th class="text wide-only">AP, AP50 behind</th>'
    table = f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    if len(rows) <= _OPEN_CLASSES:
        return f'<h3 class="wide">AP by class</h3><div class="card">{table}</div>'
    return f"<details><summary>AP by class ({len(rows)} classes)</summary>{table}</details>"


def _class_row(row: ClassResult) -> str:
    name = escape(row.name)
    wide, narrow = max(row.AP50, 0.0) * 100, max(row.AP, 0.0) * 100
    bar = f'<div class="track"><i class="soft" style="width:{wide:.1f}%"></i><i style="width:{narrow:.1f}%"></i></div>'
    return (
        f'<tr><td class="name" title="{name}">{name}</td><td>{row.id}</td><td>{row.boxes}</td>'
        f'<td>{share(row.AP)}</td><td>{share(row.AP50)}</td><td class="bar wide-only">{bar}</td></tr>'
    )
