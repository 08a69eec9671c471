"""Checks the library against PyTorch's operators in whatever PyTorch runs this script.

`make abi` runs it under another PyTorch than the one the library was built with, which is the
promise of the stable ABI. It needs neither pytest nor an installed package:

    PYTHONPATH=. python tests/packaging/abi_smoke.py              # the compiled kernels have to load
    POOLING_EXT_NO_NATIVE=1 python tests/packaging/abi_smoke.py --fallback
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

if __package__ in (None, ""):  # run as a script: import the checkout that it lies in
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
SHAPES = {1: (3, 5, 37), 2: (2, 19, 13, 37), 3: (2, 5, 7, 9, 11)}
#: How many roundings to the input's dtype PyTorch's own operators may add up, for the fallback.
ROUNDINGS = {"max_pool": 0, "avg_pool": 8, "lp_pool": 32}
LAYOUTS = ("contiguous", "channels_last", "strided")

MAX = {
    "stem": dict(kernel_size=3, stride=2, padding=1),
    "dilated": dict(kernel_size=2, stride=1, dilation=2),
    "ceil": dict(kernel_size=3, stride=2, ceil_mode=True),
}
AVERAGE = {
    "stem": dict(kernel_size=3, stride=2, padding=1),
    "ceil": dict(kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
}
LP = {
    "l2": dict(norm_type=2, kernel_size=3, stride=2),
    "l3-ceil": dict(norm_type=3, kernel_size=2, ceil_mode=True),
}
ADAPTIVE = {"adaptive": dict(output_size=3), "global": dict(output_size=1)}


def values(rank: int, dtype: torch.dtype, layout: str) -> Tensor | None:
    """Positive values without ties beyond what the dtype forces; None where the rank lacks the layout."""
    shape = SHAPES[rank]
    if layout == "channels_last" and rank == 1:
        return None
    generator = torch.Generator().manual_seed(rank)
    if layout == "strided":
        shape = (*shape[:-1], 2 * shape[-1])
    if dtype.is_floating_point:
        x = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.25
    else:
        x = torch.randint(0, 127, shape, generator=generator)
    x = x.to(dtype)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last if rank == 2 else torch.channels_last_3d)
    return x[..., ::2] if layout == "strided" else x


def cases() -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Yield ``(kind, name of the function, rank, arguments)``."""
    for rank in SHAPES:
        for kind, options in (("max_pool", MAX), ("avg_pool", AVERAGE), ("lp_pool", LP)):
            for arguments in options.values():
                yield kind, f"{kind}{rank}d", rank, arguments
        for kind, arguments in itertools.product(("max_pool", "avg_pool"), ADAPTIVE.values()):
            yield kind, f"adaptive_{kind}{rank}d", rank, arguments


def check(ours: Callable[..., Any], theirs: Callable[..., Any], x: Tensor, kind: str, native: bool) -> None:
    """Compare values, memory format, indices and gradients.

    The reference runs in float64: low precision is compared with the correctly rounded result, and
    integers too, which PyTorch does not pool everywhere.
    """
    tolerance = ROUNDINGS[kind] * torch.finfo(x.dtype).eps if x.is_floating_point() else 0
    same = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    wide = x.double()
    expected = theirs(wide)
    with torch.no_grad():
        actual = ours(x)
    same(actual, expected.to(x.dtype))
    if native:  # PyTorch's own 3-d average does not keep it
        assert suggest_memory_format(actual) == suggest_memory_format(x), "the memory format was not kept"
    if kind == "max_pool":
        output, indices = ours(x, return_indices=True)
        wide_output, wide_indices = theirs(wide, return_indices=True)
        same(output, wide_output.to(x.dtype))
        same(indices, wide_indices)
    if x.is_floating_point():
        # Small integers make the sums of a max pool's gradient exact in every dtype; one sign, so that
        # nothing cancels in the others'.
        grad = torch.randint(1, 5, expected.shape, generator=torch.Generator().manual_seed(0))
        leaf, wide_leaf = x.detach().requires_grad_(), wide.detach().requires_grad_()
        ours(leaf).backward(grad.to(x.dtype))
        theirs(wide_leaf).backward(grad.double())
        assert leaf.grad is not None and wide_leaf.grad is not None
        same(leaf.grad, wide_leaf.grad.to(x.dtype))


