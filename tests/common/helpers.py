"""What several test files share."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor
from torch._prims_common import suggest_memory_format

import pooling_ext.functional as F
from pooling_ext.backends import cpu_library
from pooling_ext.testing.opspec import FLOATS, INTEGERS, LAYOUTS, with_layout  # noqa: F401 for the tests
from pooling_ext.testing.reference import axis_positions
from pooling_ext.windows import Windows, fixed_windows

_ON_GPU = [pytest.param(f"{name}-cuda", marks=pytest.mark.gpu) for name in ("cuda", "triton")]
#: Parametrizes a test with the backends; "cuda" and "triton" are what stands in for a GPU on the CPU.
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "cuda", "triton", *_ON_GPU], indirect=True)
#: The same for what PyTorch's operators do too where there are no compiled kernels ("default").
POOLING_BACKENDS = pytest.mark.parametrize("backend", ["default", "cuda", "triton", *_ON_GPU], indirect=True)


def on_gpus(*others: str) -> pytest.MarkDecorator:
    """Parametrizes a test with the backends of a GPU, on one, and with ``others``."""
    return pytest.mark.parametrize("backend", [*others, *_ON_GPU], indirect=True)


COMMON = Path(__file__).parent
ROOT = COMMON.parents[1]
RANKS = (1, 2, 3)
NATIVE = cpu_library.module is not None
NO_NATIVE = os.environ.get("POOLING_EXT_NO_NATIVE", "0") not in ("", "0")


def require_native() -> None:
    """Fail where the compiled kernels are missing, or skip if that is on purpose."""
    if NATIVE:
        return
    if NO_NATIVE:
        pytest.skip("needs the compiled kernels, and POOLING_EXT_NO_NATIVE is set")
    pytest.fail(f"needs the compiled kernels, but {cpu_library.why_not}", pytrace=False)


def dtype_id(value: Any) -> str | None:
    """A readable test id for a dtype; None leaves the choice to pytest."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def sweep(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test with ``backend`` and every combination of ``axes``.

    The interpreter is slow, so it takes two combinations of each value of the longest axis, which meet
    every value of the others.
    """
    every = list(product(*axes.values()))
    longest = max(map(len, axes.values()))
    few = [
        tuple(values[(i + i // longest * j) % len(values)] for j, values in enumerate(axes.values()))
        for i in range(2 * longest)
    ]
    cases = [
        pytest.param(backend, *case, id="-".join([backend, *map(case_id, case)]), marks=marks)
        for backend, marks, cases in (
            ("default", (), every),
            ("cuda", (), every),
            ("triton", (), [case for i, case in enumerate(few) if case not in few[:i]]),
            ("cuda-cuda", pytest.mark.gpu, every),
            ("triton-cuda", pytest.mark.gpu, every),
        )
        for case in cases
    ]
    return pytest.mark.parametrize(("backend", *axes), cases, indirect=["backend"])


def case_id(value: Any) -> str:
    return str(value).removeprefix("torch.")


def interpreted(backend: str) -> bool:
    """Whether kernels are interpreted, a few thousand elements in a second: inputs should be small."""
    return backend == "triton"


def shape_of(backend: str, rank: int) -> tuple[int, ...]:
    """Enough channels and columns to reach the CPU kernels' vector loops and their tails; Triton masks."""
    if interpreted(backend):
        return (2, 5, *{1: (19,), 2: (4, 11), 3: (3, 3, 5)}[rank])
    return (2, 37, *{1: (75,), 2: (5, 38), 3: (3, 4, 21)}[rank])


def here(x: Tensor) -> Tensor:
    """``x`` where new tensors are made."""
    return x.to(torch.get_default_device())


def torch_op(name: str) -> Callable[..., Any]:
    """PyTorch's function that ours of the same name replaces."""
    return getattr(TF, name)


def our_op(name: str) -> Callable[..., Any]:
    return getattr(F, name)


def integers(shape: Sequence[int], dtype: torch.dtype, low: int = -8, high: int = 8) -> Tensor:
    """Small whole numbers, so that sums are exact in every dtype."""
    if dtype == torch.uint8:
        low, high = 0, high - low
    return torch.randint(low, high + 1, tuple(shape)).to(dtype)


def in_format_of(x: Tensor, output: Tensor) -> Tensor:
    """A tensor of ``output``'s shape in ``x``'s memory format, as the pooling operators keep it."""
    return output.to(memory_format=suggest_memory_format(x))


def strides(x: Tensor) -> list[int]:
    """The strides that mean something: those of dimensions with more than one element."""
    return (
        [] if x.numel() == 0 else [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    )


def assert_same(actual: Any, expected: Any, what: str = "", check_strides: bool = True) -> None:
    """Values (NaN is NaN), dtype, shape and, unless told otherwise, strides are the same."""
    assert type(actual) is type(expected), f"{what}: {type(actual)} is not {type(expected)}"
    if isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected), what
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, what, check_strides)
        return
    message = (lambda text: f"{what}: {text}") if what else None
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=message)
    if check_strides:
        assert strides(actual) == strides(expected), (
            f"{what}: strides {actual.stride()}, not {expected.stride()}"
        )


def gradient(
    function: Callable[[Tensor], Any], x: Tensor, grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The output of ``function`` at ``x`` and the gradient of ``x`` (for a gradient of ones by default)."""
    leaf = x.detach().requires_grad_()
    output = function(leaf)
    first = output[0] if isinstance(output, tuple) else output
    grad = torch.ones_like(first) if grad is None else grad
    (result,) = torch.autograd.grad(first, leaf, grad)
    return first.detach(), result


def run_python(code: str, timeout: int = 300, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter, which finds this folder's modules and the checkout.

    None removes a variable from its environment.
    """
    path = os.pathsep.join([str(COMMON), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = {name: value for name, value in environment.items() if value is not None}
    # Threads that wait sleep: other processes of the suite want the cores.
    env = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE", **given}
    for name, value in environment.items():
        if value is None:
            env.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def windows_of(name: str, x: Tensor, *args: Any, **kwargs: Any) -> Windows:
    """The windows of a call of ours; ``name`` is a function of fixed windows."""
    if name.startswith("lp_"):
        kwargs.setdefault("norm_type", 2)
    call = inspect.signature(our_op(name)).bind(x, *args, **kwargs)
    call.apply_defaults()
    options = call.arguments
    return fixed_windows(
        int(name[-2]),
        x.shape,
        options["kernel_size"],
        options["stride"],
        options["padding"],
        options.get("dilation", 1),
        options["ceil_mode"],
    )


def has_empty_window(name: str, x: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether a window has no element in range, where PyTorch's max-pool backward writes out of bounds."""
    if "adaptive" in name:
        return False
    windows, sizes = windows_of(name, x, *args, **kwargs), x.shape[-int(name[-2]) :]
    return any(
        not axis_positions(windows, axis, size, out)
        for axis, size in enumerate(sizes)
        for out in range(windows.output_size[axis])
    )
