"""Hosts on one machine: Linux namespaces with their own network, processes, /dev/shm and folder for Ray. Needs root.

Killing the first process of a host ends everything on it; taking its link down cuts it off while it runs on.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

_SETUP = """
mount --make-rprivate / && mount -t proc proc /proc && mount -t tmpfs tmpfs {folder} &&
mount -t tmpfs -o size=512m tmpfs /dev/shm && hostname {name} && exec sleep infinity
"""


def why_not() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    name = f"dsprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    veth = subprocess.run(
        ["ip", "-n", name, "link", "add", "dsp0", "type", "veth", "peer", "name", "dsp1"],
        capture_output=True,
        text=True,
    )
    _run("ip", "netns", "del", name)
    return f"no virtual links here: {veth.stderr.strip()}" if veth.returncode else None


class Host:
    """address: on the network that all hosts share."""

    def __init__(self, network: Network, number: int) -> None:
        self.address = f"{network.prefix}.{10 + number}"
        self.name = f"{network.name}h{number}"
        self._link, self._network = f"{network.name}v{number}", network
        _run("ip", "netns", "add", self.name)
        _run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _run("ip", "link", "set", self._link, "master", network.name, "up")
        _run("ip", "-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _run("ip", "-n", self.name, "link", "set", "eth0", "up")
        _run("ip", "-n", self.name, "link", "set", "lo", "up")
        self._boot()

    def _boot(self) -> None:
        setup = _SETUP.format(folder=self._network.ray_folder, name=self.name)
        command = ["ip", "netns", "exec", self.name, "unshare", "-m", "-u", "-p", "--fork", "--kill-child", "sh", "-c"]
        self._outer = subprocess.Popen([*command, setup], start_new_session=True, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while (first := self._first_process()) is None:
            assert time.monotonic() < deadline and self._outer.poll() is None, f"host {self.name} does not start"
            time.sleep(0.02)
        self._first = first

    def _first_process(self) -> int | None:
        """The process that the host's life hangs on, once its file systems are mounted."""
        for child in psutil.Process(self._outer.pid).children(recursive=True):
            if child.name() == "sleep":
                return child.pid
        return None

    def popen(self, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Start a command on the host."""
        enter = ["nsenter", "-t", str(self._first), "-m", "-u", "-n", "-p"]
        environment = os.environ | self._network.environment
        return subprocess.Popen([*enter, *command], text=True, env=environment, **options)  # type: ignore[call-overload]

    def run(self, *command: str) -> str:
        process = self.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, f"{self.name}: {' '.join(command)}\n{out}"
        return str(out)

    def kill(self) -> None:
        """Power off: every process is gone at once. Nothing happens to a host that is off already."""
        if self._outer.poll() is None:
            os.kill(self._first, signal.SIGKILL)
        self._outer.wait(30)

    def restart(self) -> None:
        self._boot()

    def cut_off(self) -> None:
        _run("ip", "link", "set", self._link, "down")

    def reconnect(self) -> None:
        _run("ip", "link", "set", self._link, "up")

    def processes(self, word: str) -> list[psutil.Process]:
        """Processes of the host, seen from outside, with `word` in their command line."""
        space = os.readlink(f"/proc/{self._first}/ns/pid")
        found = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            try:
                inside = os.readlink(f"/proc/{process.pid}/ns/pid") == space
            except OSError:
                continue
            if inside and word in " ".join(process.info["cmdline"] or ()):
                found.append(process)
        return found

    def remove(self) -> None:
        self.kill()
        _run("ip", "netns", "del", self.name)


class Network:
    """A bridge and the hosts on it."""

    def __init__(self) -> None:
        self.name = f"ds{os.getpid() % 100000}"
        self.prefix = f"10.{200 + os.getpid() % 50}.{os.getpid() % 250}"
        self.ray_folder = tempfile.mkdtemp(prefix="dsr-", dir="/tmp")  # short: sockets lie in it
        self.environment: dict[str, str] = {}
        self.hosts: list[Host] = []
        _run("ip", "link", "add", self.name, "type", "bridge")
        _run("ip", "addr", "add", f"{self.prefix}.1/24", "dev", self.name)
        _run("ip", "link", "set", self.name, "up")

    def add(self) -> Host:
        self.hosts.append(Host(self, len(self.hosts)))
        return self.hosts[-1]

    def remove(self) -> None:
        for host in self.hosts:
            host.remove()
        _run("ip", "link", "del", self.name)
        Path(self.ray_folder).rmdir()


class RayHosts:
    """A Ray head without CPUs on host 0, a node with one CPU on every further host; health checks every second."""

    _CHECKS = ("initial_delay_ms", "period_ms", "timeout_ms")

    def __init__(self, network: Network, workers: int) -> None:
        self.network, self.head = network, network.add()
        network.environment |= {f"RAY_health_check_{check}": "1000" for check in self._CHECKS}
        network.environment |= {
            "RAY_health_check_failure_threshold": "3",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # not the loopback of the other tests (tests/launch/conftest.py)
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
        }
        self.address = f"{self.head.address}:6379"
        self.workers = [network.add() for _ in range(workers)]
        self._start_all()

    def lose_everything(self) -> None:
        """A power failure of all hosts, the head included; they come back with nothing but their disks."""
        for host in (self.head, *self.workers):
            host.kill()
        for host in (self.head, *self.workers):
            host.restart()
        self._start_all()

    def _start_all(self) -> None:
        folder = f"--temp-dir={self.network.ray_folder}"
        self._start(self.head, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false", folder)
        for host in self.workers:
            self.join(host)

    def join(self, host: Host) -> None:
        self._start(host, f"--address={self.address}", "--num-cpus=1")

    def _start(self, host: Host, *options: str) -> None:
        common = (f"--node-ip-address={host.address}", "--object-store-memory=83886080")
        host.run(str(Path(sys.executable).with_name("ray")), "start", *common, *options)


@contextmanager
def ray_hosts(workers: int) -> Iterator[RayHosts]:
    network = Network()
    try:
        yield RayHosts(network, workers)
    finally:
        network.remove()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
