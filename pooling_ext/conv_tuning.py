"""``pooling-ext tune``: measures our convolutions of the CPU beside PyTorch's, for ops/conv_speeds.py."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backends import cpu_library
from .memory import reuse_cpu_memory
from .ops import conv_speeds
from .ops._library import memory_format
from .ops.conv_choice import DEPTHWISE, IMAGE, PHASES, POINTWISE, WHY_NOT, WINOGRAD, Conv
from .ops.conv_kernels import Plan, _aten_gradients, _gradients
from .ops.depthwise_conv import depthwise_conv
from .ops.image_conv import image_conv
from .ops.pointwise_conv import pointwise_conv
from .ops.winograd import winograd_conv, winograd_weight
from .testing.conv_shapes import (
    DEPTHWISE_LAYERS,
    IMAGE_LAYERS,
    OTHER_KERNELS,
    POINTWISE_LAYERS,
    RESNET,
    STRIDED_LAYERS,
    TORCHVISION,
    VGG,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCHES = (1, 16)
#: Seconds for both rivals of a phase, and turns at most.
BUDGET, TURNS = 0.08, 25
#: What lies outside is measured again.
USUAL = 1.15, 5.0


def problems(dtype: torch.dtype, quick: bool) -> Iterator[tuple[str, Conv]]:
    """Convolutions to measure, and the kernels that are to do them."""
    dense = tuple(dict.fromkeys((*RESNET, *VGG[:5])))
    if not quick:
        dense += tuple(shape for shape in TORCHVISION if shape.side < 112)
    seen = set()
    for batch in BATCHES:
        for shape, channels_last in product(dense, (True, False)):
            side = shape.padding
            padding = side, side, side, side
            conv = Conv(
                batch, shape.channels, (shape.side, shape.side), shape.features, (3, 3), (1, 1), padding,
                (1, 1), shape.groups, dtype, channels_last,
            )  # fmt: skip
            if conv not in seen:
                seen.add(conv)
                yield WINOGRAD, conv
        for (channels, features, side), channels_last in product(
            STRIDED_LAYERS[:: 3 if quick else 1], (True, False)
        ):
            yield WINOGRAD, Conv(
                batch, channels, (side, side), features, (3, 3), (2, 2), (1, 1, 1, 1),
                (1, 1), 1, dtype, channels_last,
            )  # fmt: skip
        for channels, features, (rows, columns), size in OTHER_KERNELS[:: 5 if quick else 1]:
            for channels_last in (True, False):
                yield WINOGRAD, Conv(
                    batch, channels, size, features, (rows, columns), (1, 1),
                    (rows // 2, columns // 2) * 2, (1, 1), 1, dtype, channels_last,
                )  # fmt: skip
        for channels, kernel, stride, side in DEPTHWISE_LAYERS[:: 5 if quick else 1]:
            for channels_last in (True, False):
                half = kernel // 2
                yield DEPTHWISE, Conv(
                    batch, channels, (side, side), channels, (kernel, kernel), (stride, stride),
                    (half, half, half, half), (1, 1), channels, dtype, channels_last,
                )  # fmt: skip

        for channels, features, kernel, stride, padding, side in IMAGE_LAYERS[:: 5 if quick else 1]:
            for channels_last in (True, False):
                yield IMAGE, Conv(
                    batch, channels, (side, side), features, (kernel, kernel), (stride, stride),
                    (padding, padding, padding, padding), (1, 1), 1, dtype, channels_last,
                )  # fmt: skip
        if dtype == torch.float32:
            for channels, features, side in POINTWISE_LAYERS[:: 5 if quick else 1]:
                for channels_last in (True, False):
                    yield POINTWISE, Conv(
                        batch, channels, (side, side), features, (1, 1), (1, 1), (0, 0, 0, 0),
                        (1, 1), 1, dtype, channels_last,
                    )  # fmt: skip


def rivals(kernels: str, conv: Conv) -> list[tuple[Callable[[], Any], Callable[[], Any]]]:
    """PyTorch's call and ours for each phase. Weights of inference are prepared beforehand."""
    generator = torch.Generator().manual_seed(0)
    format = memory_format(conv.rank, conv.channels_last)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(conv.dtype).contiguous(memory_format=format)

    x = normal(conv.batch, conv.channels, *conv.size)
    weight = normal(conv.features, conv.channels // conv.groups, *conv.kernel)
    padding, all_ours = conv.padding[: conv.rank], (True, kernels != IMAGE, True)
    plan = Plan(kernels, conv.stride, padding, conv.dilation, conv.groups, conv.channels_last, all_ours)

    def theirs() -> Tensor:
        rest = conv.dilation, False, [0] * conv.rank, conv.groups
        return torch.convolution(x, weight, None, conv.stride, padding, *rest)

    grad = theirs()
    if kernels == POINTWISE:

        def forward() -> Tensor:
            return pointwise_conv(x, weight, None, conv.channels_last)

    elif kernels == WINOGRAD:
        transformed = winograd_weight(weight, conv.groups, False, conv.stride[-1])
        rest = plan.sides, conv.features, conv.groups, 0, 0.0, conv.stride, conv.dilation, conv.kernel[-2:]

        def forward() -> Tensor:
            return winograd_conv(x, transformed, None, None, *rest)

    else:
        operator = image_conv if kernels == IMAGE else depthwise_conv

        def forward() -> Tensor:
            return operator(x, weight, None, conv.stride, padding, 0, 0.0)

    def both(*wanted: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
        return (
            lambda: _aten_gradients(grad, x, weight, plan, wanted),
            lambda: _gradients(grad, x, weight, plan, wanted),
        )

    return [(theirs, forward), both(True, False, False), both(False, True, False)]


def ratio(theirs: Callable[[], Any], ours: Callable[[], Any]) -> float:
    """Their time over ours: medians of calls in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    theirs()
    ours()
    end = time.perf_counter() + BUDGET
    while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < TURNS):
        for call, found in zip((theirs, ours), times, strict=True):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def settled_ratio(theirs: Callable[[], Any], ours: Callable[[], Any]) -> float:
    """:func:`ratio`, and where it is surprising the median of three: other processes disturb it."""
    found = [ratio(theirs, ours)]
    if not USUAL[0] <= found[0] <= USUAL[1]:
        found += [ratio(theirs, ours), ratio(theirs, ours)]
    return statistics.median(found)


@torch.no_grad()
def measure(
    dtypes: Sequence[str], quick: bool, tell: Callable[[str], None], kernels: str | None = None
) -> dict[str, list[list[float]]]:
    """The speed-ups, by kind, as a file has them."""
    found: dict[str, list[list[float]]] = {}
    for name in dtypes:
        for way, conv in problems(DTYPES[name], quick):
            if kernels is not None and way != kernels:
                continue
            ratios = [round(settled_ratio(*pair), 2) for pair in rivals(way, conv)]
            kind = conv_speeds.kind(way, conv)
            text = " ".join(map(str, (*kind[:2], "channels_last" if kind[2] else "contiguous", *kind[3:])))
            sizes = conv_speeds.sizes(conv)
            found.setdefault(text, []).append([*sizes, *ratios])
            said = ", ".join(f"{phase} {value:.2f}x" for phase, value in zip(PHASES, ratios, strict=True))
            tell(f"{text} {'x'.join(map(str, sizes))}: {said}")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="default: float32, bfloat16")
    parser.add_argument("--quick", action="store_true", help="a few shapes alone")
    parser.add_argument("--kernels", choices=list(WHY_NOT), help="these alone; the rest stays as it is")
    parser.add_argument("--out", type=Path, help="the file to write; default: the one that is read here")


def run(args: argparse.Namespace, cpu: str) -> int:
    """Measure and write; 1 if there is nothing to measure."""
    if cpu_library.module is None:
        print(f"pooling-ext tune: there are no compiled kernels: {cpu_library.why_not}")
        return 1
    reuse_cpu_memory()
    file = args.out or conv_speeds.user_file()
    content = conv_speeds.read(file)
    speedups = measure(args.dtype or ["float32", "bfloat16"], args.quick, print, args.kernels)
    if args.kernels is not None:
        speedups = content.get(cpu_library.module.isa, {}).get("speedups", {}) | speedups
    content[cpu_library.module.isa] = {
        "processor": cpu,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "speedups": speedups,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_name(f"{file.name}.{os.getpid()}")
    written.write_text(_as_text(content))
    written.replace(file)
    conv_speeds.forget()
    print(f"written to {file}")
    return 0


def _as_text(content: dict[str, Any]) -> str:
    """JSON with a line for each measurement."""
    text = json.dumps(content, indent=1, sort_keys=True)
    return "".join(_joined(text)) + "\n"


def _joined(text: str) -> Iterator[str]:
    """Lists of numbers on one line."""
    inside = False
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        if inside:
            yield stripped.replace(",", ", ") if not stripped.startswith("]") else stripped + "\n"
            inside = not stripped.startswith("]")
        elif stripped == "[":
            inside = True
            yield line.rstrip("\n")
        else:
            yield line
