"""What the machine code of CUDA kernels does on its way round its loop: for sm_90, of convolutions for sm_80.

Run as a script (``python tests/gpu/cuda_machine_code.py``) it writes the tables that
test_cuda_machine_code.py compares with. Of max pooling and convolutions, files in cuda_machine_code name the
kernels that matter.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from cuda_resources import ROOT, compiler, short, write

sys.path.insert(0, str(ROOT))  # run as a script
from benchmarks.harness import conv_roofline
from benchmarks.harness.conv_roofline import ConvKernel
from benchmarks.harness.roofline import TABLE, Kernel, line

NAMED = ROOT / "tests" / "gpu" / "cuda_machine_code"
KERNELS = ROOT / "csrc" / "kernels" / "cuda"
#: Where there are kernels, and which of those count: windows that CNNs use, and whole planes.
SOURCES = {
    NAMED / "max_pool.cu": "",
    KERNELS / "norm" / "batch_norm_relu_max_pool.cu": "Square<3, 2, 1>",
    KERNELS / "norm" / "batch_norm_relu_max_pool_backward.cu": "Square<3, 2, 1>",
    KERNELS / "norm" / "batch_norm_forward.cu": "",
    KERNELS / "norm" / "batch_norm_backward.cu": "",
    KERNELS / "norm" / "add_relu_global_avg_pool.cu": "",
    KERNELS / "pool" / "avg_pool.cu": "Square|pool_whole.*, int, ",
    KERNELS / "pool" / "max_pool.cu": "pool_whole.*(float|bfloat16).*, int, ",
    KERNELS / "pool" / "lp_pool.cu": "pool_whole.*, int, ",
}
FLAGS = ["-std=c++20", "-O3", "-diag-suppress=177", "-cubin", "-Xptxas=-v"]
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\*")
_BRANCH = re.compile(r"(@!?U?P\d\s+)?BRA(?:\.\w+)*\s+(?:!?U?P\w+, )?(?:`\()?0x([0-9a-f]+)")
_ACCESS = re.compile(r"(?:@!?U?P\d\s+)?(LDG|STG)\.E(\S*)")
_WIDTHS = {".128": 16, ".64": 8, ".U16": 2, ".U8": 1, ".S8": 1, ".S16": 2}


def disassembler() -> str | None:
    """A cuobjdump: the toolkit's, or that of a package which brings its own."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    for package, inside in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin")):
        spec = find_spec(package)
        if spec is not None:
            folders += [Path(folder) / inside for folder in spec.submodule_search_locations or ()]
    found = [shutil.which("cuobjdump"), *(shutil.which("cuobjdump", path=str(f)) for f in folders)]
    return next((path for path in found if path), None)


