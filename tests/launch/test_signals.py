"""Ctrl-C, SIGTERM and SIGUSR1, sent to a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from launch.signals import StopRequest
from launch.worker_process import WorkerProcess

CODE = """
import time
from launch.signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("requested", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print("aborted", flush=True)
"""


def start() -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_a_second_interrupt_aborts(first: signal.Signals) -> None:
    process = start()
    try:
        assert process.stdout is not None
        process.send_signal(first)
        assert process.stdout.readline() == "requested\n"
        process.send_signal(signal.SIGINT)  # the echo of the same Ctrl-C, passed on by a launcher
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.2)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
        assert out == "aborted\n"
        assert errors.count("stopping: a checkpoint is written at the next step") == 1
    finally:
        process.kill()
        process.communicate()


def test_a_request_to_save_is_taken_once_and_does_not_stop() -> None:
    with StopRequest() as stop:
        assert not stop.take_save_request()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        stop.install_again()
        assert stop.take_save_request()
        assert not stop.take_save_request() and not stop.requested
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_worker_serves_a_request_to_save_once() -> None:
    worker = WorkerProcess("127.0.0.1")
    assert not worker.save_requested()
    worker.request_save()
    assert worker.save_requested()
    assert not worker.save_requested() and not worker.stop_requested()
