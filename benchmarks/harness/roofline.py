"""What share of a copy's speed CUDA kernels can reach, by their machine code: a model to be refuted.

    python -m benchmarks.harness.roofline

A kernel is as slow as the slowest of three: its traffic at the speed of a copy, the instructions that its
warps issue, and loads that wait for memory with only so many bytes on their way. The figures of each kernel
are those of the table that test_cuda_machine_code.py keeps true (tests/gpu/cuda_machine_code_sm_90.txt).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).parents[2] / "tests" / "gpu" / "cuda_machine_code_sm_90.txt"


#: Kernel, stride and padding of a square window.
_WINDOW = re.compile(r"Square<(\d+), (\d+), \d+>")


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        copy: bytes in a second that a copy reads and writes, together.
        clock: cycles in a second.
        latency: seconds from a load to its value while memory is busy.
        issued: instructions of warps that a multiprocessor issues in a cycle.
    """

    name: str
    multiprocessors: int
    copy: float
    clock: float
    latency: float
    registers: int = 65536
    threads: int = 2048
    issued: int = 4


#: Its copy was measured; the latency is that at which 24 KB a multiprocessor sustain it.
H200 = Card("H200", 132, 4.3e12, 1.755e9, 737e-9)


@dataclass(frozen=True)
class Kernel:
    """A line of the table.

    Attributes:
        spills: bytes that ptxas says are kept in memory for want of registers.
        instructions: issued by a warp on its way once round the kernel's loop, as most threads take it.
        loads, stores: how many of how many bytes there are on that way, by their bytes.
        in_flight: bytes that a thread has asked for before it waits for the first of them.
    """

    name: str
    registers: int
    spills: int
    instructions: int
    loads: dict[int, int]
    stores: dict[int, int]
    in_flight: int

    @property
    def asked(self) -> int:
        return sum(width * n for width, n in self.loads.items())

    @property
    def written(self) -> int:
        return sum(width * n for width, n in self.stores.items())

    @property
    def traffic(self) -> float:
        """Bytes between memory and the multiprocessor; what windows share is read once."""
        window = _WINDOW.search(self.name)
        if window is None:
            return self.asked + self.written
        inputs_of_an_output = int(window[2]) ** 2
        if self.name.startswith("pool_"):
            return self.written * (1 + inputs_of_an_output)
        if self.name.startswith("gather_"):
            return self.written * (1 + 1 / inputs_of_an_output)
        if self.name.startswith("max_pool_rows"):
            # The stem writes the winners' elements in training, as large as the output.
            outputs = self.stores[16] / (
                2 if self.name.endswith("true>") and "Normalized" in self.name else 1
            )
            return self.written + outputs * 16 * inputs_of_an_output
        element = 2 if "__nv_bfloat16" in self.name else 4
        # The stem reads its input, of the gradient's size.
        input = 1 if "ToWinnerThroughNorm" in self.name else 0
        return self.written * (1 + input + (1 + 1 / element) / inputs_of_an_output)

    @property
    def rounds(self) -> float:
        """How often the way is gone for what is written once.

        An average's gradient is gathered in loops over the windows that cover an element, or over their rows:
        on average as many as the kernel's size over its stride. The way has each load of the code once.
        """
        window = _WINDOW.search(self.name)
        if window is None or not self.name.startswith("gather_"):
            return 1.0
        axes = 2 if self.name.startswith("gather_pixels") else 1
        return (int(window[1]) / int(window[2])) ** axes / self.loads[16]

    def threads(self, card: Card) -> int:
        """Resident on a multiprocessor, in blocks of 256."""
        return min(card.registers // (256 * (-(-self.registers // 8) * 8)) * 256, card.threads)


def line(kernel: Kernel) -> str:
    """As :func:`kernels` reads it."""
    loads, stores = (
        " ".join(f"{n}x{width}" for width, n in sorted(accesses.items(), reverse=True))
        for accesses in (kernel.loads, kernel.stores)
    )
    numbers = (kernel.registers, kernel.spills, kernel.instructions, loads, stores, kernel.in_flight)
    return "\t".join(map(str, (kernel.name, *numbers)))


def kernels(table: Path = TABLE) -> Iterator[Kernel]:
    def widths(column: str) -> dict[int, int]:
        pairs = (access.split("x") for access in column.split())
        return {int(width): int(n) for n, width in pairs}

    for line in table.read_text().splitlines():
        if line.startswith("#"):
            continue
        name, registers, spills, instructions, loads, stores, in_flight = line.split("\t")
        numbers = (int(registers), int(spills), int(instructions))
        yield Kernel(name, *numbers, widths(loads), widths(stores), int(in_flight))


def seconds(kernel: Kernel, card: Card = H200) -> dict[str, float]:
    """Of one thread's way on one multiprocessor that is full of such threads, by what would limit it."""
    threads = kernel.threads(card)
    waits = kernel.rounds * kernel.asked / kernel.in_flight if kernel.in_flight else 0.0
    return {
        "traffic": kernel.traffic / (card.copy / card.multiprocessors),
        "issue": kernel.rounds * kernel.instructions / 32 / (card.issued * card.clock),
        "latency": waits * card.latency / threads,
    }


def share(kernel: Kernel, card: Card = H200) -> float:
    """The share of a copy's speed, at most 1."""
    limits = seconds(kernel, card)
    return limits["traffic"] / max(limits.values())


#: The kernels of each kind, by their names.
KINDS = {
    "max pooling, forward": "max_pool_rows<AsTheyAre<",
    "max pooling, backward": "max_pool_cells<ToWinner<",
    "average pooling, forward": "pool_(pixels|runs)<",
    "average pooling, backward": "gather_(pixels|runs)<",
    "whole planes: max, Lp and average": "pool_whole_",
    "global average, tail": "plane_means<|spread_means<",
    "stem, forward": "max_pool_rows<Normalized<",
    "stem, backward": "max_pool_cells<ToWinnerThroughNorm<",
    "batch norm": "normalize<|stats_parts<|sums_parts<|spread_gradient<",
}


def summary() -> Iterator[str]:
    """Rows of the table in docs/gpu.md: the least and the most of the kernels of each kind."""
    for kind, names in KINDS.items():
        cells = [kind]
        for dtype in ("float", "__nv_bfloat16"):
            shares = [share(k) for k in kernels() if re.match(names, k.name) and f"<{dtype}" in k.name]
            cells.append(" to ".join(dict.fromkeys(f"{one:.0%}" for one in (min(shares), max(shares)))))
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    print(
        f"{H200.name}: share of a copy; issuing, and waiting for loads, as parts of the time for the traffic"
    )
    for kernel in kernels():
        limits = seconds(kernel)
        parts = (f"{limits[name] / limits['traffic']:5.0%}" for name in ("issue", "latency"))
        print(f"{share(kernel):5.0%}  {'  '.join(parts)}  {kernel.name}")
    print(*summary(), sep="\n")


if __name__ == "__main__":
    main()
