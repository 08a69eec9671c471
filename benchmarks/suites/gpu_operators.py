"""Operators on a GPU: their results against PyTorch's in float64, and their times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pooling_ext import backends
from pooling_ext.backends import explain, use_backend
from pooling_ext.testing.launches import BACKWARD, FORWARD, TRAINING, LaunchCase

from ..harness.gpu_timing import measure
from ..harness.suite import DTYPES, LAYOUTS
from ..reports.gpu_report import COMPILED, EAGER, OURS, STEP, Entry, Run

#: Images on which results are compared with eager's in float64, and the error, relative to the result, that
#: needs no comparison with eager's.
CHECKED, ALLOWED = 4, {"float32": 1e-4, "bfloat16": 2e-2}
#: The largest error otherwise, relative to eager's own: its stem's gradient in bfloat16 is off by 4%, since a
#: rounding makes other elements win.
SLACK = 1.5


def theirs_of(case: LaunchCase) -> Callable[..., Tensor]:
    """What a PyTorch user writes for ``case``: a function of its tensors and ``kwargs_of``."""

    def batch_norm(
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None = None,
        training: bool = False,
    ) -> Tensor:
        output = F.batch_norm(input, running_mean, running_var, weight, bias, training)
        return F.relu_(output if residual is None else output.add_(residual))

    def add_relu_pool(input: Tensor, residual: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(F.relu_(input + residual), 1)

    return {
        "batch_norm_act": batch_norm,
        "batch_norm_relu_max_pool": lambda **kwargs: F.max_pool2d(batch_norm(**kwargs), 3, 2, 1),
        "add_relu_global_avg_pool": add_relu_pool,
        "global_avg_pool2d": lambda input: F.adaptive_avg_pool2d(input, 1),
    }.get(case.op) or getattr(F, case.op)


def can_run(case: LaunchCase, backend: str, tensors: dict[str, Tensor]) -> bool:
    if backend not in [known.name for known in backends.BACKENDS]:
        return False
    with use_backend(backend):
        found = explain(case.run(FORWARD, tensors))
    return {decision.backend for decision in found.decisions} == {backend}


def step(
    call: Callable[..., Tensor], tensors: dict[str, Tensor], grad: Tensor | None, **kwargs: Any
) -> tuple[Tensor, ...]:
    """The output in training and the gradients of what has them, given the output's (by default ones)."""
    leaves = {
        name: tensor.detach().requires_grad_(not name.startswith("running_"))
        for name, tensor in tensors.items()
    }
    output = call(**leaves, **kwargs)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    grad = torch.ones_like(output) if grad is None else grad
    return output.detach(), *torch.autograd.grad(output, wanted, grad)


def errors(case: LaunchCase, tensors: dict[str, Tensor], call: Callable[..., Tensor]) -> dict[str, float]:
    """How far output and gradients of ``call`` are from PyTorch's in float64, relative to their size."""
    kwargs = case.kwargs_of(TRAINING)
    exact = step(theirs_of(case), {name: x.double() for name, x in tensors.items()}, None, **kwargs)
    found = step(call, {name: x.clone() for name, x in tensors.items()}, None, **kwargs)
    names = ("output", *(name for name in tensors if not name.startswith("running_")))
    return {
        name: float((mine.double() - right).norm() / right.norm().clamp_min(1e-30))
        for name, mine, right in zip(names, found, exact, strict=True)
    }


def check(case: LaunchCase, tensors: dict[str, Tensor], allowed: float) -> dict[str, float]:
    """The errors of ours.

    Raises:
        AssertionError: one is above ``allowed`` and above SLACK times eager's own.
    """
    ours = errors(case, tensors, case.function)
    eager: dict[str, float] = {}
    for name, off in ours.items():
        if off <= allowed:
            continue
        eager = eager or errors(case, tensors, theirs_of(case))
        if not off <= SLACK * eager[name]:
            raise AssertionError(
                f"{case}: {name} is off by {off:.2g} of its size, eager's by {eager[name]:.2g}"
            )
    return ours


def measure_operator(
    found: Run,
    case: LaunchCase,
    dtype: str,
    layout: str,
    batch: int,
    budget: float,
    device: str,
    compiled: bool,
    wanted: Sequence[str] = OURS,
) -> None:
    """Check ours at a few images, then time all rivals at ``batch``: forward and backward as one call.

    Args:
        budget: seconds for each rival.
        compiled: whether torch.compile is one.
        wanted: our backends; those of them that take the call are timed.
    """
    make = partial(case.tensors, dtype=DTYPES[dtype], format=LAYOUTS[layout], device=device)
    ours = [name for name in wanted if can_run(case, name, make(2))]
    if not ours:
        raise RuntimeError(f"no backend of ours takes {case} in {dtype} on {device}")
    few = make(CHECKED)
    for backend in ours:
        with use_backend(backend):
            check(case, few, ALLOWED[dtype])
    kwargs, tensors = case.kwargs_of(TRAINING), make(batch)
    output = case.run(FORWARD, tensors)()
    # Made once: to fill it would be a tenth of the time of what is to be measured.
    grad = torch.randn_like(output)
    rivals: dict[str, Callable[[], Any]] = {EAGER: partial(step, theirs_of(case), tensors, grad, **kwargs)}
    compile_s: dict[str, float] = {}
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(theirs_of(case), dynamic=False)
        rivals[COMPILED] = partial(step, call, tensors, grad, **kwargs)
        compile_s[COMPILED] = first_call(rivals[COMPILED])
    for backend in ours:
        rivals[backend] = partial(_with, backend, partial(step, case.function, tensors, grad, **kwargs))
    least = sum(int(case.least(phase, tensors, output)) for phase in (TRAINING, BACKWARD))
    with use_backend(ours[0]):
        timings = measure(rivals, budget * len(rivals), device, capture=True)
    for rival, (time, captured) in timings.items():
        entry = Entry(f"{case} {STEP}", dtype, layout, batch, rival, time.ms, time.spread, least,
                      compile_s.get(rival), captured)  # fmt: skip
        found.entries.append(entry)


def _with(backend: str, call: Callable[[], Any]) -> Any:
    if backends.forced() != backend:  # to force it costs as much as a small operator
        backends.REGISTRY.force(backend)
    return call()


def first_call(call: Callable[[], Any]) -> float:
    """Seconds of the first call of what compiles itself."""
    start = perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return round(perf_counter() - start, 1)
