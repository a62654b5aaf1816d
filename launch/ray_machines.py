"""The machines of a Ray cluster: which can be used, how many workers fit on them, which are about to go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dino_scale.config.schema import LaunchConfig
from launch.network import accepts_connections
from launch.ray_session import import_ray

_CONNECT_SECONDS = 1.5
_PROBES_AT_ONCE = 32


@dataclass(frozen=True)
class Machine:
    """A Ray node. port: of its raylet. free: resources that nobody uses."""

    node: str
    address: str
    port: int
    free: dict[str, float]

    def answers(self) -> bool:
        """Whether it can be reached. Ray itself notices a machine that is cut off only after its health checks."""
        return accepts_connections(self.address, self.port, _CONNECT_SECONDS)


class Machines:
    """needs: resources of one worker, decided once. A cluster with GPUs gives one to each worker."""

    def __init__(self, launch: LaunchConfig) -> None:
        self.needs: dict[str, float] = {"CPU": max(1, launch.threads)}
        if import_ray().cluster_resources().get("GPU", 0) >= 1:
            self.needs["GPU"] = 1
        self._given_notice: set[str] = set()

    def alive(self) -> list[Machine]:
        """Those that Ray believes alive."""
        ray = import_ray()
        free = ray._private.state.available_resources_per_node()  # no public call tells this per node
        return [
            Machine(node["NodeID"], node["NodeManagerAddress"], node["NodeManagerPort"], free.get(node["NodeID"], {}))
            for node in ray.nodes()
            if node["Alive"]
        ]

    def give_notice(self, node: str) -> None:
        """This machine is about to be taken away: place nothing on it any more."""
        self._given_notice.add(node)

    def leaving(self) -> set[str]:
        """Nodes that are about to be taken away, as a notice on them or Ray's own drain state says."""
        return self._given_notice | set(import_ray()._private.state.state.get_draining_nodes())

    def usable(self) -> tuple[list[Machine], set[str]]:
        """Machines to place workers on, and the nodes that must be avoided although Ray offers them."""
        alive, leaving = self.alive(), self.leaving()
        with ThreadPoolExecutor(_PROBES_AT_ONCE) as pool:
            answers = list(pool.map(Machine.answers, alive))
        usable = [machine for machine, ok in zip(alive, answers, strict=True) if ok and machine.node not in leaving]
        return usable, {machine.node for machine in alive} - {machine.node for machine in usable}

    def room(self, machines: Iterable[Machine], own: Counter[str]) -> int:
        """Workers that fit on `machines`. own: node -> workers of ours there, whose places count as free."""
        return sum(
            min(
                int((machine.free.get(name, 0.0) + own[machine.node] * amount) // amount)
                for name, amount in self.needs.items()
            )
            for machine in machines
        )

    def reserve(self, count: int, avoid: Collection[str]) -> Any:
        """A placement group for `count` workers, on as few machines as possible; it may still be waiting for them."""
        selector = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"} if avoid else {}
        return import_ray().util.placement_group(
            [self.needs] * count, strategy="PACK", bundle_label_selector=[selector] * count if avoid else None
        )


def described(resources: dict[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0):.0f} {name}" for name in ("CPU", "GPU") if resources.get(name)) or (
        "nothing"
    )
