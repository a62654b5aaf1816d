"""How often the kernel has killed a process for want of memory, where this can be read. Linux; light to import."""

from __future__ import annotations

import contextlib
from pathlib import Path


def out_of_memory_kills(root: Path = Path("/")) -> int:
    """Kills so far in this process's control group if it can be told, else on the whole machine; 0 if neither can.

    The group is the better witness: in a container the machine's count includes what happens in other containers.
    """
    for path in (root / "sys/fs/cgroup/memory.events", root / "proc/vmstat"):
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text(encoding="ascii").splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0
