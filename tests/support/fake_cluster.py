"""Several Ray nodes on this machine: each with its own raylet and resources, all at the address 127.0.0.1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from launch.security import authentication

_OBJECT_STORE_BYTES = 80 * 2**20
_QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


class FakeCluster:
    """A head without CPUs, and nodes with one CPU each that come and go."""

    def __init__(self) -> None:
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
        os.environ.update(authentication(os.environ, local=True, insecure=False))
        from ray.cluster_utils import Cluster

        head = self._options(0) | {"include_dashboard": False, "_system_config": _QUICK_HEALTH_CHECKS}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, **environment: str) -> None:
        """environment: variables of the node and its workers, beside those of this process."""
        self.nodes.append(self._cluster.add_node(**self._options(1), env_vars=environment))

    def kill(self) -> None:
        """The newest node, without a word of warning to the others."""
        node = self.nodes.pop()
        node.kill_raylet(check_alive=False)
        self._cluster.remove_node(node, allow_graceful=False)

    def set_size(self, nodes: int) -> None:
        while len(self.nodes) > nodes:
            self.kill()
        while len(self.nodes) < nodes:
            self.add()

    def shut_down(self) -> None:
        self._cluster.shutdown()

    @staticmethod
    def _options(cpus: int) -> dict[str, Any]:
        return {"num_cpus": cpus, "object_store_memory": _OBJECT_STORE_BYTES}


@contextmanager
def fake_cluster(nodes: int) -> Iterator[FakeCluster]:
    cluster = FakeCluster()
    try:
        cluster.set_size(nodes)
        yield cluster
    finally:
        cluster.shut_down()
