"""Ray Core as the engine: one actor per worker in a placement group, packed onto few hosts, ranks ordered by host.

The driver asks rank 0 for events and passes on a request to stop; nothing else travels between driver and workers.
With `launch.address: local` Ray is started on this machine, reachable from this machine only, and ends with the driver.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from dino_scale.config.schema import LaunchConfig
from dino_scale.errors import DinoScaleError, UserError, WorkerLostError
from dino_scale.training.control import MessageEvent
from launch.engine import Show
from launch.guardian import Guardian
from launch.signals import StopRequest, undisturbed
from launch.worker import StageJob, StageResult
from launch.worker_process import Place, WorkerProcess

# Read by Ray on import. The first one, despite its name, keeps a cluster that Ray starts on loopback.
_LOCAL_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent home
    "RAY_DEDUP_LOGS": "0",
}

# /tmp, because the path of a socket in it must stay below 108 bytes
_SESSIONS, _PREFIX, _OWNER, _DAY_SECONDS = "/tmp", "dino-scale-ray-", "driver_pid", 86400.0

T = TypeVar("T")
_POLL_SECONDS = 0.2
_START_SECONDS = 120.0  # for placing and starting the workers
_LAST_WORDS_SECONDS = 10.0  # after the first failure: which rank was the cause shows only when others have failed too
_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum is 75 MiB; only small messages pass through it


class RayEngine:
    is_primary = True

    def __init__(self, launch: LaunchConfig) -> None:
        self.launch = launch
        self.workers = launch.workers
        self._session: Path | None = None
        self._actors: list[Any] = []
        self._places: list[Place] = []
        self._group: Any = None
        self._guardian: Guardian | None = None
        self._started = False
        self._keep_logs = False

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with undisturbed():
            if self._started:
                self._end()
            if self._session is not None and not self._keep_logs:
                shutil.rmtree(self._session, ignore_errors=True)

    def on_primary(self, function: Callable[[], T]) -> T:
        return function()

    def run(self, job: StageJob, stop: StopRequest, show: Show) -> StageResult:
        if not self._actors:
            self._connect(show)
            stop.install_again()
            self._place_workers(show)
            self._guardian = Guardian() if self._session is not None else None
        runs = [
            worker.run.options(concurrency_group="work").remote(job, place)
            for worker, place in zip(self._actors, self._places, strict=True)
        ]
        try:
            return self._watch(runs, stop, show)
        finally:
            self._show_events(show)

    # --- starting -----------------------------------------------------------------------------------------------------

    def _connect(self, show: Show) -> None:
        local = self.launch.address == "local"
        os.environ.update(_ENVIRONMENT | (_LOCAL_ENVIRONMENT if local else {}))
        ray = _import_ray()
        options: dict[str, Any] = {
            "logging_level": "CRITICAL",
            "log_to_driver": False,
        }  # errors come back as exceptions
        show(MessageEvent("starting Ray on this machine" if local else f"joining Ray at {self.launch.address}"))
        if local:
            self._session = _new_session()
            options |= {
                "num_cpus": max(os.cpu_count() or 1, self.launch.workers * self._threads()),
                "include_dashboard": False,
                "_temp_dir": str(self._session),
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_system_config": {
                    "gcs_rpc_server_reconnect_timeout_s": 10,  # orphans give up after 10 s, not 60
                    "worker_niceness": 0,  # training is what the user waits for; Ray would run it at 15
                },
            }
        try:
            ray.init(address=self.launch.address, **options)
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"launch.address is '{self.launch.address}': no Ray cluster answers there ({_first_line(error)}); "
                "expected local, auto or host:port"
            ) from None
        self._started = True
        self._warn_of_crowding(show)

    def _threads(self) -> int:
        return max(1, self.launch.threads)

    def _warn_of_crowding(self, show: Show) -> None:
        cores = os.cpu_count() or 1
        if self.launch.address == "local" and self.launch.workers * self._threads() > cores:
            show(MessageEvent(f"{self.launch.workers} workers x {self._threads()} threads share {cores} CPU core(s)"))

    def _place_workers(self, show: Show) -> None:
        """One actor per worker; sets `_workers` and `_places` in rank order."""
        ray = _import_ray()
        needs = self._needs(ray.cluster_resources())
        self._group = ray.util.placement_group([needs] * self.launch.workers, strategy="PACK")
        if not self._group.wait(_START_SECONDS):
            raise UserError(
                f"launch.workers is {self.launch.workers}, each needs {_described(needs)}: the cluster did not free "
                f"them within {_START_SECONDS:.0f} s; it has {_described(ray.available_resources())} to give now"
            )
        actors = [self._start_actor(index, needs) for index in range(self.launch.workers)]
        hosts = _hosts_of(self._group)
        order = sorted(range(len(actors)), key=lambda index: (hosts[index], index))
        self._actors = [actors[index] for index in order]
        ray.get([worker.process_id.remote() for worker in self._actors], timeout=_START_SECONDS)
        self._places = _seats([hosts[index] for index in order], self._actors[0])
        machines = len(set(hosts))
        show(MessageEvent(f"{len(actors)} worker(s) on {machines} machine(s), {_described(needs)} each"))

    def _needs(self, cluster: dict[str, float]) -> dict[str, float]:
        """Resources of one worker. A cluster with GPUs gives one to each."""
        needs: dict[str, float] = {"CPU": self._threads()}
        gpus = int(cluster.get("GPU", 0))
        if gpus:
            needs["GPU"] = 1
        for name, amount in needs.items():
            if cluster.get(name, 0) < amount * self.launch.workers:
                raise UserError(
                    f"launch.workers is {self.launch.workers}, each needs {_described(needs)}: the cluster has only "
                    f"{_described(cluster)}; ask for fewer workers (--set launch.workers=N) or add machines"
                )
        return needs

    def _start_actor(self, index: int, needs: dict[str, float]) -> Any:
        ray = _import_ray()
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        variables = {"OMP_NUM_THREADS": str(self._threads())} if self.launch.threads else {}
        if "GPU" not in needs:
            variables["DS_ACCELERATOR"] = "cpu"
        actor = ray.remote(
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            max_restarts=0,
            max_concurrency=2,
            concurrency_groups={"work": 1},  # `run` has a thread of its own, so that it never keeps the others waiting
            runtime_env={"env_vars": variables},
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index),
        )(WorkerProcess)
        return actor.remote()

    # --- running ------------------------------------------------------------------------------------------------------

    def _watch(self, runs: list[Any], stop: StopRequest, show: Show) -> StageResult:
        """Wait for all workers, showing events and passing on a request to stop."""
        ray = _import_ray()
        pending, asked = list(runs), False
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=_POLL_SECONDS)
            if any(_error_of(run) is not None for run in done):
                self._show_events(show)
                raise self._explain(runs)
            if stop.requested and not asked:
                asked = True
                for worker in self._actors:
                    worker.request_stop.remote()
            if stop.take_save_request():
                self._actors[0].request_save.remote()
            self._show_events(show)
        result: StageResult = ray.get(runs[0])
        return result

    def _show_events(self, show: Show) -> None:
        """Events of rank 0; a worker that is gone has none, and its loss is noticed elsewhere."""
        ray = _import_ray()
        if not self._actors:
            return
        try:
            events = ray.get(self._actors[0].take_events.remote(), timeout=10)
        except ray.exceptions.RayError:
            return
        for event in events:
            show(event)

    def _explain(self, runs: list[Any]) -> Exception:
        """The one error to raise for a group of which at least one worker has failed.

        A worker's own message says most; a dead worker makes the others fail with broken connections.
        """
        ray = _import_ray()
        ray.wait(runs, num_returns=len(runs), timeout=_LAST_WORDS_SECONDS)
        errors = {place.rank: error for place, run in zip(self._places, runs, strict=True) if (error := _error_of(run))}
        own = [error for error in errors.values() if isinstance(error, DinoScaleError)]
        if own:
            return own[0]
        self._keep_logs = True
        for rank, error in errors.items():
            if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.OutOfMemoryError):
                return WorkerLostError(
                    f"worker {rank} of {len(runs)} died ({_cause_of_death(error)}); the run can be resumed; "
                    f"Ray's logs: {self._logs()}"
                )
        rank, error = next(iter(errors.items()))
        return RuntimeError(f"worker {rank} failed; Ray's logs: {self._logs()}\n{error}")

    def _logs(self) -> str:
        return f"{self._session}/session_latest/logs" if self._session else "on the cluster's head, /tmp/ray"

    def _end(self) -> None:
        ray = _import_ray()
        for worker in self._actors:
            ray.kill(worker)
        self._actors = []
        ray.shutdown()
        if self._guardian is not None:
            self._guardian.dismiss()


def _new_session() -> Path:
    """A folder for Ray's logs and sockets; those that killed drivers left behind go when they are a day old."""
    for old in Path(_SESSIONS).glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError, ValueError):  # another user's, or another driver is removing it
            alive = Path(f"/proc/{int(old.read_text())}").exists()
            if not alive and time.time() - old.stat().st_mtime > _DAY_SECONDS:
                shutil.rmtree(old.parent, ignore_errors=True)
    session = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_SESSIONS))
    (session / _OWNER).write_text(str(os.getpid()))
    return session


