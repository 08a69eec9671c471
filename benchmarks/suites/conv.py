"""The suite "conv": Winograd's 3x3 convolutions of stride 1 and their gradients, against oneDNN's."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from pooling_ext.ops import winograd
from pooling_ext.testing.conv_shapes import RESNET, VGG, ConvShape

from ..harness import suite
from ..harness.suite import DTYPES
from ..harness.timing import copy_rate, measure
from ..reports import report
from ..reports.report import Grid, milliseconds, ratio
from ..reports.results import FORWARD, Results, Row
from ..reports.targets import CONV, INPUT_GRAD, WEIGHT_GRAD

HELP = "3x3 convolutions of ResNet and VGG by Winograd: forward and both gradients"

QUICK = ("resnet-64-64-56-b1", "resnet-256-256-14-b1")
#: Seconds to spend on one measurement of both rivals.
BUDGET, QUICK_BUDGET = 1.0, 0.1
#: The largest error of a result, relative to its largest element, that is not taken for a wrong one.
ALLOWED = {"float32": 5e-5, "bfloat16": 2e-2}

_METHOD = (
    "Both run in one process, in turn, on the same tensors in channels_last, after our results were "
    "compared with float64's; times are medians of a call. Forward is with bias and ReLU; oneDNN's "
    "weight is reordered and ours transformed beforehand (`torch.ops.mkldnn._convolution_pointwise`, "
    "`winograd_conv`). Gradients are those of `convolution_backward`, and transform the weight. "
    "Rates count the direct convolution's operations. Memory is reused "
    "(`pooling_ext.reuse_cpu_memory()`), so neither pays for fresh pages."
)

Rivals = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class ConvCase:
    """A layer and a batch size."""

    shape: ConvShape
    batch: int

    @property
    def name(self) -> str:
        return f"{self.shape.name}-b{self.batch}"

    def rivals(self, dtype: torch.dtype) -> tuple[dict[str, Rivals], dict[str, Tensor]]:
        """What is measured of each phase, and what it should give in float64."""
        shape, batch = self.shape, self.batch
        generator = torch.Generator().manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            values = torch.randn(sizes, generator=generator).to(dtype)
            return values.contiguous(memory_format=torch.channels_last) if len(sizes) == 4 else values

        x, grad = normal(batch, *shape.input_shape), normal(batch, *shape.output_shape)
        weight = normal(*shape.weight_shape) / (9 * shape.channels) ** 0.5
        bias = normal(shape.features)
        ones = [1, 1]
        reordered = torch.ops.mkldnn._reorder_convolution_weight(weight, ones, ones, ones, 1, list(x.shape))
        pointwise = torch.ops.mkldnn._convolution_pointwise.default
        transformed = winograd.winograd_weight(weight, 1, False)
        sides = [1, 1, 1, 1]

        def backward(x: Tensor, grad: Tensor, weight: Tensor, which: int) -> Tensor:
            mask = [index == which for index in range(3)]
            return torch.ops.aten.convolution_backward(
                grad, x, weight, None, ones, ones, ones, False, [0, 0], 1, mask
            )[which]

        phases: dict[str, Rivals] = {
            FORWARD: {
                "torch": lambda: pointwise(x, reordered, bias, ones, ones, ones, 1, "relu", [], ""),
                "ours": lambda: winograd.winograd_conv(
                    x, transformed, bias, None, sides, shape.features, 1, 1, 0.0
                ),
            },
            INPUT_GRAD: {
                "torch": lambda: backward(x, grad, weight, 0),
                "ours": lambda: winograd.winograd_input_grad(grad, weight, sides, 1),
            },
            WEIGHT_GRAD: {
                "torch": lambda: backward(x, grad, weight, 1),
                "ours": lambda: winograd.winograd_weight_grad(x, grad, sides, 1),
            },
        }
        wide = x.double(), grad.double(), weight.double()
        expected = {
            FORWARD: F.conv2d(wide[0], wide[2], bias.double(), padding=1).relu_(),
            INPUT_GRAD: backward(*wide, 0),
            WEIGHT_GRAD: backward(*wide, 1),
        }
        return phases, expected


CASES: tuple[ConvCase, ...] = tuple(ConvCase(shape, batch) for batch in (16, 1) for shape in RESNET + VGG)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suite.add_arguments(parser, "conv")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), action="append", help="only this one; default: float32"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 if an operator gave a wrong result."""
    console = suite.make_console()
    cases = suite.choose(CASES, QUICK if args.quick else ["*"], args)
    if args.list:
        for case in cases:
            console.print(f"{case.name:24} {case.shape}", highlight=False)
        return 0
    budget = QUICK_BUDGET if args.quick else BUDGET
    with suite.settings(args, console, seconds_per_measurement=budget) as facts:
        results = sweep(cases, args.dtype or ["float32"], budget, facts, console)
    slowest = results.slowest()
    title = f"Winograd over oneDNN: at least {ratio(slowest.speedup)}" if slowest else "nothing was measured"
    document = report.Document(
        "Convolutions on the CPU",
        facts,
        _METHOD,
        title,
        [report.targets(CONV, results), layers(results)],
        wrong=results.wrong,
    )
    whole = suite.is_whole(args, cases, CASES)
    suite.finish("conv", document, results.as_json(), whole, args, console)
    return 1 if results.wrong else 0


def sweep(
    cases: tuple[ConvCase, ...], dtypes: list[str], budget: float, facts: dict[str, Any], console: Console
) -> Results:
    """Check and time ``cases``."""
    results = Results(facts)
    with suite.steps(console, len(cases) * len(dtypes)) as begin:
        for case in cases:
            for dtype in dtypes:
                label = f"{case.name} {dtype}"
                begin(label)
                try:
                    results.rows += measure_case(case, dtype, budget)
                except AssertionError as error:
                    results.wrong[label] = str(error)
    return results


def measure_case(case: ConvCase, dtype: str, budget: float) -> Iterator[Row]:
    """Check each phase, then time it.

    Raises:
        AssertionError: a result of ours is not float64's.
    """
    phases, expected = case.rivals(DTYPES[dtype])
    for phase, rivals in phases.items():
        wanted = expected[phase]
        found = rivals["ours"]()
        off = float((found.double() - wanted).abs().max() / wanted.abs().max())
        assert off <= ALLOWED[dtype], f"{phase}: off by {off:.2g} of the largest element"
        sizes = (*case.shape.input_shape, *case.shape.output_shape)
        nbytes = found.element_size() * case.batch * (sizes[0] * sizes[1] ** 2 + sizes[3] * sizes[4] ** 2)
        timings = measure(rivals, budget)
        theirs, ours = timings["torch"], timings["ours"]
        yield Row(
            case.name,
            "conv3x3",
            dtype,
            "NHWC",
            phase,
            theirs.ms,
            ours.ms,
            theirs.spread,
            ours.spread,
            nbytes,
            copy_rate(nbytes),
        )


def layers(results: Results) -> Grid:
    """Times, rates and ratios of each layer."""
    flops = {case.name: case.shape.flops(case.batch) for case in CASES}
    rows = [
        (
            row.case,
            row.dtype,
            row.phase,
            milliseconds(row.torch_ms),
            milliseconds(row.ours_ms),
            f"{flops[row.case] / row.torch_ms / 1e6:.0f}",
            f"{flops[row.case] / row.ours_ms / 1e6:.0f}",
            ratio(row.speedup),
        )
        for row in results.rows
    ]
    header = ("layer", "", "", "oneDNN, ms", "ours, ms", "oneDNN, GFLOP/s", "ours, GFLOP/s", "speed-up")
    return Grid("Layers", header, rows, left=3)
