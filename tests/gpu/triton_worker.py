"""Compiles the Triton kernels for GPUs that are not here; prints what came out as JSON.

Runs in a process of its own: where TRITON_INTERPRET is set, there are no kernels to compile. As many
processes as there are cores take one launch after another.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from pooling_ext.testing.launches import ACTIVATION_CASES, CASES, CONVOLUTIONS, PHASES, recorded_on_meta
from pooling_ext.triton.conv.conv_configs import AMD_STAGES
from pooling_ext.triton.launching import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BATCH = 256
#: Of the shapes of batch norm those that differ in how they can be walked; compiling takes long.
SKIPPED = ("bn-relu-64-56", "bn-relu-128-28", "bn-relu-512-7", "bn-add-relu-512-28", "bn-add-relu-1024-14")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


class Elsewhere:
    """Stands for a GPU's driver where Triton asks what to compile for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend} {self.target.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0


def compile_for(target: GPUTarget, launch: Launch) -> dict[str, Any]:
    """What the compiler made of ``launch``: registers, spills, shared memory, the widest global accesses."""
    triton.runtime.driver.set_active(Elsewhere(target))  # pyright: ignore
    # Launches were recorded for warps of 32 threads; a program has as many threads everywhere.
    warps = max(launch.options["num_warps"] * 32 // target.warp_size, 1)
    options = launch.options | {"num_warps": warps}
    if target.backend == "hip":
        options["num_stages"] = min(options["num_stages"], AMD_STAGES)
    compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **options)
    facts = {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    return facts | (_cuda_facts(compiled, target) if target.backend == "cuda" else _amd_facts(compiled))


def _cuda_facts(compiled: Any, target: GPUTarget) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "spills": _spilled(ptx, target, tools) if numbers["STACK"] + numbers["LOCAL"] else 0,
        "load_bytes": max(_widths(ptx, "ld.global"), default=0),
        "store_bytes": max(_widths(ptx, "st.global"), default=0),
        "copy_bytes": max((int(size, 16) for size in re.findall(_ASYNC_COPY, ptx)), default=0),
        "matrix": sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx))),
    }


def _spilled(ptx: str, target: GPUTarget, tools: Path) -> int:
    """The bytes of spills, which are but a part of what lies on the stack."""
    assembler = tools / ("ptxas-blackwell" if target.arch >= 100 else "ptxas")
    architecture = re.search(r"\.target (\w+)", ptx)
    assert architecture
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", f"--gpu-name={architecture[1]}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(size) for size in re.findall(r"(\d+) bytes spill", said))


_ASYNC_COPY = r"cp\.async\.c[ag]\.shared\.global[^;]*?\], 0x([0-9a-f]+)"


def _widths(ptx: str, access: str) -> list[int]:
    """The bytes that each access of a kind moves: ``ld.global.v4.b32`` moves 16."""
    found = re.findall(rf"{re.escape(access)}[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    return [int(vector or 1) * int(width) // 8 for vector, width in found]


def _amd_facts(compiled: Any) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", code)
        assert found, name
        return int(found[1])

    widths = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "byte": 1, "dword": 4}
    widths |= {f"dwordx{n}": 4 * n for n in (2, 3, 4)}

    def widest(kind: str) -> int:
        return max(
            (widths.get(w, 0) for w in re.findall(rf"(?:global|buffer)_{kind}_([a-z0-9]+)", code)), default=0
        )

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "load_bytes": widest("load"),
        "store_bytes": widest("store"),
        "matrix": sorted(set(re.findall(r"\bv_mfma\w*", code))),
    }


def launches() -> list[tuple[str, str, Launch]]:
    """Every launch of the cases, each named after the first call that makes it."""
    found: dict[str, tuple[str, str, Launch]] = {}
    with recorded_on_meta() as recorded:
        for case in CASES + ACTIVATION_CASES:
            if case.name in SKIPPED:
                continue
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    tensors = case.tensors(BATCH, DTYPES[dtype], LAYOUTS[layout], "meta")
                    for phase in PHASES:
                        call = case.run(phase, tensors)
                        recorded.clear()
                        call()
                        for launch in recorded:
                            found.setdefault(_key(launch), (f"{case} {dtype} {layout}", phase, launch))
        for case in CONVOLUTIONS:
            for dtype in DTYPES:
                recorded.clear()
                case.run(BATCH, DTYPES[dtype], "meta")
                for launch in recorded:
                    found.setdefault(_key(launch), (f"{case} {dtype} NHWC", "fused", launch))
    return list(found.values())


def _key(launch: Launch) -> str:
    """The same for launches of which one compilation serves all: Triton looks at no more of the arguments."""
    arguments = {}
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = str(value.dtype)
        elif type(value) is int and name not in launch.constants:
            arguments[name] = f"{value == 1} {value % 16 == 0} {value >= 2**31}"
        else:
            arguments[name] = repr(value)
    return f"{launch.kernel.__name__} {arguments} {launch.options}"


#: What there is to compile, and for what: forked processes share it, since launches cannot be sent to them.
_launches: list[tuple[str, str, Launch]] = []
_target = TARGETS["sm_90"]


def facts_of(index: int) -> dict[str, Any]:
    case, phase, launch = _launches[index]
    facts = {"case": case, "phase": phase, "kernel": launch.kernel.__name__}
    try:
        return facts | compile_for(_target, launch)
    except Exception as error:  # the others are of interest too
        return facts | {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    global _launches, _target
    _target = TARGETS[sys.argv[1]]
    _launches = launches()
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        for facts in pool.imap(facts_of, range(len(_launches))):
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