def _import_ray() -> Any:
    """Late, because Ray reads its environment variables on import."""
    import ray
    import ray.exceptions
    import ray.util

    return ray


def _hosts_of(group: Any) -> list[tuple[str, str]]:
    """(address, node id) of every bundle of a placement group."""
    ray = _import_ray()
    nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return [(addresses[nodes[index]], nodes[index]) for index in sorted(nodes)]


def _seats(hosts: list[tuple[str, str]], first: Any) -> list[Place]:
    """Places in rank order. hosts: of each rank, equal ones side by side. first: the worker of rank 0."""
    ray = _import_ray()
    address = hosts[0][0]
    port = int(ray.get(first.free_port.remote(address), timeout=_START_SECONDS))
    return [
        Place(rank, len(hosts), hosts[:rank].count(host), hosts.count(host), address, port)
        for rank, host in enumerate(hosts)
    ]


def _error_of(run: Any) -> Exception | None:
    """The error a call ended with: the worker's own where it raised one; None if it succeeded or still runs."""
    ray = _import_ray()
    try:
        ray.get(run, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return None
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        return cause if isinstance(cause, DinoScaleError) else error
    except ray.exceptions.RayError as error:
        return error
    return None


def _cause_of_death(error: Exception) -> str:
    """Ray's text lists every conceivable cause; only its own memory monitor speaks of "low on memory"."""
    if "low on memory" in str(error):
        return "out of memory: lower batch.microbatch or the image sizes"
    return "killed, crashed, or its machine was lost"


def _described(resources: dict[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0):.0f} {name}" for name in ("CPU", "GPU") if resources.get(name))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