# --- fused operators -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Fused:
    """A fused operator beside what PyTorch's own make of the same tensors.

    Attributes:
        op: a function of :mod:`pooling_ext.functional`.
        theirs: takes the same arguments.
        batch_norm: whether weight, bias and running statistics are among them.
    """

    op: str
    theirs: Callable[..., Tensor]
    batch_norm: bool = True
    residual: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype, layout: str) -> dict[str, Tensor]:
        x = values(2, dtype, layout)
        assert x is not None
        tensors = {"input": x}
        if self.residual:
            tensors["residual"] = x.flip(0) - 1
        if self.batch_norm:
            # Batch norm of 16-bit activations has float32 parameters.
            parameters = dtype if dtype == torch.float64 else torch.float32
            ramp = torch.linspace(-1, 1, x.shape[1], dtype=parameters)
            tensors |= {"weight": ramp + 0.1, "bias": ramp / 3}
            tensors |= {"running_mean": ramp / 2, "running_var": ramp**2 + 1}
        return tensors


def batch_norm_relu(
    input: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    training: bool, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training)
    return F.relu(output if residual is None else output + residual)


FUSED = (
    Fused("batch_norm_act", batch_norm_relu, options=dict(training=True)),
    Fused("batch_norm_act", batch_norm_relu, options=dict(training=False)),
    Fused("batch_norm_act", batch_norm_relu, residual=True, options=dict(training=True)),
    Fused("batch_norm_act", batch_norm_relu, residual=True, options=dict(training=False)),
    *(
        Fused(
            "batch_norm_relu_max_pool",
            lambda **tensors: F.max_pool2d(batch_norm_relu(**tensors), 3, 2, 1),
            options=dict(training=training),
        )
        for training in (True, False)
    ),
    Fused(
        "add_relu_global_avg_pool",
        lambda input, residual: F.relu(input + residual).mean((-2, -1), keepdim=True),
        batch_norm=False,
        residual=True,
    ),
)


#: Of a whole tensor's size, by the dtype of the activations.
NEAR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str, slack: float = 1) -> None:
    """Errors of sums grow with their terms, so the whole tensors are compared."""
    off = float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    assert off <= slack * NEAR[dtype], f"{what} is off by {off:.2g} of its size"


def check_fused(case: Fused, ours: Callable[..., Tensor], dtype: torch.dtype, layout: str) -> None:
    """Compare the output, without gradients and with them, the gradients and the running statistics."""
    tensors = case.tensors(dtype, layout)
    with torch.no_grad():
        alone = ours(**{name: tensor.clone() for name, tensor in tensors.items()}, **case.options)
    results = []
    for call, wide in ((ours, False), (case.theirs, True)):
        mine = {name: (x.double() if wide else x).clone() for name, x in tensors.items()}
        leaves = {name: x.requires_grad_() for name, x in mine.items() if not name.startswith("running_")}
        output = call(**mine, **case.options)
        grads = torch.autograd.grad(output.sum() + output.square().sum(), list(leaves.values()))
        found = {"output": output.detach()} | {name: x for name, x in mine.items() if name not in leaves}
        found |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
        results.append(found)
    near(alone, results[1]["output"], dtype, "the output without gradients")
    for name, expected in results[1].items():
        # Rounding to 16 bits makes ties of which the first wins, so some gradients go elsewhere.
        moves = case.op == "batch_norm_relu_max_pool" and name == "gradient of input" and dtype.itemsize == 2
        near(results[0][name], expected, dtype, name, 10 if moves else 1)


def check_conv_bn_act(functional: Any, dtype: torch.dtype, layout: str) -> None:
    """In evaluation, where batch norm is folded, and in training."""
    x = values(2, dtype, layout)
    assert x is not None
    torch.manual_seed(0)
    conv, bn = torch.nn.Conv2d(x.shape[1], 24, 3, padding=1, bias=False), torch.nn.BatchNorm2d(24)
    with torch.no_grad():
        for parameter in bn.parameters():
            parameter.uniform_(0.5, 1.5)
    conv, bn = conv.to(dtype), bn.to(dtype if dtype == torch.float64 else torch.float32)
    wide_conv, wide_bn = (copy.deepcopy(module).double() for module in (conv, bn))
    from pooling_ext.ops.conv_bn_act.implementations import from_size

    for training in (False, True):
        with torch.no_grad(), from_size(0, fold_ratio=0):
            output = functional.conv_bn_act(conv, bn.train(training), x)
            expected = F.relu(wide_bn.train(training)(wide_conv(x.double())))
            near(output, expected, dtype, f"conv_bn_act, {training=}")
    near(bn.running_var, wide_bn.running_var, dtype, "running_var")


#: Channels, features and groups of what Winograd's kernels do, of a depthwise convolution, and of images.
CONVOLUTIONS = ((48, 64, 1), (40, 40, 40), (3, 32, 1))


