"""The suite "pool": every named pooling case, against PyTorch's own operator."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import pooling_ext
from pooling_ext import _native
from pooling_ext.testing.shapes import CASES, PoolCase, find
from pooling_ext.testing.tolerances import EXACT, tolerance

from . import machine, picture, report
from .results import BACKWARD, FORWARD, TRAINING, Overhead, Results, Row
from .timing import copy_rate, measure, once_ms

HELP = "pooling operators: forward, training forward and backward of every named case"

DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
QUICK = (
    "resnet-stem*",
    "squeezenet-ceil",
    "inception-avg",
    "densenet-transition",
    "alexnet-adaptive",
    "resnet-gap",
    "large-gap",
)
#: Seconds to spend on one measurement of both rivals.
BUDGET, QUICK_BUDGET = 0.2, 0.03
#: The copy that gives the machine's bandwidth reads and writes this many bytes each.
LARGE_COPY = 256 * 2**20

ROOT = Path(__file__).resolve().parent.parent

Operator = Callable[[Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="fewer cases and repetitions, well under a minute"
    )
    parser.add_argument(
        "--cases", metavar="GLOB", action="append", help="only cases of these names; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads for both; default: torch's own choice"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write pool.json, pool.md and pool.png here. Without it a whole sweep goes to "
        "benchmarks/results/ and docs/, a partial one nowhere",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 if an operator gave a wrong result, 2 for bad arguments."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    cases = find(args.cases or (QUICK if args.quick else ["*"]))
    if not cases:
        names = ", ".join(case.name for case in CASES)
        console.print(
            f"[red]no case matches {' or '.join(args.cases)}[/]; there are: {names}", highlight=False
        )
        return 2
    if args.list:
        for case in cases:
            console.print(f"{case.name:26} {case.op:20} {list(case.shape)} {case.kwargs}", highlight=False)
        return 0
    if args.threads is not None and args.threads < 1:
        console.print(f"[red]--threads must be at least 1, but got {args.threads}[/]")
        return 2
    results = sweep(cases, QUICK_BUDGET if args.quick else BUDGET, args.threads, console)
    report.show(results, console)
    whole = not args.quick and len(cases) == len(CASES)
    if args.out is not None or whole:
        written = write(results, args.out)
        console.print(f"wrote {', '.join(str(path) for path in written)}", highlight=False)
    return 1 if results.wrong else 0


def write(results: Results, out: Path | None) -> list[Path]:
    """Write the sweep's files into ``out``, or where the repository keeps them; returns their paths."""
    folder = out or ROOT / "benchmarks" / "results" / str(results.facts["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    image = (out or ROOT / "docs") / "pool.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    paths = [folder / "pool.json", folder / "pool.md", image]
    paths[0].write_text(json.dumps(results.as_json(), indent=1) + "\n")
    paths[1].write_text(report.markdown(results))
    picture.draw(results, image)
    return paths


def sweep(cases: tuple[PoolCase, ...], budget: float, threads: int | None, console: Console) -> Results:
    """Check and time ``cases`` in every dtype and layout."""
    memory = pooling_ext.reuse_cpu_memory()
    # Pinned, so that nothing in the process changes its mind half-way.
    torch.set_num_threads(threads or torch.get_num_threads())
    if _native.module is None:
        console.print(f"[yellow]No native kernels ({_native.why_not}): this compares PyTorch with itself.[/]")
    start, others = time.perf_counter(), machine.OtherLoad()
    results = Results(machine.facts() | {"memory_reused": memory.reason, "seconds_per_measurement": budget})
    results.facts["copy_gb_s"] = copy_rate(2 * LARGE_COPY)
    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("a tiny tensor", total=sum(len(_variants(case)) for case in cases))
        results.overheads += overheads(5 * budget)
        for case in cases:
            reference = Reference(case)
            for dtype, layout in _variants(case):
                name = str(dtype).removeprefix("torch.")
                progress.update(task, description=f"{case.name} {name} {layout}")
                try:
                    results.rows += measure_case(case, reference, dtype, layout, budget)
                except NotImplementedError:
                    results.alone.append(f"{case.name} {name} {layout}")
                except AssertionError as error:
                    results.wrong[f"{case.name} {name} {layout}"] = str(error).strip()
                progress.advance(task)
    results.facts["seconds"] = round(time.perf_counter() - start, 1)
    results.facts["cores_busy_with_others"] = others.cores()
    return results


def _variants(case: PoolCase) -> list[tuple[torch.dtype, str]]:
    """dtypes and layouts of ``case``; one spatial axis has no channels-last layout in torch."""
    layouts = list(LAYOUTS) if case.rank > 1 else ["NCHW"]
    return [(dtype, layout) for dtype in DTYPES for layout in layouts]


class Reference:
    """A case's random input and output gradient, with PyTorch's output and input gradient in float32.

    The values are exact in bfloat16, so that one reference serves every dtype; ties are common among them.
    """

    def __init__(self, case: PoolCase):
        generator = torch.Generator().manual_seed(0)

        def normal(shape: Any) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16().float()

        self.input = normal(case.shape)
        leaf = self.input.clone().requires_grad_()
        output = case.torch()(leaf)
        self.output = output.detach()
        self.grad = normal(output.shape)
        (self.input_grad,) = torch.autograd.grad(output, leaf, self.grad)


def measure_case(
    case: PoolCase, reference: Reference, dtype: torch.dtype, layout: str, budget: float
) -> Iterator[Row]:
    """Check ``case`` against ``reference``, then time its phases.

    Raises:
        AssertionError: our output or gradient is not PyTorch's.
        NotImplementedError: PyTorch has no such operator.
    """
    format = LAYOUTS[layout]
    if layout == "NHWC" and case.rank == 3:
        format = torch.channels_last_3d
    rivals: dict[str, Operator] = {"torch": case.torch(), "ours": case.ours()}
    x = reference.input.to(dtype).contiguous(memory_format=format)
    leaf = x.detach().requires_grad_()
    outputs, saved = {}, {}
    for name, operator in rivals.items():
        outputs[name], saved[name] = _saved_bytes(operator, leaf)
    grads = {}
    for name, output in outputs.items():
        grads[name] = torch.empty_like(output.detach()).copy_(reference.grad)

    def backward(name: str) -> Tensor:
        return torch.autograd.grad(outputs[name], leaf, grads[name], retain_graph=True)[0]

    with torch.no_grad():
        inferred = rivals["ours"](x)
    trained = {name: output.detach() for name, output in outputs.items()}
    _check("output in inference", case, inferred, lambda: trained["torch"], reference.output)
    _check("output in training", case, trained["ours"], lambda: trained["torch"], reference.output)
    _check("gradient", case, backward("ours"), lambda: backward("torch"), reference.input_grad)

    out_bytes = outputs["ours"].numel() * dtype.itemsize
    extra, total = saved["ours"]
    labels = (case.name, case.op, str(dtype).removeprefix("torch."), layout)

    def row(phase: str, calls: dict[str, Callable[[], Any]], nbytes: int, **more: Any) -> Row:
        timings = measure(calls, budget)
        ours, theirs = timings["ours"], timings["torch"]
        return Row(
            *labels, phase, theirs.ms, ours.ms, theirs.spread, ours.spread, nbytes, copy_rate(nbytes), **more
        )

    with torch.no_grad():
        yield row(
            FORWARD,
            {name: partial(operator, x) for name, operator in rivals.items()},
            x.nbytes + out_bytes,
            once_ms=once_ms(x.nbytes, out_bytes),
        )
    yield row(
        TRAINING,
        {name: partial(operator, leaf) for name, operator in rivals.items()},
        x.nbytes + out_bytes + extra,
        torch_saved=saved["torch"][0],
        ours_saved=extra,
    )
    yield row(
        BACKWARD,
        {name: partial(backward, name) for name in rivals},
        x.nbytes + out_bytes + total,
    )


def _check(what: str, case: PoolCase, actual: Tensor, theirs: Callable[[], Tensor], expected: Tensor) -> None:
    """Require ``actual`` to be ``expected`` up to rounding; a maximum exactly.

    PyTorch's own gradients are summed in bfloat16, so ours also pass where PyTorch's (``theirs``) are
    as far off.
    """
    rtol, atol = EXACT if case.kind == "max" and what != "gradient" else tolerance(actual.dtype)
    # Lp's result is a product of several rounded factors.
    scale = 4 if case.kind == "lp" else 1
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    error = (actual.float() - expected).abs()
    if bool((error <= scale * (atol + rtol * expected.abs())).all()):
        return
    largest, torch_largest = error.max().item(), (theirs().float() - expected).abs().max().item()
    if rtol > 0 and largest <= torch_largest:
        return
    raise AssertionError(
        f"{what}: off by up to {largest:.3g} from float32, where PyTorch's is by {torch_largest:.3g}"
    )


def _saved_bytes(operator: Operator, leaf: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Run ``operator`` and count what it keeps for backward.

    Returns:
        the output, and two counts of bytes: without the input and the output, and in all. The first
        is what the layer adds to a network's memory, whose other layers keep input and output anyway.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = operator(leaf)
    total = sum(kept.values())
    for tensor in (leaf, output):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return output, (sum(kept.values()), total)


_TINY = {
    "max_pool2d": {"kernel_size": 2},
    "avg_pool2d": {"kernel_size": 2},
    "lp_pool2d": {"norm_type": 2, "kernel_size": 2},
    "adaptive_avg_pool2d": {"output_size": 2},
    "adaptive_max_pool2d": {"output_size": 2},
}


def overheads(budget: float) -> Iterator[Overhead]:
    """Time calls on a (1, 1, 4, 4) float32 tensor."""
    for op, kwargs in _TINY.items():
        case = PoolCase("tiny", op, (1, 1, 4, 4), kwargs)
        rivals = {"torch": case.torch(), "ours": case.ours()}
        for grad in (False, True):
            x = torch.ones(case.shape, requires_grad=grad)
            with torch.set_grad_enabled(grad):
                timings = measure({name: partial(operator, x) for name, operator in rivals.items()}, budget)
            yield Overhead(op, grad, timings["torch"].ms * 1e3, timings["ours"].ms * 1e3)
