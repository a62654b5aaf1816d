"""Where workers go: waiting for machines with enough room, reserving it, starting one actor per worker on it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dino_scale.config.schema import LaunchConfig
from dino_scale.errors import UserError, WorkerLostError
from dino_scale.training.control import MessageEvent
from launch.elastic import largest_fitting
from launch.engine import Show
from launch.ray_failures import Lost, in_a_line
from launch.ray_machines import Machine, Machines, described
from launch.ray_session import import_ray
from launch.worker_process import Place, WorkerProcess

_LOOK_SECONDS = 0.5
_RELEASE_SECONDS = 20.0  # until the processes of an ended generation have let go of what they held
_ASK_SECONDS = 10.0  # for machines that are not there, before the cluster is looked at anew
_START_SECONDS = 180.0
_LEASE_SECONDS = 60.0

_Stopped = Callable[[], bool]


@dataclass(frozen=True)
class Worker:
    """A running actor in its place. kills: out-of-memory kills on its machine before it began."""

    actor: Any
    machine: Machine
    place: Place
    pid: int
    kills: int

    @property
    def name(self) -> str:
        return f"worker {self.place.rank} on {self.machine.address}"


class Placement:
    """Finds room for workers, as a cluster has it now."""

    def __init__(self, launch: LaunchConfig, machines: Machines, stopped: _Stopped, show: Show) -> None:
        """stopped: whether the user has asked to stop, which ends every wait."""
        self._launch, self._machines, self._stopped, self._show = launch, machines, stopped, show
        self._patience = 60.0 * launch.patience_minutes

    def reserve(self, counts: list[int], own: Counter[str]) -> Any | None:
        """A placement group for as many workers of `counts` (descending) as there is room for; None when stopped.

        own: node -> workers of a generation that has just ended, whose places are about to become free. Waits while
        there is no room even for the smallest number, and asks the cluster for it meanwhile, so that an autoscaler
        sees the demand. WorkerLostError when that takes longer than launch.patience_minutes.
        """
        deadline, told = time.monotonic() + self._patience, False
        while not self._stopped():
            usable, avoid = self._machines.usable()
            room = self._machines.room(usable, own)
            count = largest_fitting(counts, room)
            if count is None and not told:
                self._refuse_or_tell(counts, room)
                told = True
            group = self._machines.reserve(count or counts[-1], avoid)
            if self._is_placed(group, _RELEASE_SECONDS if count else _ASK_SECONDS):
                return group
            import_ray().util.remove_placement_group(group)
            own = Counter()  # whatever has not become free by now is somebody else's
            if time.monotonic() > deadline:
                raise WorkerLostError(
                    f"there was no room for {self._wanted(counts)} for {self._launch.patience_minutes:g} min "
                    "(launch.patience_minutes)"
                )
        return None

    def _is_placed(self, group: Any, seconds: float) -> bool:
        """Whether the group gets its resources in that time, and nobody asks to stop meanwhile."""
        deadline = time.monotonic() + seconds
        while not group.wait(_LOOK_SECONDS):
            if self._stopped() or time.monotonic() > deadline:
                return False
        return True

    def start(self, group: Any) -> list[Worker] | None:
        """Workers in rank order on a reserved group; None when stopped meanwhile. Raises Lost."""
        ray = import_ray()
        homes = self._homes(group)
        order = sorted(homes, key=lambda bundle: (homes[bundle].address, homes[bundle].node, bundle))
        actors = [self._start_actor(group, bundle, homes[bundle].address) for bundle in order]
        started = self._answers([actor.prepare.remote() for actor in actors])
        if started is None:
            return None
        nodes = [homes[bundle].node for bundle in order]
        address = homes[order[0]].address
        try:
            port = int(ray.get(actors[0].free_port.remote(address), timeout=_START_SECONDS))
        except ray.exceptions.RayError as error:
            raise Lost(f"worker 0 on {address} was lost while it started ({type(error).__name__})") from None
        return [
            Worker(
                actor,
                homes[bundle],
                Place(rank, len(order), nodes[:rank].count(nodes[rank]), nodes.count(nodes[rank]), address, port),
                *started[rank],
            )
            for rank, (bundle, actor) in enumerate(zip(order, actors, strict=True))
        ]

    def _homes(self, group: Any) -> dict[int, Machine]:
        """The machine of every bundle."""
        known = {machine.node: machine for machine in self._machines.alive()}
        bundles = import_ray().util.placement_group_table(group)["bundles_to_node_id"]
        gone = sorted(node[:8] for node in bundles.values() if node not in known)
        if gone:
            raise Lost(f"machine {gone[0]} was lost before its workers started")
        return {bundle: known[node] for bundle, node in bundles.items()}

    def _start_actor(self, group: Any, bundle: int, address: str) -> Any:
        ray = import_ray()
        needs, launch = self._machines.needs, self._launch
        # On this machine alone the session has said it, and Ray can take processes that it has started beforehand.
        told = launch.threads == 0 or launch.address == "local"
        own = {} if told else {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(launch.threads)}}}
        actor = ray.remote(
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            max_restarts=0,
            max_concurrency=2,
            concurrency_groups={"work": 1},  # `run` has a thread of its own, so that it never keeps the others waiting
            scheduling_strategy=ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=bundle
            ),
            **own,
        )(WorkerProcess)
        return actor.remote(address, launch.notice_file, 0.0 if launch.address == "local" else _LEASE_SECONDS)

    def _answers(self, calls: list[Any]) -> list[Any] | None:
        """What `calls` return; None when stopped. Lost when one fails, or all together take too long."""
        ray = import_ray()
        deadline, pending = time.monotonic() + _START_SECONDS, list(calls)
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=_LOOK_SECONDS)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                raise Lost(f"a worker could not be started ({in_a_line(error)})") from None
            if self._stopped():
                return None
            if pending and time.monotonic() > deadline:
                raise Lost(f"{len(pending)} of {len(calls)} worker(s) did not start within {_START_SECONDS:.0f} s")
        return list(ray.get(calls))

    def _refuse_or_tell(self, counts: list[int], room: int) -> None:
        each = f"each needs {described(self._machines.needs)}"
        if self._launch.address == "local":
            raise UserError(
                f"launch.workers asks for {self._wanted(counts)}, {each}: this machine has room for {room}; ask for "
                "fewer workers (--set launch.workers=N)"
            )
        text = f"waiting for machines: there is room for {room} worker(s), {self._wanted(counts)} are wanted, {each}"
        self._show(MessageEvent(text))

    def _wanted(self, counts: list[int]) -> str:
        return f"{counts[0]} workers" if len(counts) == 1 else f"{counts[-1]} to {counts[0]} workers"
