"""What is wrong with raw data: repairs, each of which is told, and defects, which nobody can mend without guessing.

`pack` stops at the first defect; `doctor` counts them all and goes on without the thing that has one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dino_scale.errors import DataError

EXAMPLES = 20  # places kept of each kind


class Defect(DataError):
    """Something that cannot be mended. kind: what sort of defect. reason: the message without paths of this machine."""

    def __init__(self, text: str, kind: str = "", reason: str = "") -> None:
        super().__init__(text)  # alone: it has to survive pickling, which restores the rest from the attributes
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Repair:
    """One thing that was mended.

    file: the image's name in the annotation file, or the name of the annotation file where it is about no image.
    owner: whose id it is: annotation, image or category. what: what was found, and what became of it if it is not the
    kind that says so.
    """

    kind: str
    file: str
    owner: str
    id: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.owner} {self.id}: {self.what}"

    def to_json(self) -> str:
        """One line, without its end."""
        row = {"kind": self.kind, "file": self.file, "owner": self.owner, "id": self.id, "what": self.what}
        return json.dumps(row)


@dataclass
class Tally:
    """How often each kind was met, and the first few places."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: object) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        places = self.examples.setdefault(kind, [])
        if len(places) < EXAMPLES:
            places.append(str(place))

    def add_all(self, other: Tally) -> None:
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            places = self.examples.setdefault(kind, [])
            places += other.examples[kind][: EXAMPLES - len(places)]


class Findings:
    """Takes every repair and every defect as it is found. listing: told each repair, so that none has to be kept.
    collect: count defects instead of raising them."""

    def __init__(self, listing: Callable[[Repair], object] | None = None, collect: bool = False) -> None:
        self.repairs, self.defects = Tally(), Tally()
        self.collect = collect
        self._listing = listing

    def mended(self, repair: Repair) -> None:
        self.repairs.add(repair.kind, repair)
        if self._listing is not None:
            self._listing(repair)

    def mended_all(self, repairs: Iterable[Repair]) -> None:
        for repair in repairs:
            self.mended(repair)

    def refused(self, defect: Defect) -> None:
        """Raises it; the caller goes on without the thing where this returns."""
        if not self.collect:
            raise defect
        self.defects.add(defect.kind, defect)


def shortened(text: str) -> str:
    """For a message: what is in an annotation file can be of any length."""
    return text if len(text) <= 80 else text[:77] + "..."
