"""Starting Ray on this machine, or joining a cluster; the only module that imports ray.

With `launch.address: local` Ray is reachable from this machine only and ends with the driver. A cluster gets the code
of this program sent along, so its machines need the installed dependencies but no checkout of the same state.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dino_scale.config.schema import LaunchConfig
from dino_scale.errors import UserError
from dino_scale.training.control import MessageEvent
from launch.engine import Show
from launch.guardian import Guardian
from launch.ray_head import Head
from launch.security import authentication, require_closed

# Read by Ray on import. The first one, despite its name, keeps a cluster that Ray starts on loopback.
_LOCAL_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent home
    "RAY_DEDUP_LOGS": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a call that comes too late must not start another Ray
}
_SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit`, which sends its own working_dir

# /tmp, because the path of a socket in it must stay below 108 bytes
_SESSIONS, _PREFIX, _OWNER, _DAY_SECONDS = "/tmp", "dino-scale-ray-", "driver_pid", 86400.0
_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum is 75 MiB; only small messages pass through it
_ANSWER_SECONDS = 10.0  # for the head of a cluster to accept a connection
_PACKAGES = ("kernels", "dino_scale", "data_pipeline", "launch")


class RaySession:
    """A connection to Ray. Nothing happens before `open`."""

    def __init__(self, launch: LaunchConfig) -> None:
        self.launch = launch
        self.is_local = launch.address == "local"
        self.keep_logs = False
        self._folder: Path | None = None
        self._guardian: Guardian | None = None
        self._started = False

    @property
    def is_open(self) -> bool:
        return self._started

    def open(self, show: Show) -> None:
        """UserError where no cluster answers."""
        os.environ.update(environment(self.is_local, self.launch.insecure))
        ray = import_ray()
        place = "starting Ray on this machine" if self.is_local else f"joining Ray at {self.launch.address}"
        show(MessageEvent(place))
        if self.launch.address not in ("local", "auto"):
            _require_open_port(self.launch.address)
            if not self.launch.insecure:
                require_closed(self.launch.address)
        with self._local_options() if self.is_local else _shipped_code() as options:
            self._connect(ray, options)
        self._started = True
        if self.launch.address == "auto" and not self.launch.insecure:
            require_closed(ray.get_runtime_context().gcs_address)
        # Otherwise Ray prints the last 20 lines of a lost machine's log; there is no public call against that.
        ray._private.worker._worker_logs_enabled = False

    def _connect(self, ray: Any, options: dict[str, Any]) -> None:
        options |= {"logging_level": "CRITICAL", "log_to_driver": False}  # errors come as exceptions
        try:
            ray.init(address=self.launch.address, **options)
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"launch.address is '{self.launch.address}': no Ray cluster answers there ({_first_line(error)}); "
                "expected local, auto or host:port"
            ) from None
        except RuntimeError as error:  # what Ray raises where no process of the cluster runs beside the driver
            if self.is_local:
                raise
            raise UserError(
                f"launch.address is '{self.launch.address}': this machine is no node of that cluster "
                f"({_first_line(error)}); start the command on one of its nodes, or send it there by `ray job submit`"
            ) from None
        except ray.exceptions.AuthenticationError as error:
            raise UserError(
                f"the Ray cluster at {self.launch.address} refuses this machine's token ({_first_line(error)}): put "
                "the cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from None

    def guard(self) -> None:
        """Let nothing that runs now outlive a killed driver; a cluster sees to that itself."""
        if self.is_local:
            self._dismiss_guardian()
            self._guardian = Guardian()

    def head(self) -> Head:
        """The head of the cluster that was joined."""
        return Head(import_ray().get_runtime_context().gcs_address)

    def close(self, head_lost: bool = False) -> None:
        """head_lost: without the farewell to the cluster, for which Ray would wait until it ends this process."""
        if self._started:
            ray = import_ray()
            if head_lost:
                atexit.unregister(ray._private.worker.shutdown)
            else:
                ray.shutdown()
            self._started = False
        self._dismiss_guardian()
        if self._folder is not None and not self.keep_logs:
            shutil.rmtree(self._folder, ignore_errors=True)

    def logs(self) -> str:
        return f"{self._folder}/session_latest/logs" if self._folder else "on the cluster's machines, /tmp/ray"

    @contextlib.contextmanager
    def _local_options(self) -> Iterator[dict[str, Any]]:
        self._folder = _new_folder()
        workers, threads = self.launch.worker_range().max, self.launch.threads
        with _inherited({"OMP_NUM_THREADS": str(threads)} if threads else {}):
            yield {
                "num_cpus": max(os.cpu_count() or 1, workers * max(1, threads)),
                "include_dashboard": False,
                "_temp_dir": str(self._folder),
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_system_config": {
                    "gcs_rpc_server_reconnect_timeout_s": 10,  # orphans give up after 10 s, not 60
                    "worker_niceness": 0,  # training is what the user waits for; Ray would run it at 15
                },
            }

    def _dismiss_guardian(self) -> None:
        if self._guardian is not None:
            self._guardian.dismiss()
            self._guardian = None


def environment(local: bool, insecure: bool = False) -> dict[str, str]:
    """Variables to set before Ray is imported, because it reads them only then: loopback and tokens among them."""
    own = _LOCAL_ENVIRONMENT if local else {}
    return _ENVIRONMENT | own | authentication(os.environ, local, insecure)


def import_ray() -> Any:
    """Late, because Ray reads its environment variables on import."""
    import ray
    import ray._private.state
    import ray.exceptions
    import ray.util
    import ray.util.scheduling_strategies

    return ray


@contextlib.contextmanager
def _inherited(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes that are started meanwhile, not for this one."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _shipped_code() -> Iterator[dict[str, Any]]:
    """Options that send this program's packages along, as they are here; none for a job that was submitted with its own
    working_dir.

    As a working_dir, not as py_modules: beside those, Ray lets workers look first in the folder where the driver was
    started, which on another machine may be a checkout of another state. It holds the packages alone, not the data and
    runs that lie beside them in a checkout.
    """
    if _SUBMITTED_JOB in os.environ:
        yield {}
        return
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        for name in _PACKAGES:
            shutil.copytree(root / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        yield {"runtime_env": {"working_dir": folder}}


def _require_open_port(address: str) -> None:
    """Ray itself would try for minutes before it says that nobody listens there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"launch.address is '{address}': no Ray cluster answers there ({error}); expected local, auto or host:port"
        ) from None


def _new_folder() -> Path:
    """A folder for Ray's logs and sockets; those that killed drivers left behind go when they are a day old."""
    for old in Path(_SESSIONS).glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError, ValueError):  # another user's, or another driver is removing it
            alive = Path(f"/proc/{int(old.read_text())}").exists()
            if not alive and time.time() - old.stat().st_mtime > _DAY_SECONDS:
                shutil.rmtree(old.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_SESSIONS))
    (folder / _OWNER).write_text(str(os.getpid()))
    return folder


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
