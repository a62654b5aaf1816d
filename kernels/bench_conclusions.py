"""What the rows of a comparison on a GPU mean for the code: which goals hold, what to enter, what may stay."""

from __future__ import annotations

from collections.abc import Sequence

from kernels.bench_timing import Row

GOAL_LAYER, WINDOWS = "encoder 800x1333", "triton windowed"
GOALS = {"forward": 3.0, "forward + backward": 2.0}
MATCHING, MATCHING_GOAL_MS = "matching 7 x 8 problems, 50 boxes", 0.2
# Less than this is within what two runs differ by, and not worth an entry or a second kernel.
GAIN = 1.03


def conclusions(rows: Sequence[Row]) -> list[str]:
    """One line each, from rows of a GPU; none where the rows it needs are not there."""
    return [*_goals(rows), *_windows(rows), *_entries(rows)]


def _seconds(rows: Sequence[Row], what: str, dtype: str, passes: str, name: str) -> float | None:
    for row in rows:
        if (row.what, row.dtype, row.passes, row.implementation) == (what, dtype, passes, name) and row.times:
            return row.times.queued
    return None


def _goals(rows: Sequence[Row]) -> list[str]:
    lines = []
    for passes, goal in GOALS.items():
        ours = _seconds(rows, GOAL_LAYER, "bf16", passes, "triton")
        official = _seconds(rows, GOAL_LAYER, "bf16", passes, "official op")
        if ours and official:
            word = "met" if official / ours >= goal else "missed"
            lines.append(f"goal {word}: {GOAL_LAYER}, bf16, {passes}: {official / ours:.2f} times, goal {goal:.0f}")
    device = _seconds(rows, MATCHING, "fp32", "forward", "triton")
    if device:
        word = "met" if device * 1e3 < MATCHING_GOAL_MS else "missed"
        lines.append(f"goal {word}: {MATCHING}: {device * 1e3:.3f} ms on the device, goal {MATCHING_GOAL_MS} ms")
    return lines


def _windows(rows: Sequence[Row]) -> list[str]:
    """They may stay where they are faster at some encoder layer, forward and backward."""
    gains = {}
    for row in rows:
        if row.implementation == WINDOWS and row.passes == "forward + backward" and row.times:
            direct = _seconds(rows, row.what, row.dtype, row.passes, "triton")
            if direct:
                gains[f"{row.what}, {row.dtype}"] = direct / row.times.queued
    if not gains:
        return []
    verdict = "stays" if max(gains.values()) >= GAIN else "goes: delete kernels/deform_attn/triton_window.py"
    found = "; ".join(f"{where}: {gain:.2f} times the direct one" for where, gain in gains.items())
    return [f"triton_windowed {verdict} ({found})"]


def _entries(rows: Sequence[Row]) -> list[str]:
    """The fastest launch shape of every comparison of such, as a line for `TIMED`, where it is not the rule's."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.what.startswith("launch shapes") and row.times:
            key = (row.what, row.passes)
            if key not in best or row.ratio() > best[key].ratio():
                best[key] = row
    lines = []
    for (what, passes), row in best.items():
        if row.ratio() >= GAIN:
            faster = f"{row.ratio():.2f} times the rule's shape"
            lines.append(f"enter in TIMED of kernels/deform_attn/tuning.py: {row.implementation},  # {faster}")
        else:
            lines.append(f"enter nothing in TIMED: {what}, {passes}: no shape beats the rule's by {GAIN - 1:.0%}")
    return lines
