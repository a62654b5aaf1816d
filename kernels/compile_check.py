"""Compiles a Triton kernel for a GPU that need not be here, and reads off what the compiler made of it.

Two things decide whether the kernels of this package are fast, and both can be seen without running them: that no
register is spilled to memory, and that gradients are added by wide atomics.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WARP = 32
ALIGNMENT = 16


@dataclass(frozen=True)
class Compiled:
    """What came out for one target.

    registers per thread; stack_bytes per thread: anything above 0 is a spill, as no kernel here has local arrays.
    barriers: `bar.sync` in the PTX. atomics: how often each atomic instruction is in the PTX.
    instructions: how often each machine instruction is in the cubin; RED... is an atomic whose result nobody waits for,
    ATOM... one that returns it (PTX does not tell them apart).
    """

    registers: int
    stack_bytes: int
    barriers: int
    atomics: Mapping[str, int]
    instructions: Mapping[str, int]


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    capability: int,
    warps: int,
    registers: int | None = None,
) -> Compiled:
    """Compile for compute capability 80, 90, 100, ...

    types: Triton type of every argument that is not a constant, such as "*bf16", "i32"; pointers are taken to be
    aligned to 16 bytes, as those of torch are. registers: limit per thread, None: the compiler's choice. Raises what
    the compiler raises.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", ALIGNMENT]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    options = {"num_warps": warps, "maxnreg": registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    atomics = Counter(re.findall(r"\b(?:red|atom)\.[\w.:]+", ptx))
    return Compiled(
        registers, stack, len(re.findall(r"\bbar\.sync", ptx)), atomics, _instructions(compiled.asm["cubin"])
    )


def _instructions(cubin: bytes) -> Counter[str]:
    listing = _tool("cuobjdump", "--dump-sass", cubin)
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (with local memory) per thread."""
    report = _tool("cuobjdump", "--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"compile_check: cuobjdump reports no resources of the kernel: {report.strip()!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(triton.knobs.nvidia, name).path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
