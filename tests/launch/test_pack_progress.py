"""What `pack` says while it works: bars on a terminal, a line a minute in a log."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console

from launch.commands.pack import LINE_SECONDS, phases


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=200, highlight=False), out


def every(seconds: float) -> Iterator[float]:
    """A clock that goes on by so much whenever it is looked at."""
    now = 1000.0
    while True:
        yield now
        now += seconds


def test_a_line_a_minute_without_a_terminal() -> None:
    to, out = console(terminal=False)
    clock = every(LINE_SECONDS / 4)
    with phases(to, lambda: next(clock)) as tell:
        for done in range(1, 10):
            tell("writing shards", done, 9)
    assert out.getvalue().splitlines() == [
        "writing shards: 4 of 9 (44%), 1 min 0 s since the start",
        "writing shards: 8 of 9 (89%), 2 min 0 s since the start",
    ]


def test_phases_share_the_minute_and_a_short_run_says_nothing() -> None:
    to, out = console(terminal=False)
    clock = every(LINE_SECONDS / 3)
    with phases(to, lambda: next(clock)) as tell:
        for phase in ("reading annotations", "reading headers", "writing shards", "writing shards"):
            tell(phase, 5, 10)
    assert [line.partition(":")[0] for line in out.getvalue().splitlines()] == ["writing shards"]
    to, out = console(terminal=False)
    clock = every(0.1)
    with phases(to, lambda: next(clock)) as tell:
        for done in range(100):
            tell("writing shards", done, 100)
    assert out.getvalue() == ""


def test_bars_on_a_terminal() -> None:
    to, out = console(terminal=True)
    with phases(to) as tell:
        tell("reading headers", 3, 4)
    assert "reading headers" in out.getvalue() and "3/4" in out.getvalue()
