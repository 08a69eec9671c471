"""The suite "pool": every named pooling case, against PyTorch's own operator."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pooling_ext.testing.shapes import CASES, PoolCase
from pooling_ext.testing.tolerances import EXACT, tolerance

from ..harness import suite
from ..harness.memory import saved_bytes
from ..harness.suite import DTYPES, LAYOUTS
from ..harness.timing import copy_rate, measure, once_ms
from ..reports import operator_report as tables
from ..reports import plots, report
from ..reports.results import BACKWARD, FORWARD, TRAINING, Overhead, Results, Row
from ..reports.targets import POOL

HELP = "pooling operators: forward, training forward and backward of every named case"

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

_METHOD = (
    "Both operators run in one process, in turn, on the same tensors, after our result was checked against "
    "PyTorch's; times are medians of a call. Memory is reused (`pooling_ext.reuse_cpu_memory()`), so neither "
    "pays for fresh pages. A rate counts what has to move: input and output once, and what is saved for "
    'backward; "of a copy" compares it with a copy of as many bytes, which reading more than writing can '
    "beat. Saved bytes leave out the input and the output, which the neighboring layers keep anyway."
)

Operator = Callable[[Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suite.add_arguments(parser, "pool")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 if an operator gave a wrong result."""
    console = suite.make_console()
    cases = suite.choose(CASES, QUICK if args.quick else ["*"], args)
    if args.list:
        for case in cases:
            console.print(f"{case.name:26} {case.op:20} {list(case.shape)} {case.kwargs}", highlight=False)
        return 0
    budget = QUICK_BUDGET if args.quick else BUDGET
    with suite.settings(args, console, seconds_per_measurement=budget) as facts:
        results = sweep(cases, budget, facts, console)
    document = report.Document(
        "Pooling on the CPU",
        facts,
        _METHOD,
        tables.headline(results),
        [
            report.targets(POOL, results),
            tables.summary(results),
            tables.overheads(results),
            tables.slow(results),
            tables.by_phases(results),
        ],
        [tables.by_phases_short(results)],
        tables.alone(results),
        results.wrong,
    )
    whole = suite.is_whole(args, cases, CASES)
    draw = partial(plots.draw_phases, results)
    suite.finish("pool", document, results.as_json(), whole, args, console, draw)
    return 1 if results.wrong else 0


def sweep(cases: tuple[PoolCase, ...], budget: float, facts: dict[str, Any], console: Console) -> Results:
    """Check and time ``cases`` in every dtype and layout."""
    results = Results(facts)
    with suite.steps(console, 1 + sum(len(_variants(case)) for case in cases)) as begin:
        begin("a tiny tensor")
        results.overheads += overheads(5 * budget)
        for case in cases:
            reference = Reference(case)
            for dtype, layout in _variants(case):
                label = f"{case.name} {dtype} {layout}"
                begin(label)
                try:
                    results.rows += measure_case(case, reference, dtype, layout, budget)
                except NotImplementedError:
                    results.alone.append(label)
                except AssertionError as error:
                    results.wrong[label] = str(error).strip()
    return results


def _variants(case: PoolCase) -> list[tuple[str, str]]:
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
    case: PoolCase, reference: Reference, dtype_name: str, layout: str, budget: float
) -> Iterator[Row]:
    """Check ``case`` against ``reference``, then time its phases.

    Raises:
        AssertionError: our output or gradient is not PyTorch's.
        NotImplementedError: PyTorch has no such operator.
    """
    dtype, format = DTYPES[dtype_name], LAYOUTS[layout]
    if layout == "NHWC" and case.rank == 3:
        format = torch.channels_last_3d
    rivals: dict[str, Operator] = {"torch": case.torch(), "ours": case.ours()}
    x = reference.input.to(dtype).contiguous(memory_format=format)
    leaf = x.detach().requires_grad_()
    outputs, saved = {}, {}
    for name, operator in rivals.items():
        outputs[name], saved[name] = saved_bytes(partial(operator, leaf), [leaf])
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
    labels = (case.name, case.op, dtype_name, layout)

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
            read_ms=once_ms(x.nbytes, 0),
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
