"""Reads a large JSON object piece by piece: Objects365's 25 million boxes must never lie in memory as dictionaries."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from dino_scale.errors import DataError

CHUNK = 1 << 20  # characters read at a time
LONGEST_ELEMENT = 64 << 20  # characters; a longer one is broken or hostile
_SPACE = re.compile(r"[ \t\n\r]*")
_MAY_GO_ON = ("", ".", "e", "E")  # what may follow the digits of a number whose rest is in the next chunk


class _RepeatedKey(Exception):
    """No ValueError: reading on would not mend it."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary of what stands between braces, at any depth; Python's own would let the last of two keys win."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RepeatedKey(_first_repeated(key for key, _ in pairs))
    return found


def _first_repeated(keys: Iterable[str]) -> str:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    raise ValueError("no key occurs twice")


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def stream_object(path: Path, read: Callable[[int, int], None] | None = None) -> Iterator[tuple[str, Any]]:
    """Yields (key, element) for every element of every array directly inside the top-level object, and (key, None)
    once before the elements of an array, so that empty arrays show; yields (key, value) for every other value.

    read: told after every piece how many bytes of how many have been read.
    Raises DataError for a missing file, for anything that is no JSON object and for a key that occurs twice in one
    object, at any depth.
    """
    try:
        with open(path, encoding="utf-8") as file:
            yield from _Stream(path, file, read).items()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path of the annotation file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason}): expected a JSON annotation file") from None


class _Stream:
    """A window of text that grows at the right and is cut at the left."""

    def __init__(self, path: Path, file: TextIO, read: Callable[[int, int], None] | None) -> None:
        self.path = path
        self.file = file
        self.read = read
        self.size = os.fstat(file.fileno()).st_size
        self.text = ""
        self.position = 0
        self.dropped = 0  # characters cut off at the left
        self.complete = False

    def items(self) -> Iterator[tuple[str, Any]]:
        self._expect("{")
        keys: set[str] = set()
        if self._peek() != "}":
            while True:
                key = self._key(keys)
                if self._peek() == "[":
                    yield key, None
                    yield from ((key, element) for element in self._elements())
                else:
                    yield key, self._value()
                if not self._another("}"):
                    break
        else:
            self._expect("}")
        if self._peek():
            raise self._error("expected the end of the file")

    def _key(self, earlier: set[str]) -> str:
        key = self._value()
        if not isinstance(key, str):
            raise self._error("expected a key")
        if key in earlier:
            raise self._repeated(key, "in the outermost object")
        earlier.add(key)
        self._expect(":")
        return key

    def _elements(self) -> Iterator[Any]:
        self._expect("[")
        if self._peek() == "]":
            self._expect("]")
            return
        while True:
            yield self._value()
            if not self._another("]"):
                return

    def _another(self, closing: str) -> bool:
        """Passes a comma (True) or the closing bracket (False)."""
        if self._peek() == ",":
            self._expect(",")
            return True
        self._expect(closing)
        return False

    def _value(self) -> Any:
        while True:
            self._peek()
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
            except _RepeatedKey as error:
                raise self._repeated(str(error), "within the element that begins there") from None
            except (ValueError, RecursionError) as error:
                if self.complete or isinstance(error, RecursionError):
                    raise self._error(str(error).partition(":")[0]) from None
            else:
                cut = self.text[end : end + 1] in _MAY_GO_ON  # at the edge, or within 1.5 or 1e5
                if not cut or self.complete:
                    self.position = end
                    return value
            self._grow()

    def _grow(self) -> None:
        self.dropped += self.position
        self.text = self.text[self.position :]
        self.position = 0
        if len(self.text) > LONGEST_ELEMENT:
            raise self._error(f"no complete value within {LONGEST_ELEMENT} characters")
        piece = self.file.read(max(CHUNK, len(self.text)))  # doubling keeps a long element linear in time
        self.complete = not piece
        if self.read is not None:
            self.read(self.file.buffer.tell(), self.size)
        self.text += piece

    def _peek(self) -> str:
        """The next character that is no space, '' at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self.text) or self.complete:
                return self.text[self.position : self.position + 1]
            self._grow()

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            raise self._error(f"expected '{character}'")
        self.position += 1

    def _repeated(self, key: str, where: str) -> DataError:
        shown = key if len(key) <= 80 else key[:77] + "..."
        return self._error(f"key {shown!r} occurs twice {where}; keep one of them")

    def _error(self, problem: str) -> DataError:
        place = self.dropped + self.position
        return DataError(
            f"{self.path}: is not valid JSON near character {place} ({problem}): expected a COCO-format annotation file"
        )