def includes() -> list[str]:
    """Headers that a small toolkit lacks, from PyTorch's packages."""
    nvcc = Path(shutil.which("nvcc") or "nvcc").resolve()
    said = subprocess.run(
        [str(nvcc), "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True
    )
    tops = re.findall(r"^#\$ TOP=(.*)$", said.stderr, re.MULTILINE)
    top = Path(tops[0].strip()) if tops else nvcc.parents[1]
    if any((top / folder / "cuda_bf16.h").exists() for folder in ("include", "targets/x86_64-linux/include")):
        return []
    spec = find_spec("nvidia")
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    return [f"-I{path.parent}" for folder in folders for path in folder.glob("cu*/include/cuda_bf16.h")][:1]


def compiled(source: Path, architecture: str) -> tuple[str, str]:
    """The machine code, and what ptxas says of it."""
    tool = disassembler()
    assert tool is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{source.stem}.cubin"
        command = ["nvcc", *FLAGS, f"-arch={architecture}", *includes(), f"-I{ROOT / 'csrc'}", str(source)]
        built = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(built.stderr)
        code = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    return code.stdout, built.stderr


def measured() -> list[Kernel]:
    """The kernels, by name."""
    found = []
    for source, which in SOURCES.items():
        found += [code for code in codes(*compiled(source, "sm_90")) if _chosen(code, which)]
    return sorted(found, key=lambda code: code.name)


def measured_convolutions() -> list[ConvKernel]:
    """Those of convolutions, by name."""
    found = convolutions(*compiled(NAMED / "conv.cu", "sm_80"))
    return sorted(found, key=lambda kernel: kernel.name)


def _chosen(code: Kernel, which: str) -> bool:
    """Whether networks in float32 and bfloat16 take it, with what is read whole vectors at a time."""
    wanted = re.search(which, code.name) and not re.search(r"double|__half", code.name)
    return bool(code.loads.get(16) and wanted)


def _functions(listing: str, log: str) -> Iterator[tuple[str, int, int, dict[int, str]]]:
    """The name, registers, bytes of spills and instructions of each."""
    parts = re.split(r"\n\s*Function : (\S+)\n", listing)
    demangled = subprocess.run(["c++filt"], input="\n".join(parts[1::2]), capture_output=True, text=True)
    for mangled, name, body in zip(parts[1::2], demangled.stdout.splitlines(), parts[2::2], strict=True):
        about = re.search(
            rf"Compiling entry function '{re.escape(mangled)}' for.*?(\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers",
            log,
            re.DOTALL,
        )
        assert about is not None, name
        instructions = {int(at, 16): text for at, text in _INSTRUCTION.findall(body)}
        yield short(name), int(about[3]), int(about[1]) + int(about[2]), instructions


def codes(listing: str, log: str) -> Iterator[Kernel]:
    for name, registers, spills, instructions in _functions(listing, log):
        way = [instructions[at] for at in _way_round(instructions)]
        accesses = (_accesses(way, kind) for kind in ("LDG", "STG"))
        yield Kernel(name, registers, spills, len(way), *accesses, _in_flight(way))


def convolutions(listing: str, log: str) -> Iterator[ConvKernel]:
    for name, registers, spills, instructions in _functions(listing, log):
        way = [instructions[at] for at in _way_of_products(instructions)]
        product = "HMMA" if any("HMMA" in text for text in way) else "FFMA"
        products = sum(product in text for text in way)
        shared, copied = (sum(_bytes(text, kind) for text in way) for kind in (r"LDSM?\b", r"LDGSTS\b"))
        yield ConvKernel(name, registers, spills, product, len(way), products, shared, copied)


def _bytes(text: str, kind: str) -> int:
    """What an access of a thread to shared memory moves; LDSM.16.M88.4 reads a row of 16 bytes for each."""
    found = re.match(rf"(?:@!?U?P\w+\s+)?{kind}(\S*)", text)
    if found is None:
        return 0
    return 16 if re.search(r"\.128|M88\.4", found[1]) else 8 if ".64" in found[1] else 4


def _target(text: str) -> int | None:
    found = _BRANCH.match(text)
    return int(found[2], 16) if found else None


def _loops(instructions: dict[int, str]) -> list[tuple[int, int]]:
    """Their first and last addresses; all of it where there is none."""
    order = sorted(instructions)
    loops = []
    for at in order:
        target = _target(instructions[at])
        if target is not None and target < at:
            loops.append((target, at))
    return loops or [(order[0], order[-1])]


def _way_of_products(instructions: dict[int, str]) -> list[int]:
    """The addresses on the way once round the innermost loop that has most products, and all of its copies to
    shared memory: the shortest, which leaves out the prologue."""
    order = sorted(instructions)
    loops = _loops(instructions)

    def has(loop: tuple[int, int], kinds: str) -> list[int]:
        inside = (at for at in order if loop[0] <= at <= loop[1])
        return [at for at in inside if re.search(rf"\b({kinds})\b", instructions[at])]

    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    kind = "HMMA" if any(has(loop, "HMMA") for loop in innermost) else "FFMA"
    head, tail = max(innermost, key=lambda loop: len(has(loop, kind)))
    # FFMA does a prologue too, which lies before the barrier.
    barrier = max(has((head, tail), "BAR"), default=head)
    stops = has((head, tail), "LDGSTS") + [at for at in has((head, tail), kind) if at > barrier]
    return _through(instructions, order, (head, tail), sorted(stops), lambda at, target: True)


def _through(
    instructions: dict[int, str],
    order: list[int],
    loop: tuple[int, int],
    stops: list[int],
    may_skip: Callable[[int, int], bool],
) -> list[int]:
    """The shortest way round a loop by all stops."""
    way, here = [], loop[0]
    for stop in [*stops, loop[1]]:
        part = _shortest(instructions, order, (here, stop), may_skip)
        if part is not None:  # else it is on another branch
            way += part
            here = stop
    return [*way, loop[1]]


def _way_round(instructions: dict[int, str]) -> list[int]:
    """The addresses on the way once round the loop that has most of the widest loads and stores.

    It is the shortest way that passes all of these and leaves out only what is rare: what is for special
    values, or for what is kept in other types.
    """
    order = sorted(instructions)

    def wide(loop: tuple[int, int]) -> list[int]:
        inside = (at for at in order if loop[0] <= at <= loop[1])
        return [at for at in inside if 16 in (_access(instructions[at], kind) for kind in ("LDG", "STG"))]

    # Of loops that are one within the other, the innermost.
    loop = max(_loops(instructions), key=lambda loop: (len(wide(loop)), loop[0] - loop[1]))
    return _through(
        instructions, order, loop, wide(loop), lambda at, target: _rare(instructions, order, at, target)
    )


def _rare(instructions: dict[int, str], order: list[int], at: int, target: int) -> bool:
    """Whether what a branch leaves out is not for every vector: loops, or accesses to less than one."""
    over = [position for position in order if at < position < target]
    narrow = any(
        (_access(instructions[position], kind) or 16) < 16 for position in over for kind in ("LDG", "STG")
    )
    back = any((_target(instructions[position]) or position) < position for position in over)
    return narrow or back


def _shortest(
    instructions: dict[int, str],
    order: list[int],
    ends: tuple[int, int],
    may_skip: Callable[[int, int], bool],
) -> list[int] | None:
    """Addresses from one to before the other, without going back; None where there is no way."""
    start, stop = ends
    position = {at: i for i, at in enumerate(order)}
    best: dict[int, tuple[int, int | None]] = {start: (0, None)}
    for at in order[position[start] : position[stop]]:
        if at not in best:
            continue
        text, steps = instructions[at], best[at][0] + 1
        target = _target(text)
        always = re.match(r"(BRA|EXIT|RET)", text) is not None
        nexts = [] if always else [order[position[at] + 1]]
        if target is not None and target > at and (always or may_skip(at, target)):
            nexts.append(target)
        for following in nexts:
            if following not in best or steps < best[following][0]:
                best[following] = (steps, at)
    if stop not in best:
        return None
    way, at = [], best[stop][1]
    while at is not None:
        way.append(at)
        at = best[at][1]
    return way[::-1]


def _access(text: str, kind: str) -> int | None:
    found = _ACCESS.match(text)
    if found is None or found[1] != kind:
        return None
    return next((width for suffix, width in _WIDTHS.items() if suffix in found[2]), 4)


def _accesses(way: list[str], kind: str) -> dict[int, int]:
    widths = (_access(text, kind) for text in way)
    return dict(Counter(width for width in widths if width is not None))


def _in_flight(way: list[str]) -> int:
    """The most bytes that loads have asked for when the first of what they bring is used."""
    most, waiting, asked = 0, set(), 0
    for text in way:
        width = _access(text, "LDG")
        registers = {int(number) for number in re.findall(r"\bR(\d+)", text)}
        if width is not None:
            operands = re.findall(r"\bR(\d+)", text.split(",", 1)[1])
            if waiting & {int(number) for number in operands}:
                waiting, asked = set(), 0
            first = int(re.findall(r"\bR(\d+)", text)[0])
            waiting |= set(range(first, first + max(width // 4, 1)))
            asked += width
            most = max(most, asked)
        elif waiting & registers:
            waiting, asked = set(), 0
    return most


def lines(codes: list[Kernel]) -> Iterator[str]:
    yield f"# {compiler()}; kernel, registers, bytes of spills, then once round the loop:"
    yield "# instructions, loads and stores of so many bytes, bytes asked for before the first is used"
    for code in codes:
        yield line(code)


def lines_of_convolutions(kernels: list[ConvKernel]) -> Iterator[str]:
    yield f"# {compiler()}; kernel, registers, bytes of spills, instruction that multiplies, then once"
    yield "# round the loop: instructions, products, bytes read from shared memory and copied there"
    for kernel in kernels:
        yield conv_roofline.line(kernel)


if __name__ == "__main__":
    write(TABLE, lines(measured()))
    write(conv_roofline.TABLE, lines_of_convolutions(measured_convolutions()))
    sys.stdout.write(TABLE.read_text() + conv_roofline.TABLE.read_text())
