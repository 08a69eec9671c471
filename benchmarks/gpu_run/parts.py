"""What a step's process does for one item: generators of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from pooling_ext import backends
from pooling_ext.backends import autotune, cuda_library
from pooling_ext.ops import conv_autotune, cudnn_frontend
from pooling_ext.testing.launches import (
    ACTIVATION_CASES,
    CASES,
    CONVOLUTIONS,
    PHASES,
    ConvCase,
    LaunchCase,
)

from ..harness.suite import DTYPES, LAYOUTS
from ..reports.gpu_report import COMPILED, Run
from ..suites import gpu, gpu_models, gpu_operators

Result = dict[str, Any]
Part = Callable[[str], Iterator[Result]]

#: Images of the operators, and of a dry run.
BATCH, TINY_BATCH = 256, 2
#: Seconds for each rival.
BUDGET, MODEL_BUDGET, TINY_BUDGET = 0.04, 1.0, 1e-3
ALL_CASES = {case.name: case for case in CASES + ACTIVATION_CASES}


def make(part: str, device: str, tiny: bool) -> Part:
    """The function that does the items of ``part``."""
    if device == "cuda":
        torch.backends.cudnn.benchmark = True  # eager at its best
    elif part.startswith("models"):
        gpu_models.SIZE = 64
    torch.set_default_device(device)
    return partial(_PARTS[part.partition(":")[0]], part.partition(":")[2], device, tiny)


def _facts(_: str, device: str, tiny: bool, item: str) -> Iterator[Result]:
    yield {
        "facts": gpu.facts(device)
        | {"cuda_kernels": cuda_library.why_not() or ", ".join(cuda_library.architectures())}
    }


def _case(item: str, tiny: bool) -> tuple[LaunchCase, str, str]:
    name, dtype, layout = item.split()
    case = ALL_CASES[name]
    if tiny:
        case = replace(case, shape=(8, *(min(side, 12) for side in case.shape[1:])))
    return case, dtype, layout


def _smoke(backend: str, device: str, tiny: bool, item: str) -> Iterator[Result]:
    """Every phase of an operator, its results held to PyTorch's in float64; or a convolution's tiles."""
    if item.startswith("conv"):
        yield from _smoke_convolution(backend, device, tiny, item)
        return
    case, dtype, layout = _case(item, tiny)
    tensors = case.tensors(TINY_BATCH, DTYPES[dtype], LAYOUTS[layout], device)
    with backends.use_backend(backend):
        if not gpu_operators.can_run(case, backend, tensors):
            raise RuntimeError(
                f"{backend} does not take it: {cuda_library.why_not() if backend == 'cuda' else ''}"
            )
        for phase in PHASES:
            case.run(phase, tensors)()
        yield {"errors": gpu_operators.check(case, tensors, gpu_operators.ALLOWED[dtype])}


def _smoke_convolution(backend: str, device: str, tiny: bool, item: str) -> Iterator[Result]:
    """Every candidate of ``backend`` to do a convolution, against cuDNN's."""
    name, dtype = item.split()
    args = _conv_arguments(_conv_case(name), DTYPES[dtype], 1 if tiny else 8, device, tiny)
    with backends.use_backend(backend):
        for what, candidates, arguments in args:
            offered = candidates(*arguments)
            reference = next(iter(offered.values()))(*arguments)
            ours = {label: candidate for label, candidate in offered.items() if label.startswith(backend)}
            if not ours:
                raise RuntimeError(f"no candidate of {backend} takes {what}")
            # A few of the tilings; each is a kernel to compile.
            for label in list(ours)[:: max(1, len(ours) // 3)]:
                if reason := autotune.difference(ours[label](*arguments), reference):
                    raise AssertionError(f"{what}, {label}: {reason}")
            yield {"what": what, "candidates": len(ours)}


def _conv_case(name: str) -> ConvCase:
    return next(case for case in CONVOLUTIONS if case.name == name)


def _conv_arguments(case: ConvCase, dtype: torch.dtype, batch: int, device: str, tiny: bool) -> list[tuple]:
    """For inference and for training: a name, what gives the candidates, and their arguments."""
    if tiny:
        case = replace(case, channels=32, features=32, size=min(case.size, 8))

    def tensor(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, device=device) / (shape[1] * shape[2] * shape[3]) ** 0.5 * 8
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    input = tensor(batch, case.channels, case.size, case.size)
    weight = tensor(case.features, case.channels, case.kernel, case.kernel)
    pads = case.kernel // 2
    geometry = conv_autotune.ConvParams((case.stride,) * 2, (pads, pads), (1, 1), 1)
    residual = torch.zeros_like(F.conv2d(input, weight, None, *geometry)).normal_()
    bias = torch.randn(case.features, device=device).to(dtype)
    return [
        ("inference", conv_autotune._bias_act_candidates, (input, weight, bias, residual, geometry, True)),
        ("training", conv_autotune._stats_candidates, (input, weight, None, geometry)),
    ]


def _compile(_: str, device: str, tiny: bool, item: str) -> Iterator[Result]:
    """Every candidate of a convolution once, so that what it compiles is on disk."""
    channels, features, kernel, stride, size = map(int, item.split())
    case = ConvCase(item, channels, features, size, kernel, stride)
    ran = 0
    for _what, candidates, args in _conv_arguments(
        case, torch.bfloat16, TINY_BATCH if tiny else BATCH, device, tiny
    ):
        offered = {label: partial(candidate, *args) for label, candidate in candidates(*args).items()}
        times, _failures = autotune.measure(offered, lambda candidate: float(candidate() is None))
        ran += len(times)
    yield {"candidates": ran}


def _frontend(_: str, device: str, tiny: bool, item: str) -> Iterator[Result]:
    """Whether cuDNN's graph API is there, and takes a convolution in this dtype."""
    yield cudnn_frontend.probe(getattr(torch, item), torch.device(device))


def _operators(wanted: str, device: str, tiny: bool, item: str) -> Iterator[Result]:
    case, dtype, layout = _case(item, tiny)
    found = Run({})
    batch, budget = (TINY_BATCH, TINY_BUDGET) if tiny else (BATCH, BUDGET)
    ours = wanted.split(",") if wanted else ("cuda", "triton")
    gpu_operators.measure_operator(found, case, dtype, layout, batch, budget, device, False, ours)
    for entry in found.entries:
        yield {"entry": asdict(entry)}


def _models(_: str, device: str, tiny: bool, item: str) -> Iterator[Result]:
    """``training 256``, with ``compiled`` or ``untuned`` behind."""
    task, number, *options = item.split()
    found = Run({})
    batch, budget = (2, TINY_BUDGET) if tiny else (int(number), MODEL_BUDGET)
    name = "resnet18" if tiny else "resnet50"
    measure = gpu_models.measure_training if task == "training" else gpu_models.measure_inference
    modes = [COMPILED] if "compiled" in options else []
    sweep = gpu_models.Sweep(found, "bfloat16", [batch], budget, device, modes)
    with gpu_models.untuned() if "untuned" in options else nullcontext():
        measure(sweep, name)
    for entry in found.entries:
        yield {"entry": asdict(entry)}


def _convolutions(_: str, device: str, tiny: bool, item: str) -> Iterator[Result]:
    """Milliseconds of cuDNN's candidate and of ours, and what is wrong with results."""
    batch = TINY_BATCH if tiny else BATCH
    for what, candidates, args in _conv_arguments(_conv_case(item), torch.bfloat16, batch, device, tiny):
        offered = {label: partial(candidate, *args) for label, candidate in candidates(*args).items()}
        # Of Triton's the three that are most often the fastest elsewhere: there is no time for more.
        triton = [label for label in offered if label.startswith("triton")][:3]
        offered = {
            k: candidate for k, candidate in offered.items() if not k.startswith("triton") or k in triton
        }
        if device == "cpu":
            offered = dict(list(offered.items())[:2])
        clock = partial(_milliseconds, device=device)
        times, failures = autotune.measure(offered, clock)
        reference = next(iter(offered.values()))()
        wrong = {label: autotune.difference(offered[label](), reference) for label in times}
        yield {
            "convolution": what,
            "ms": {label: round(ms, 4) for label, ms in times.items()},
            "wrong": {label: reason for label, reason in wrong.items() if reason},
            "failed": {label: str(error)[:200] for label, error in failures.items()},
        }


def _milliseconds(candidate: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        return autotune.milliseconds(candidate, torch.device("cuda", torch.cuda.current_device()))
    from ..harness.timing import measure

    return measure({"candidate": candidate}, TINY_BUDGET)["candidate"].ms


def _kernels(backend: str, device: str, tiny: bool, item: str) -> Iterator[Result]:
    """Each phase once, for a profiler to watch."""
    case, dtype, layout = _case(item, tiny)
    batch = TINY_BATCH if tiny else BATCH
    tensors = case.tensors(batch, DTYPES[dtype], LAYOUTS[layout], device)
    with backends.use_backend(backend):
        for phase in PHASES[1:]:
            case.run(phase, tensors)()
    yield {"phases": list(PHASES[1:])}


_PARTS: dict[str, Callable[[str, str, bool, str], Iterator[Result]]] = {
    "facts": _facts,
    "compile": _compile,
    "frontend": _frontend,
    "smoke": _smoke,
    "operators": _operators,
    "models": _models,
    "convolutions": _convolutions,
    "kernels": _kernels,
}
