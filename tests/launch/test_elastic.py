"""Numbers of workers, retries, heartbeats and kinds of failure: what the supervisor decides, without any machine."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import ray.exceptions
import torch
from hypothesis import given
from hypothesis import strategies as st

from dino_scale.config.schema import BatchConfig, ChainConfig, StageConfig, WorkerRange
from dino_scale.errors import ConfigError, DataError, WorkerLostError
from launch.advice import against_memory
from launch.elastic import Retries, largest_fitting, worker_counts
from launch.heartbeat import Heartbeats, Pulse
from launch.memory_events import out_of_memory_kills
from launch.network import accepts_connections, interface_of
from launch.ray_failures import cause_among, kind_of
from launch.worker import StageJob
from tests.support.processes import free_port

BATCH = BatchConfig(global_size=16, microbatch=2)


def test_counts_that_do_not_divide_are_skipped() -> None:
    assert worker_counts(BATCH, WorkerRange(1, 8)) == [8, 4, 2, 1]
    assert worker_counts(BATCH, WorkerRange(3, 5)) == [4]
    assert largest_fitting([8, 4, 2, 1], 7) == 4
    assert largest_fitting([8, 4], 3) is None


def test_no_count_at_all_is_an_error_that_names_the_range() -> None:
    with pytest.raises(ConfigError, match=r"batch\.global_size is 16 .* from 5 to 7 \(launch\.workers\)"):
        worker_counts(BATCH, WorkerRange(5, 7))
    with pytest.raises(ConfigError, match=r"expected a multiple of batch\.microbatch x workers = 2 x 3 = 6"):
        worker_counts(BATCH, WorkerRange(3, 3))


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 40), st.integers(0, 40))
def test_every_count_divides_and_none_is_missing(factor: int, microbatch: int, low: int, more: int) -> None:
    batch = BatchConfig(global_size=factor * microbatch, microbatch=microbatch)
    possible = [count for count in range(low, low + more + 1) if factor % count == 0]
    if possible:
        assert worker_counts(batch, WorkerRange(low, low + more)) == sorted(possible, reverse=True)
    else:
        with pytest.raises(ConfigError):
            worker_counts(batch, WorkerRange(low, low + more))


def test_retries_back_off_and_end() -> None:
    tries = Retries(4)
    assert [tries.pause_after("lost", "step_1") for _ in range(4)] == [0.0, 2.0, 4.0, 8.0]
    with pytest.raises(WorkerLostError, match=r"^lost; the workers failed 5 times in a row since checkpoint step_1, "):
        tries.pause_after("lost", "step_1")


def test_a_new_checkpoint_is_progress() -> None:
    tries = Retries(1)
    assert [tries.pause_after("lost", name) for name in (None, "step_1", "step_2")] == [0.0, 0.0, 0.0]
    with pytest.raises(WorkerLostError, match="2 times in a row since checkpoint step_2"):
        tries.pause_after("lost", "step_2")


def pulse(step: int | None = 1, idle: float = 0.0, own: float | None = 1.0) -> Pulse:
    return Pulse((), step, idle, own, notice=False)


def hearts(*pulses: Pulse | None, machines: str | None = None) -> Heartbeats:
    """At time 0, those that are not None answer. machines: a letter for each; None: one machine each."""
    names = [f"worker {rank}" for rank in range(len(pulses))]
    found = Heartbeats(names, machines or names, now=0.0)
    for rank, answer in enumerate(pulses):
        if answer is not None:
            found.note(rank, answer, now=0.0)
    return found


def test_a_slow_worker_is_named_once_until_it_has_recovered() -> None:
    found = hearts(pulse(own=1.0), pulse(own=1.1), pulse(own=1.8))
    (line,) = found.remarks(0.0)
    assert line.startswith(
        "worker 2 is slow: its own part of a step takes 1.80 s, that of workers on other machines 1.05"
    )
    assert found.remarks(0.0) == []
    for own, news in ((1.4, 0), (1.8, 0), (1.2, 0), (1.8, 1)):  # 1.4 is less slow, 1.2 is no longer slow
        found.note(2, pulse(own=own), 1.0)
        assert len(found.remarks(1.0)) == news


def test_machines_are_compared_not_workers_that_share_one() -> None:
    assert hearts(pulse(own=1.0), pulse(own=9.0), machines="aa").remarks(0.0) == []
    assert hearts(pulse(own=1.0), pulse(own=9.0), pulse(own=None), machines="aab").remarks(0.0) == []
    both = hearts(*[pulse(own=own) for own in (1.0, 1.0, 4.0, 5.0)], machines="aabb")
    (line,) = both.remarks(0.0)
    assert line.startswith(
        "worker 3 is slow: its own part of a step takes 5.00 s, that of workers on other machines 1.00"
    )
    assert both.remarks(0.0) == []
    one = hearts(*[pulse(own=own) for own in (1.0, 1.0, 1.0, 5.0)], machines="aabb")
    (line,) = one.remarks(0.0)
    assert line.startswith("worker 3 is slow: its own part of a step takes 5.00 s")


def test_small_or_unknown_differences_are_no_news() -> None:
    assert hearts(pulse(own=0.010), pulse(own=0.040)).remarks(0.0) == []
    assert hearts(pulse(own=None), pulse(own=9.0)).remarks(0.0) == []
    assert hearts(pulse(own=1.0), pulse(own=1.4)).remarks(0.0) == []


def test_a_silent_worker_is_named_with_its_last_step() -> None:
    found = hearts(pulse(step=7), None)
    found.note(0, pulse(step=9), 19.0)
    assert found.remarks(20.0) == ["worker 1 has not answered for 20 s (no step yet)"]
    assert found.remarks(21.0) == []


def test_workers_that_all_wait_are_mentioned_once() -> None:
    found = hearts(pulse(step=7, idle=21.0), pulse(step=7, idle=21.0))
    assert found.remarks(0.0) == ["no worker has done a step for 21 s (last step 7)"]
    assert found.remarks(0.0) == []
    found.note(1, pulse(step=8), 0.0)
    assert found.remarks(0.0) == []
    assert hearts(pulse(step=7, idle=21.0), None).remarks(0.0) == []


def test_the_worker_that_does_not_answer_is_the_one_that_hangs() -> None:
    found = hearts(pulse(step=7), pulse(step=7))
    found.note(0, pulse(step=7, idle=100.0), 100.0)
    assert found.hung(99.0, 100.0) == "worker 1 has done no step for 100 s (last step 7)"
    assert found.hung(101.0, 100.0) is None
    found.note(1, pulse(step=7), 10.0)
    assert found.hung(95.0, 100.0) == "worker 1 has done no step for 90 s (last step 7)"


def test_workers_that_answer_but_do_no_step_hang_too() -> None:
    found = hearts(pulse(step=None, idle=50.0), pulse(step=None, idle=50.0))
    assert found.hung(49.0, 0.0) is not None


def task_error(cause: Exception) -> Exception:
    return ray.exceptions.RayTaskError("run", f"Traceback\n{type(cause).__name__}: {cause}", cause)


DEATH = ray.exceptions.ActorDiedError()
CLOSED = task_error(RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DataError("bad"), "ours"),
        (DEATH, "death"),
        (ray.exceptions.ActorUnavailableError("gone", b"0" * 16), "death"),
        (CLOSED, "connection"),
        (task_error(torch.distributed.DistNetworkError("no route")), "connection"),
        (task_error(OSError(errno.ESTALE, "Stale file handle")), "connection"),
        (OSError(errno.ENOSPC, "No space left on device"), "file"),
        (task_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), "memory"),
        (task_error(MemoryError()), "memory"),
        (task_error(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")), "memory"),
        (ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."), "memory"),
        (task_error(RuntimeError("CUDA error: uncorrectable ECC error encountered")), "device"),
        (task_error(RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed.")), "death"),
        (task_error(KeyError("boxes")), "bug"),
        (task_error(FileNotFoundError(errno.ENOENT, "No such file")), "bug"),
    ],
)
def test_kinds_of_failure(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


def test_the_cause_is_told_from_what_follows_from_it() -> None:
    bug = task_error(KeyError("boxes"))
    assert cause_among({0: CLOSED, 1: DEATH}) == (1, "death")
    assert cause_among({0: DEATH, 1: DataError("bad")}) == (1, "ours")
    assert cause_among({0: bug, 1: DEATH}) == (1, "death")
    assert cause_among({0: CLOSED, 1: bug}) == (1, "bug")
    assert cause_among({0: CLOSED, 1: CLOSED}) == (0, "connection")


def test_advice_names_settings_with_their_values() -> None:
    job = StageJob("runs/x", "only", ChainConfig(stages={"only": StageConfig(zero_stage=3)}))
    text = against_memory(job)
    assert "lower stages.only.batch.microbatch (now 2), or set model.backbone.checkpoint_activations=true" in text
    assert "zero_stage" not in text and text.endswith("dino-scale resume runs/x --set KEY=VALUE")


def test_out_of_memory_kills_of_the_group_before_the_machine(tmp_path: Path) -> None:
    assert out_of_memory_kills(tmp_path) == 0
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/vmstat").write_text("pgfault 7\noom_kill 5\n")
    assert out_of_memory_kills(tmp_path) == 5
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert out_of_memory_kills(tmp_path) == 2


def test_network() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None
    assert not accepts_connections("127.0.0.1", free_port(), 0.5)
