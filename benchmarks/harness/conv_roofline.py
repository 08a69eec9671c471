"""What share of the matrix rate CUDA's convolutions can reach, by their machine code: a model to be refuted.

    python -m benchmarks.harness.conv_roofline

One step of a block's tile takes as long as the slowest of four: its products, the instructions that its warps
issue, what they write to and read from shared memory, and what comes from the L2 cache. The figures of each
kernel are those of the table that test_cuda_machine_code.py keeps true
(tests/gpu/cuda_machine_code_conv_sm_80.txt); the convolutions are for compute capability 8.0 to 8.9.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).parents[2] / "tests" / "gpu" / "cuda_machine_code_conv_sm_80.txt"

#: Multiplications and additions of a warp's instruction: m16n8k16 on tensor cores, and one for each thread.
PRODUCTS = {"HMMA": 16 * 8 * 16, "FFMA": 32}


@dataclass(frozen=True)
class Multiprocessor:
    """What one does in a cycle.

    Attributes:
        products: multiplications with additions, by instruction.
        issued: instructions of warps.
        shared: bytes of shared memory that are read or written.
        fetched: bytes from the L2 cache, where all multiprocessors ask for as many.
    """

    name: str
    products: dict[str, int]
    issued: int
    shared: int
    fetched: float


#: "NVIDIA A100 Tensor Core GPU Architecture" (2020): 5120 bytes in a cycle for 108 multiprocessors.
A100 = Multiprocessor("A100", {"HMMA": 1024, "FFMA": 64}, 4, 128, 5120 / 108)


@dataclass(frozen=True)
class ConvKernel:
    """A line of the table.

    Attributes:
        spills: bytes that ptxas says are kept in memory for want of registers.
        product: the instruction that multiplies.
        instructions: issued by a warp on its way once round the innermost loop that multiplies, of which
        products: so many are that instruction.
        shared: bytes that a thread reads from shared memory on that way.
        copied: bytes that a thread copies to shared memory, 0 where that is outside the loop.
    """

    name: str
    registers: int
    spills: int
    product: str
    instructions: int
    products: int
    shared: int
    copied: int


def line(kernel: ConvKernel) -> str:
    """As :func:`kernels` reads it."""
    return "\t".join(str(getattr(kernel, name)) for name in ConvKernel.__dataclass_fields__)


def kernels(table: Path = TABLE) -> Iterator[ConvKernel]:
    for line in table.read_text().splitlines():
        if not line.startswith("#"):
            name, registers, spills, product, *numbers = line.split("\t")
            yield ConvKernel(name, int(registers), int(spills), product, *map(int, numbers))


def cycles(kernel: ConvKernel, on: Multiprocessor = A100) -> dict[str, float]:
    """Of a warp's way on a multiprocessor that is full of such warps, by what would limit it."""
    return {
        "products": kernel.products * PRODUCTS[kernel.product] / on.products[kernel.product],
        "issue": kernel.instructions / on.issued,
        "shared": 32 * (kernel.shared + kernel.copied) / on.shared,
        "fetch": 32 * kernel.copied / on.fetched,
    }


def share(kernel: ConvKernel, on: Multiprocessor = A100) -> float:
    """The share of the rate of products, at most 1."""
    limits = cycles(kernel, on)
    return limits["products"] / max(limits.values())


def summary() -> Iterator[str]:
    """Rows of the table in docs/gpu.md."""
    for kernel in kernels():
        dtype, tile, _ = re.findall(r"[^<>, ]+", kernel.name.partition("<")[2])
        limits = cycles(kernel)
        slowest = max(limits, key=lambda name: limits[name])
        dtype = {"float": "float32", "__nv_bfloat16": "bfloat16"}[dtype]
        yield f"| {dtype}, tile {tile} | {share(kernel):.0%} | {slowest} |"


def main() -> None:
    print(
        f"{A100.name}: share of the rate of products; issuing, shared memory and the L2 cache as parts of it"
    )
    for kernel in kernels():
        limits = cycles(kernel)
        parts = (f"{limits[name] / limits['products']:5.0%}" for name in ("issue", "shared", "fetch"))
        print(f"{share(kernel):5.0%}  {'  '.join(parts)}  {kernel.name}")
    print(*summary(), sep="\n")


if __name__ == "__main__":
    main()
