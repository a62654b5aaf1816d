"""Byte ranges of files in an object store or on a web server, through fsspec: many in flight, retried, checked.

The only module that imports fsspec.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from dino_scale.errors import ConfigError, DataError

PROTOCOLS = ("s3", "gs", "http", "https", "memory")
_LONGEST_PAUSE_SECONDS = 5.0
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}


@dataclass(frozen=True)
class Range:
    """Bytes start to start + size of a file. fits: tells whether bytes of the right number are the right ones."""

    name: str
    start: int
    size: int
    fits: Callable[[bytes], bool]


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL. in_flight: requests at once. tries: per range. backoff: seconds before the second try,
    doubled before each further one. timeout: seconds a single request may take. outage: seconds to go on trying while
    the store does not answer at all; wrong bytes are given up after `tries`. Pickles without its connections."""

    url: str
    in_flight: int = 32
    tries: int = 6
    backoff: float = 0.2
    timeout: float = 60.0
    outage: float = 300.0

    def __post_init__(self) -> None:
        protocol = self.url.partition("://")[0]
        if protocol not in PROTOCOLS:
            raise ConfigError(
                f"'{self.url}': expected a folder or an address that begins with one of "
                f"{', '.join(f'{name}://' for name in PROTOCOLS)}; nothing else is opened"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_store"}

    @cached_property
    def _store(self) -> tuple[fsspec.AbstractFileSystem, str]:
        protocol = self.url.partition("://")[0]
        try:
            store, path = fsspec.core.url_to_fs(self.url)
        except ImportError:
            package = _PACKAGES.get(protocol, protocol)
            raise ConfigError(f"'{self.url}': reading it needs the package {package}: pip install {package}") from None
        return store, path.rstrip("/")

    def read(self, wanted: Sequence[Range]) -> list[bytes | DataError]:
        """The bytes of every range, or why there are none after all tries; never raises for a range."""
        found: list[bytes | DataError] = [DataError("not asked for")] * len(wanted)
        open_places = list(range(len(wanted)))
        begin = time.monotonic()
        for attempt in itertools.count(1):
            answers = self._ask([wanted[place] for place in open_places])
            for place, answer in zip(open_places, answers, strict=True):
                found[place] = self._judge(wanted[place], answer)
            open_places = [place for place in open_places if _may_be_tried_again(found[place])]
            away = any(isinstance(found[place], _Away) for place in open_places)
            if not open_places or self._gives_up(attempt, away, begin):
                return found
            time.sleep(self._pause(attempt))
        raise AssertionError("the loop above ends by returning")

    def _gives_up(self, attempt: int, away: bool, begin: float) -> bool:
        return attempt >= self.tries and not (away and time.monotonic() - begin < self.outage)

    def _pause(self, attempt: int) -> float:
        return min(_LONGEST_PAUSE_SECONDS, self.backoff * 2 ** (attempt - 1))

    def whole(self, name: str) -> bytes:
        """A small file. Raises DataError."""
        store, path = self._store
        begin = time.monotonic()
        for attempt in itertools.count(1):
            try:
                return bytes(store.cat_file(f"{path}/{name}"))
            except FileNotFoundError:
                raise DataError(f"{self.url}/{name}: does not exist: check the address") from None
            except Exception as error:  # what a store raises depends on its library
                reason, refused = _in_words(error), _is_refusal(error)
            if self._gives_up(attempt, not refused, begin):
                raise DataError(f"{self.url}/{name}: cannot be read after {attempt} tries ({reason})")
            time.sleep(self._pause(attempt))
        raise AssertionError("the loop above ends by returning or raising")

    def _ask(self, wanted: Sequence[Range]) -> list[bytes | Exception]:
        store, path = self._store
        if isinstance(store, AsyncFileSystem):
            return sync(store.loop, _ask_at_once, store, path, wanted, self.in_flight, self.timeout)
        answers: list[bytes | Exception] = []
        for part in wanted:
            try:
                answers.append(store.cat_file(f"{path}/{part.name}", part.start, part.start + part.size))
            except Exception as error:  # what a store raises depends on its library
                answers.append(error)
        return answers

    def _judge(self, part: Range, answer: bytes | Exception) -> bytes | DataError:
        place = f"{self.url}/{part.name}: bytes {part.start} to {part.start + part.size}"
        if isinstance(answer, FileNotFoundError):
            return _Lost(f"{self.url}/{part.name}: does not exist (No such file)")
        if isinstance(answer, Exception):
            kind = DataError if _is_refusal(answer) else _Away
            return kind(f"{place} cannot be read ({_in_words(answer)})")
        if len(answer) != part.size:
            return DataError(f"{place}: {len(answer)} of {part.size} bytes came")
        return answer if part.fits(answer) else DataError(f"{place}: does not match its checksum")


def _in_words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())


def _is_refusal(error: Exception) -> bool:
    """The store is there and does not let us in; web servers say so by a status, which aiohttp's errors carry."""
    return isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)


class _Lost(DataError):
    """Trying again will not help."""


class _Away(DataError):
    """The store gave no answer that says anything about the data: trying again will help when it is back."""


def _may_be_tried_again(outcome: bytes | DataError) -> bool:
    return isinstance(outcome, DataError) and not isinstance(outcome, _Lost)


async def _ask_at_once(
    store: AsyncFileSystem, path: str, wanted: Sequence[Range], in_flight: int, timeout: float
) -> list[Any]:
    gate = asyncio.Semaphore(in_flight)

    async def ask(part: Range) -> bytes:
        async with gate:
            request = store._cat_file(f"{path}/{part.name}", start=part.start, end=part.start + part.size)
            return await asyncio.wait_for(request, timeout)

    return await asyncio.gather(*map(ask, wanted), return_exceptions=True)