def check_conv2d(functional: Any, dtype: torch.dtype, layout: str) -> None:
    """Without gradients, where weights are kept, and both gradients."""
    for channels, features, groups in CONVOLUTIONS:
        torch.manual_seed(0)
        format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        x = torch.randn(2, channels, 18, 17).to(dtype).contiguous(memory_format=format)
        weight, bias = torch.randn(features, channels // groups, 3, 3) / 8, torch.randn(features)
        given = x, weight.to(dtype), bias.to(dtype)
        with torch.no_grad():
            alone = functional.conv2d(*given, padding=1, groups=groups)
        results = []
        for function, wide in ((functional.conv2d, False), (F.conv2d, True)):
            leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in given]
            output = function(*leaves, padding=1, groups=groups)
            results.append([output.detach(), *torch.autograd.grad(output.square().sum(), leaves)])
        near(alone, results[1][0], dtype, "conv2d without gradients")
        for name, actual, expected in zip(("output", "input", "weight", "bias"), *results, strict=True):
            near(actual, expected, dtype, f"conv2d, {name}")


def release(version: str) -> str:
    """``"2.13.0+cpu"`` to ``"2.13.0"``."""
    return version.partition("+")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fallback", action="store_true", help="expect that the kernels are missing")
    parser.add_argument("--built-here", action="store_true", help="the PyTorch may be that of the build")
    options = parser.parse_args()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import pooling_ext
        import pooling_ext.functional
        from pooling_ext.backends import cpu_library, cuda_library
    told_cuda = ""
    told = [w for w in caught if issubclass(w.category, pooling_ext.NativeUnavailableWarning)]

    if options.fallback:
        assert cpu_library.module is None, "the compiled kernels loaded although none were expected"
        assert len(told) == 1, f"expected one NativeUnavailableWarning, but got {len(told)}"
        built, backend, dtypes = None, "aten", (torch.float32, torch.float64)  # PyTorch pools no other in 3-d
    else:
        assert cpu_library.module is not None, f"the compiled kernels did not load: {cpu_library.why_not}"
        assert not told, f"unexpected warning: {told[0].message}"
        built = cpu_library.module.build_torch
        assert options.built_here or release(built) != release(torch.__version__), (
            f"built with {built}: run it under another PyTorch"
        )
        backend, dtypes = "cpu", FLOATS + INTEGERS
        # The GPU's library, where there is one, has to load too; nothing here runs on a GPU.
        if find_spec("pooling_ext._cuda") is not None:
            assert cuda_library.why_not() is None, cuda_library.why_not()
            told_cuda = f", CUDA kernels for {', '.join(cuda_library.architectures())}"

    native = not options.fallback
    checked = check_pools(pooling_ext, backend, dtypes, native) + check_all_fused(
        pooling_ext, backend, dtypes
    )
    library = f"library built with {built}{told_cuda}" if built else "without the library"
    print(f"PyTorch {torch.__version__}, {library}: {checked} cases agree with PyTorch")
    return 0


def check_pools(pooling_ext, backend: str, dtypes: Sequence[torch.dtype], native: bool) -> int:
    """Compare every pool with PyTorch's, and return how many calls that were."""
    checked = 0
    for (kind, name, rank, arguments), dtype, layout in itertools.product(cases(), dtypes, LAYOUTS):
        x = values(rank, dtype, layout)
        if x is None or (kind != "max_pool" and dtype in INTEGERS):
            continue
        ours = partial(getattr(pooling_ext.functional, name), **arguments)
        theirs = partial(getattr(F, name), **arguments)
        try:
            took = pooling_ext.explain(ours, x)
            assert took.backend == backend, f"expected backend {backend!r}, but got: {took}"
            check(ours, theirs, x, kind, native)
        except Exception as error:
            print(f"{name}({arguments}) of {dtype}, {layout}, failed", file=sys.stderr)
            raise error
        checked += 1
    return checked


def check_all_fused(pooling_ext, backend: str, dtypes: Sequence[torch.dtype]) -> int:
    """As :func:`check_pools` for the fused operators and convolutions."""
    checked = 0
    for case, dtype, layout in itertools.product((*FUSED, None), dtypes, ("contiguous", "channels_last")):
        if dtype in INTEGERS:
            continue
        try:
            if case is None:
                check_conv_bn_act(pooling_ext.functional, dtype, layout)
                check_conv2d(pooling_ext.functional, dtype, layout)
            else:
                ours = getattr(pooling_ext.functional, case.op)
                took = pooling_ext.explain(ours, **case.tensors(dtype, layout), **case.options)
                assert took.backend == backend, f"expected backend {backend!r}, but got: {took}"
                check_fused(case, ours, dtype, layout)
        except Exception as error:
            name = f"{case.op}({case.options})" if case else "conv_bn_act or conv2d"
            print(f"{name} of {dtype}, {layout}, failed", file=sys.stderr)
            raise error
        checked += 1
    return checked


if __name__ == "__main__":
    sys.exit(main())
