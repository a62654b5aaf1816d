"""What happens to a call when nobody listens at the cluster's head any more."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from dino_scale.errors import ClusterLostError, DataError
from launch.ray_head import Head


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def head(listener: socket.socket) -> Iterator[Head]:
    head = Head(f"127.0.0.1:{listener.getsockname()[1]}", patience=0.5)
    yield head
    head.close()


def nothing() -> None:
    """There is nothing to do meanwhile."""


def fail() -> None:
    raise DataError("bad")


def test_results_and_errors_come_back(head: Head) -> None:
    assert head.attend(lambda: 7, nothing) == 7
    with pytest.raises(DataError, match="bad"):
        head.attend(fail, nothing)


def test_the_calling_thread_works_meanwhile_and_once_more_at_the_end(head: Head) -> None:
    begun, done, threads = threading.Event(), [], set()

    def meanwhile() -> None:
        begun.set()
        threads.add(threading.current_thread())
        done.append(len(done))

    assert head.attend(begun.wait, meanwhile)
    assert threads == {threading.current_thread()} and len(done) >= 2


def test_a_call_that_waits_for_a_lost_head_is_given_up(head: Head, listener: socket.socket) -> None:
    answer = threading.Event()

    def wait() -> None:
        listener.close()
        answer.wait()

    with pytest.raises(ClusterLostError, match=rf"^the head of the Ray cluster at {head.address} cannot be reached$"):
        head.attend(wait, nothing)
    assert head.lost
    answer.set()
