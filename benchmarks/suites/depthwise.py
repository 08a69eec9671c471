"""The suite "depthwise": depthwise convolutions at the layers of mobile nets and ConvNeXt."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pooling_ext.ops import depthwise_conv as ops
from pooling_ext.testing.conv_shapes import DEPTHWISE_LAYERS
from pooling_ext.testing.tolerances import tolerance

from ..harness import suite
from ..harness.suite import DTYPES, LAYOUTS
from ..harness.timing import measure
from ..reports import operator_report as tables
from ..reports import report
from ..reports.report import Grid, milliseconds, ratio
from ..reports.results import FORWARD, Results, Row

HELP = "depthwise convolutions of mobile nets and ConvNeXt: forward and both gradients"

INPUT_GRAD, WEIGHT_GRAD = "input gradient", "weight gradient"
PHASES = (FORWARD, INPUT_GRAD, WEIGHT_GRAD)
QUICK = ("32-k3s1-112", "144-k5s2-56", "1152-k5s1-7", "384-k7s1-14")
#: Seconds to spend on one measurement of PyTorch's, ours and a copy.
BUDGET, QUICK_BUDGET = 0.2, 0.05
BATCH = 16

_METHOD = (
    "PyTorch's operator, ours and a copy of as many bytes as the call has to read and write run in one "
    "process, in turn; times are medians of a call. Our results were compared with PyTorch's before. The "
    f"{INPUT_GRAD} and the {WEIGHT_GRAD} are timed alone (`aten::convolution_backward` with one output). "
    "Memory is reused (`pooling_ext.reuse_cpu_memory()`), so that nobody pays for fresh pages."
)


Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class LayerCase:
    """One layer."""

    channels: int
    kernel: int
    stride: int
    height: int

    @property
    def name(self) -> str:
        return f"{self.channels}-k{self.kernel}s{self.stride}-{self.height}"

    def calls(
        self, dtype: torch.dtype, format: torch.memory_format
    ) -> dict[str, dict[str, Callable[[], Any]]]:
        """For each phase PyTorch's call and ours on the same random tensors, and the copy."""
        generator = torch.Generator().manual_seed(0)
        stride, padding = [self.stride] * 2, [self.kernel // 2] * 2
        last = format is torch.channels_last

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        x = normal(BATCH, self.channels, self.height, self.height).to(memory_format=format)
        weight = normal(self.channels, 1, self.kernel, self.kernel)
        grad = torch.conv2d(x, weight, None, stride, padding, 1, self.channels)
        source, target = (torch.zeros((x.numel() + grad.numel()) // 2, dtype=dtype) for _ in range(2))
        geometry = stride, padding, [1, 1], False, [0, 0], self.channels
        backward = partial(torch.ops.aten.convolution_backward, grad, x, weight, None, *geometry)
        theirs = (
            partial(torch.conv2d, x, weight, None, stride, padding, 1, self.channels),
            lambda: backward([True, False, False])[0],
            lambda: backward([False, True, False])[1],
        )
        ours = (
            partial(ops.depthwise_conv, x, weight, None, stride, padding, 0, 0.0),
            partial(ops.depthwise_conv_input_grad, grad, weight, x.shape, stride, padding, last),
            lambda: ops.depthwise_conv_weight_grad(grad, x, weight.shape, stride, padding, last, False)[0],
        )
        return {
            phase: {"torch": their, "ours": our, "copy": partial(target.copy_, source)}
            for phase, their, our in zip(PHASES, theirs, ours, strict=True)
        }

    def nbytes(self, dtype: torch.dtype) -> int:
        """Of the input and the output together."""
        output = -(-self.height // self.stride)
        return BATCH * self.channels * (self.height**2 + output**2) * dtype.itemsize


CASES = tuple(LayerCase(*layer) for layer in DEPTHWISE_LAYERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suite.add_arguments(parser, "depthwise")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 if an operator gave a wrong result."""
    console = suite.make_console()
    cases = suite.choose(CASES, QUICK if args.quick else ["*"], args)
    if args.list:
        for case in cases:
            console.print(case.name, highlight=False)
        return 0
    budget = QUICK_BUDGET if args.quick else BUDGET
    with suite.settings(args, console, seconds_per_measurement=budget, batch=BATCH) as facts:
        results = sweep(cases, budget, facts, console)
    document = report.Document(
        "Depthwise convolutions on the CPU",
        facts,
        _METHOD,
        tables.headline(results),
        [tables.summary(results), tables.slow(results), layers(results)],
        wrong=results.wrong,
    )
    whole = suite.is_whole(args, cases, CASES)
    suite.finish("depthwise", document, results.as_json(), whole, args, console)
    return 1 if results.wrong else 0


def sweep(cases: tuple[LayerCase, ...], budget: float, facts: dict[str, Any], console: Console) -> Results:
    """Check and time ``cases`` in every dtype and layout."""
    results = Results(facts)
    with suite.steps(console, len(cases) * len(DTYPES) * len(LAYOUTS)) as begin:
        for case in cases:
            for layout in ("NHWC", "NCHW"):
                for dtype in DTYPES:
                    label = f"{case.name} {dtype} {layout}"
                    begin(label)
                    try:
                        results.rows += measure_case(case, dtype, layout, budget)
                    except AssertionError as error:
                        results.wrong[label] = str(error).strip()
    return results


def measure_case(case: LayerCase, dtype_name: str, layout: str, budget: float) -> Iterator[Row]:
    """Check ``case``, then time its phases.

    Raises:
        AssertionError: our output or a gradient is not PyTorch's.
    """
    dtype = DTYPES[dtype_name]
    phases = case.calls(dtype, LAYOUTS[layout])
    for phase, calls in phases.items():
        _check(phase, calls["ours"](), calls["torch"](), dtype)
    nbytes = case.nbytes(dtype)
    for phase, calls in phases.items():
        timings = measure(calls, budget)
        ours, theirs = timings["ours"], timings["torch"]
        rate = nbytes / timings["copy"].ms / 1e6
        labels = (case.name, "depthwise_conv", dtype_name, layout, phase)
        yield Row(*labels, theirs.ms, ours.ms, theirs.spread, ours.spread, nbytes, rate)


def _check(what: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Require that ``actual`` differs from PyTorch's by rounding alone, in the norm."""
    off = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not off <= tolerance(dtype).rtol:
        raise AssertionError(f"{what}: off by {off:.2g} of its size")


def layers(results: Results) -> Grid:
    """A layer, dtype and layout in a row; "copies" are our time over that of the copy."""
    header = ["layer", "dtype", "layout"]
    for phase in PHASES:
        header += [f"{phase}, ms", "speed-up", "copies"]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in results.rows:
        cells = groups.setdefault((row.case, row.dtype, row.layout), [])
        cells += [f"{milliseconds(row.torch_ms)} → {milliseconds(row.ours_ms)}", ratio(row.speedup)]
        cells.append(f"{1 / row.copy_share:.2f}")
    rows = [[*labels, *cells] for labels, cells in groups.items()]
    return Grid("Layers, PyTorch → ours", header, rows, left=3)
