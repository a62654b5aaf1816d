"""What is printed about a running stage."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dino_scale.training.control import EvaluationEvent, MessageEvent, StepEvent
from launch import progress
from launch.progress import Progress, duration


def step(number: int, total: int = 10) -> StepEvent:
    return StepEvent("a", number, total, epoch=number / 4, loss=12.3456, images_per_second=41.27, seconds_left=130.0)


def shown(terminal: bool = False) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(Console(file=out, force_terminal=terminal, width=200, highlight=False)), out


def test_plain_lines_hold_everything() -> None:
    view, out = shown()
    with view:
        view.begin_stage("pretrain", 1, 3)
        view(step(1))
        view(EvaluationEvent("a", 1, {"AP": 0.25, "AP50": 0.5, "AP75": -1.0}))
        view(MessageEvent("[bold]a message"))
    assert out.getvalue().splitlines() == [
        "stage 1/3 pretrain: begins",
        "stage 1/3 pretrain: step 1/10, epoch 0.25, loss 12.346, 41.3 images/s, 2 min 10 s left",
        "stage 1/3 pretrain: step 1, AP 0.250, AP50 0.500, AP75 -",
        "[bold]a message",
    ]


def test_plain_lines_are_rare_but_the_first_and_last_step_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    view, out = shown()
    with view:
        view.begin_stage("a", 1, 1)
        for number in range(1, 11):
            view(step(number))
    assert [line.split(",")[0][-4:].strip() for line in out.getvalue().splitlines()[1:]] == ["1/10", "0/10"]
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    view, out = shown()
    with view:
        for number in range(1, 11):
            view(step(number))
    assert len(out.getvalue().splitlines()) == 10


def test_a_terminal_gets_one_line_that_changes() -> None:
    view, out = shown(terminal=True)
    with view:
        view.begin_stage("a", 1, 1)
        for number in range(1, 11):
            view(step(number))
        view.message("hello")
    text = out.getvalue()
    assert all(f"step {number}/10" in text for number in range(1, 11))
    assert "hello\n" in text.replace("\r", "")
    assert text.count("\n") < 10


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0.6, "1 s"), (59.4, "59 s"), (60, "1 min 0 s"), (7440, "2 h 4 min"), (90000, "1 d 1 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
