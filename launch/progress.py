"""What the person at the terminal sees: one live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dino_scale.training.control import EvaluationEvent, Event, MessageEvent, StepEvent

PLAIN_SECONDS = 5.0  # between two plain lines about steps


class Progress:
    """A context. Call it with events; tell it which stage of how many has begun."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._live = Live(console=self.console, transient=True, auto_refresh=False) if self._is_terminal() else None
        self._stage = ""
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(Text(""), refresh=True)
            self._live.stop()

    def begin_stage(self, name: str, number: int, count: int) -> None:
        self._stage = f"stage {number}/{count} {name}"
        self._last_line = 0.0
        self.message(f"{self._stage}: begins")

    def message(self, text: str) -> None:
        self.console.print(text, markup=False)

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            self._step(event)
        elif isinstance(event, EvaluationEvent):
            self.message(f"{self._stage}: step {event.step}, {metrics_line(event.metrics)}")
        elif isinstance(event, MessageEvent):
            self.message(event.text)

    def _step(self, event: StepEvent) -> None:
        line = f"{self._stage}: {step_line(event)}"
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_SECONDS or event.step == event.total_steps:
            self._last_line = now
            self.message(line)

    def _is_terminal(self) -> bool:
        return self.console.is_terminal and not self.console.is_dumb_terminal


def step_line(event: StepEvent) -> str:
    return (
        f"step {event.step}/{event.total_steps}, epoch {event.epoch:.2f}, loss {event.loss:.3f}, "
        f"{event.images_per_second:.1f} images/s, {duration(event.seconds_left)} left"
    )


def metrics_line(metrics: dict[str, float]) -> str:
    """The COCO numbers that matter most, -1 (nothing to measure) as a dash."""
    return ", ".join(f"{name} {number(metrics.get(name, -1.0))}" for name in ("AP", "AP50", "AP75"))


def number(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """12 s, 3 min 5 s, 2 h 4 min, 3 d 1 h."""
    whole = max(0, round(seconds))
    for unit, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part_size} {part}"
    return f"{whole} s"
