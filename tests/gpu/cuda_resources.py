"""What the CUDA kernels use of a multiprocessor, by the logs of the build.

Run as a script it writes the table that test_cuda.py compares with: after a change of the kernels,
`make cuda TORCH_CUDA_ARCH_LIST=9.0 && .venv/bin/python tests/gpu/cuda_resources.py`.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LOGS = ROOT / "build" / "cuda"
TABLE = ROOT / "tests" / "gpu" / "cuda_resources_sm_90.txt"
_ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_90'\n"
    r".*?\n.*?stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers(?P<rest>.*)",
)


class Resources(NamedTuple):
    """Of one kernel: registers of a thread, bytes of static shared memory of a block and of spills."""

    kernel: str
    registers: int
    shared: int
    spills: int


def compiler() -> str:
    """The version of nvcc, which decides about registers."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return said.strip().splitlines()[-1]


def measured() -> list[Resources]:
    """What the logs say of the kernels for sm_90, by name."""
    found = []
    for log in sorted(LOGS.glob("*.log")):
        for entry in _ENTRY.finditer(log.read_text()):
            shared = re.search(r"(\d+) bytes smem", entry["rest"])
            spills = int(entry["stores"]) + int(entry["loads"])
            found.append((entry[1], int(entry["registers"]), int(shared[1]) if shared else 0, spills))
    names = subprocess.run(
        ["c++filt"], input="\n".join(name for name, *_ in found), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return sorted(Resources(short(name), *rest) for name, (_, *rest) in zip(names, found, strict=True))


def short(name: str) -> str:
    for noise in ("pooling_ext::", "cuda::", "(anonymous namespace)::", "void "):
        name = name.replace(noise, "")
    return name.partition("(")[0]


def lines(resources: list[Resources]) -> Iterator[str]:
    yield f"# {compiler()}; kernel, registers, bytes of static shared memory, bytes of spills"
    for kernel in resources:
        yield "\t".join(map(str, kernel))


def write(table: Path, lines: Iterable[str]) -> None:
    table.write_text("\n".join(lines) + "\n")


def assert_written(table: Path, lines: Iterable[str], script: str) -> None:
    """The table has these lines; skips where its first names another compiler."""
    import pytest

    wanted, now = table.read_text().splitlines(), list(lines)
    if wanted[0] != now[0]:
        pytest.skip("the table is another compiler's")
    assert now == wanted, f"run tests/gpu/{script} if this is meant"


if __name__ == "__main__":
    write(TABLE, lines(measured()))
