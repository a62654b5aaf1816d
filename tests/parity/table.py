"""`python -m tests.parity.table`: the table of docs/parity.md, measured on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from tests.support.deviations import Deviation, measure
from tests.support.goldens import CASES, read_case


def main() -> None:
    torch.set_num_threads(1)  # sums are made in one order
    for line in render([row for name in CASES for row in measure(read_case(name))]):
        print(line)


def render(rows: Iterable[Deviation]) -> Iterator[str]:
    """A Markdown table: a line per quantity, a column per case; "-" where a case does not record the quantity."""
    by_quantity: dict[str, dict[str, Deviation]] = {}
    for row in rows:
        by_quantity.setdefault(row.quantity, {})[row.case] = row
    yield f"| quantity | {' | '.join(CASES)} | tolerance |"
    yield "|---" * (len(CASES) + 2) + "|"
    for quantity, cases in by_quantity.items():
        worst = [_number(cases[name].worst) if name in cases else "-" for name in CASES]
        tolerances = dict.fromkeys(_number(row.tolerance) for row in cases.values())
        yield f"| {quantity} | {' | '.join(worst)} | {', full '.join(tolerances)} |"


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


if __name__ == "__main__":
    main()
