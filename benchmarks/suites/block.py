"""The suite "block": the fused operators at ResNet-50's shapes, against PyTorch's operators in turn."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pooling_ext.testing.tolerances import tolerance

from ..harness import suite
from ..harness.memory import peak_bytes, saved_bytes
from ..harness.suite import DTYPES, LAYOUTS
from ..harness.timing import copy_rate, measure
from ..reports import operator_report as tables
from ..reports import plots, report
from ..reports.results import FORWARD, STEP, Results, Row
from ..reports.targets import BLOCK
from .block_cases import CASES, BlockCase, Operator

HELP = "fused batch norm, ReLU, add, pooling and convolution at ResNet-50's shapes"

QUICK = ("resnet-*", "bn-relu-64-56", "bn-add-relu-512-28", "conv3x3-128-56-s2")
#: Seconds to spend on one measurement of both rivals.
BUDGET, QUICK_BUDGET = 1.0, 0.1
#: What a few elements that rounding lets pass or not may change in the norm of a gradient.
FLIPS = 1e-2

_METHOD = (
    "Both run in one process, in turn, on the same tensors, after our output and gradients were compared "
    "with float64's; times are medians of a call. PyTorch's side is `F.batch_norm`, `add_` and `relu_`, as "
    f"the models of torchvision call them. A time of {STEP} is that of a call in training and the gradients "
    f"of all its inputs; {FORWARD} alone is a call in inference. Memory is reused "
    "(`pooling_ext.reuse_cpu_memory()`), so neither pays for fresh pages. A rate counts inputs, output and "
    "their gradients once each, and what is saved for backward. Peak is the bytes that are live at most "
    "beyond the inputs during the call, as torch's profiler sees its allocator; saved is all that is kept "
    "for backward, the input among it."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suite.add_arguments(parser, "block")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 if an operator gave a wrong result."""
    console = suite.make_console()
    cases = suite.choose(CASES, QUICK if args.quick else ["*"], args)
    if args.list:
        for case in cases:
            console.print(f"{case.name:22} {case.op:26} {list(case.shape)} {case.kwargs}", highlight=False)
        return 0
    budget = QUICK_BUDGET if args.quick else BUDGET
    with suite.settings(args, console, seconds_per_measurement=budget) as facts:
        results = sweep(cases, budget, facts, console)
    document = report.Document(
        "Fused operators on the CPU",
        facts,
        _METHOD,
        tables.headline(results),
        [
            report.targets(BLOCK, results),
            tables.operators(results),
            tables.slow(results),
            tables.by_steps(results),
        ],
        wrong=results.wrong,
    )
    whole = suite.is_whole(args, cases, CASES)
    draw = partial(plots.draw_dtypes, results)
    suite.finish("block", document, results.as_json(), whole, args, console, draw)
    return 1 if results.wrong else 0


def sweep(cases: tuple[BlockCase, ...], budget: float, facts: dict[str, Any], console: Console) -> Results:
    """Check and time ``cases`` in every dtype and layout."""
    results = Results(facts)
    with suite.steps(console, len(cases) * len(DTYPES) * len(LAYOUTS)) as begin:
        for case in cases:
            reference = Reference(case)
            for layout in ("NHWC", "NCHW"):
                for dtype in DTYPES:
                    label = f"{case.name} {dtype} {layout}"
                    begin(label)
                    try:
                        results.rows += measure_case(case, reference, dtype, layout, budget)
                    except AssertionError as error:
                        results.wrong[label] = str(error).strip()
    return results


class Reference:
    """A case's arguments and output gradient, with output and gradients of PyTorch's operators in float64."""

    def __init__(self, case: BlockCase) -> None:
        self.tensors = case.tensors()
        leaves = {name: value.double() for name, value in self.tensors.items()}
        operator = case.rivals(torch.float64, torch.contiguous_format)["torch"]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            shape = operator(**leaves).shape
        self.grad = torch.randn(shape, generator=generator).bfloat16().float()
        self.results = _results(case, operator, leaves, self.grad.double())


def _results(
    case: BlockCase, operator: Operator, leaves: dict[str, Tensor], grad: Tensor
) -> dict[str, Tensor]:
    """What an operator gives: its output and, where it is measured in training, its gradients."""
    if STEP not in case.phases:
        with torch.no_grad():
            return {"output": operator(**leaves)}
    leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    output = operator(**leaves)
    grads = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output.detach()} | {
        f"gradient of {name}": found for name, found in zip(leaves, grads, strict=True)
    }


def measure_case(
    case: BlockCase, reference: Reference, dtype_name: str, layout: str, budget: float
) -> Iterator[Row]:
    """Check ``case`` against ``reference``, then time its phases.

    Raises:
        AssertionError: our output or a gradient is not PyTorch's.
    """
    dtype, format = DTYPES[dtype_name], LAYOUTS[layout]

    def placed(value: Tensor) -> Tensor:
        # Weights and biases stay in float32.
        return value.to(dtype).contiguous(memory_format=format) if value.dim() == 4 else value

    tensors = {name: placed(value) for name, value in reference.tensors.items()}
    rivals = case.rivals(dtype, format)
    grad = placed(reference.grad)
    theirs, found = (_results(case, rivals[name], tensors, grad) for name in ("torch", "ours"))
    for what, expected in reference.results.items():
        _check(what, found[what], theirs[what], expected, dtype)
    shape = found["output"].shape
    assert shape == grad.shape, f"output has shape {tuple(shape)} instead of {tuple(grad.shape)}"
    del theirs, found

    leaves = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    inputs = list(leaves.values())
    moved = sum(leaf.nbytes for leaf in inputs) + grad.nbytes

    def step(name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(rivals[name](**leaves), inputs, grad)

    for phase in case.phases:
        more: dict[str, int] = {}
        nbytes = moved
        if phase == STEP:
            calls = {name: partial(step, name) for name in rivals}
            for name, rival in rivals.items():
                _, (_, more[f"{name}_saved"]) = saved_bytes(partial(rival, **leaves), inputs)
                more[f"{name}_peak"] = peak_bytes(calls[name])
            nbytes = 2 * moved + more["ours_saved"]
        else:
            calls = {name: torch.no_grad()(partial(rival, **tensors)) for name, rival in rivals.items()}
        timings = measure(calls, budget)
        ms = timings["torch"].ms, timings["ours"].ms, timings["torch"].spread, timings["ours"].spread
        yield Row(case.name, case.op, dtype_name, layout, phase, *ms, nbytes, copy_rate(nbytes), **more)


def _check(what: str, actual: Tensor, theirs: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Require that ``actual`` is ``expected`` up to rounding, or no further from it than twice PyTorch's.

    Gradients are held to less: where ReLU's input is all but 0, rounding decides whether one passes.
    """
    is_output = what == "output"
    allowed = tolerance(dtype).rtol if is_output else FLIPS
    for norm in (2, torch.inf) if is_output else (2,):
        size = expected.norm(norm)
        off, torch_off = (float((value.double() - expected).norm(norm) / size) for value in (actual, theirs))
        if not off <= max(2 * torch_off, allowed):
            raise AssertionError(
                f"{what}: off by {off:.2g} of its size (norm {norm}), PyTorch's by {torch_off:.2g}"
            )
