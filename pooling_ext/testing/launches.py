"""The GPU operators at ResNet-50's shapes: what to compile ahead of time, and whose traffic to count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import pooling_ext.functional as F

from ..backends import REGISTRY, use_backend
from ..backends.triton_library import Kernel
from ..triton.launching import Launch, watched

FORWARD, TRAINING, BACKWARD = "forward", "training forward", "backward"
PHASES = (FORWARD, TRAINING, BACKWARD)

#: Bytes over those of the input, given (bytes of the output, of its offsets) over the same.
Minimum = Callable[[float, float], float]


@dataclass(frozen=True)
class LaunchCase:
    """One operator at one shape, in each phase that it has.

    Attributes:
        name: unique, in kebab case.
        op: a function of :mod:`pooling_ext.functional`.
        shape: the input's, without the batch.
        minimum: for each phase the bytes that must be read and written, in multiples of the input's.
        residual: whether there is one, of the input's shape.
        kwargs: the function's other arguments.
    """

    name: str
    op: str
    shape: tuple[int, int, int]
    minimum: dict[str, Minimum]
    residual: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def batch(self) -> int:
        """Of the input with which traffic is counted: enough to be cut as a large one is."""
        return max(1, 2**27 // (self.shape[0] * self.shape[1] * self.shape[2]))

    def tensors(self, batch: int, dtype: torch.dtype, format: torch.memory_format, device: str) -> Tensors:
        """Random arguments; those of ``device="meta"`` have no values."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device)

        def activation() -> Tensor:
            return normal(batch, *self.shape).to(dtype).contiguous(memory_format=format)

        tensors = {"input": activation()}
        if self.residual:
            tensors["residual"] = activation()
        if self.op.startswith("batch_norm"):
            channels = self.shape[0]
            tensors |= {"weight": normal(channels), "bias": normal(channels)}
            tensors |= {"running_mean": normal(channels), "running_var": normal(channels) ** 2 + 1}
        return tensors

    @property
    def function(self) -> Callable[..., Tensor]:
        """Ours, of named tensors and :meth:`kwargs_of`."""
        return getattr(F, self.op)

    def kwargs_of(self, phase: str) -> dict[str, Any]:
        """The arguments that are no tensors."""
        norm = self.op.startswith("batch_norm")
        return self.kwargs | ({"training": phase != FORWARD} if norm else {})

    def run(self, phase: str, tensors: Tensors) -> Callable[[], Any]:
        """The call of ``phase``, with what goes before it done."""
        function, kwargs = self.function, self.kwargs_of(phase)
        if phase == FORWARD:
            return torch.no_grad()(lambda: function(**tensors, **kwargs))
        leaves = {
            name: tensor.detach().requires_grad_(not name.startswith("running_"))
            for name, tensor in tensors.items()
        }
        if phase == TRAINING:
            return lambda: function(**leaves, **kwargs)
        output = function(**leaves, **kwargs)
        grad = torch.ones_like(output)
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        return lambda: torch.autograd.grad(output, wanted, grad)

    def least(self, phase: str, tensors: Tensors, output: Tensor) -> float:
        """The bytes that must be read and written, as in :attr:`minimum`."""
        nbytes = tensors["input"].nbytes
        return nbytes * self.minimum[phase](output.nbytes / nbytes, output.numel() / nbytes)

    def __str__(self) -> str:
        return self.name


Tensors = dict[str, Tensor]

_MAX: dict[str, Minimum] = {
    FORWARD: lambda y, offsets: 1 + y,
    TRAINING: lambda y, offsets: 1 + y + offsets,
    BACKWARD: lambda y, offsets: 1 + y + offsets,
}
_AVERAGE: dict[str, Minimum] = dict.fromkeys(PHASES, lambda y, offsets: 1 + y)
# The statistics read the input once more; backward reads gradient and input for the sums, then both again.
_NORM: dict[str, Minimum] = {
    FORWARD: lambda y, offsets: 2,
    TRAINING: lambda y, offsets: 3,
    BACKWARD: lambda y, offsets: 5,
}
# The sums read ReLU's output too, or the residual, and write the residual's gradient. (CUDA's read a mask of
# the output in its place: tests/gpu/test_cuda_mask.py.)
_NORM_ADD: dict[str, Minimum] = {
    FORWARD: lambda y, offsets: 3,
    TRAINING: lambda y, offsets: 4,
    BACKWARD: lambda y, offsets: 7,
}
# The sums need only the elements that won, which are kept for them, and their gradient.
_STEM: dict[str, Minimum] = {
    FORWARD: lambda y, offsets: 1 + y,
    TRAINING: lambda y, offsets: 2 + 2 * y + offsets,
    BACKWARD: lambda y, offsets: 2 * y + (2 + y + offsets),
}
_TAIL: dict[str, Minimum] = {
    FORWARD: lambda y, offsets: 2 + y,
    TRAINING: lambda y, offsets: 2 + y,
    BACKWARD: lambda y, offsets: 3 + y,
}

_NORM_SHAPES = ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7))
_NORM_ADD_SHAPES = ((256, 56), (512, 28), (1024, 14), (2048, 7))

CASES: tuple[LaunchCase, ...] = (
    LaunchCase(
        "max-3x3-s2",
        "max_pool2d",
        (64, 112, 112),
        _MAX,
        kwargs={"kernel_size": 3, "stride": 2, "padding": 1},
    ),
    LaunchCase("max-2x2-s2", "max_pool2d", (64, 112, 112), _MAX, kwargs={"kernel_size": 2}),
    LaunchCase(
        "max-3x3-s1",
        "max_pool2d",
        (192, 28, 28),
        _MAX,
        kwargs={"kernel_size": 3, "stride": 1, "padding": 1},
    ),
    LaunchCase(
        "avg-3x3-s2",
        "avg_pool2d",
        (64, 112, 112),
        _AVERAGE,
        kwargs={"kernel_size": 3, "stride": 2, "padding": 1},
    ),
    LaunchCase("avg-2x2-s2", "avg_pool2d", (128, 56, 56), _AVERAGE, kwargs={"kernel_size": 2}),
    LaunchCase("global-avg", "global_avg_pool2d", (2048, 7, 7), _AVERAGE),
    LaunchCase("stem", "batch_norm_relu_max_pool", (64, 112, 112), _STEM),
    LaunchCase("tail", "add_relu_global_avg_pool", (2048, 7, 7), _TAIL, residual=True),
    *(LaunchCase(f"bn-relu-{c}-{n}", "batch_norm_act", (c, n, n), _NORM) for c, n in _NORM_SHAPES),
    *(
        LaunchCase(f"bn-add-relu-{c}-{n}", "batch_norm_act", (c, n, n), _NORM_ADD, residual=True)
        for c, n in _NORM_ADD_SHAPES
    ),
)

#: Batch norms with other activations than ReLU, for which kernels are compiled anew.
ACTIVATION_CASES: tuple[LaunchCase, ...] = (
    *(
        LaunchCase(f"bn-{name}-256-14", "batch_norm_act", (256, 14, 14), _NORM, kwargs={"activation": name})
        for name in ("silu", "gelu")
    ),
    *(
        LaunchCase(
            f"bn-add-{name}-512-28",
            "batch_norm_act",
            (512, 28, 28),
            _NORM_ADD,
            residual=True,
            kwargs={"activation": name},
        )
        for name in ("hardswish", "leaky_relu")
    ),
)


@contextmanager
def recorded_on_meta() -> Iterator[list[Launch]]:
    """Collect the launches that calls with meta tensors would make: nothing is run or allocated."""
    launches: list[Launch] = []

    def record(launch: Launch) -> bool:
        launches.append(launch)
        return True

    library = torch.library.Library("pooling_ext", "IMPL")
    try:
        for op in REGISTRY.operators.values():
            for name in op.kernels.get("triton", ()):
                library.impl(name, Kernel(op.triton_module, name), "Meta", allow_override=True)
        with use_backend("triton"), watched(record):
            yield launches
    finally:
        library._destroy()


@dataclass(frozen=True)
class ConvCase:
    """A convolution of ResNet-50 with what is fused into it: ``channels`` of ``size`` pixels a side in."""

    name: str
    channels: int
    features: int
    size: int
    kernel: int
    stride: int = 1

    def run(self, batch: int, dtype: torch.dtype, device: str) -> None:
        """Inference with a residual, training behind a batch norm, gradients of that and of the weights."""
        ops = torch.ops.pooling_ext

        def activation(channels: int, size: int) -> Tensor:
            x = torch.randn(batch, channels, size, size, device=device).to(dtype)
            return x.contiguous(memory_format=torch.channels_last)

        window = [self.stride] * 2, [self.kernel // 2] * 2, [1, 1]
        input = activation(self.channels, self.size)
        output = activation(self.features, self.size // self.stride)
        weight = torch.randn(self.features, self.channels, self.kernel, self.kernel, device=device).to(dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        norm = torch.rand(2, self.channels, device=device, dtype=torch.float64) + 1
        scale = torch.randn(self.channels, device=device), torch.randn(self.channels, device=device)
        bias = torch.randn(self.features, device=device).to(dtype)
        ops.conv_bias_act(input, weight, bias, output, *window, True)
        ops.conv_stats(input, weight, None, norm, *scale, 1e-5, True, *window)
        ops.conv_input_grad(output, weight, input.shape, input, norm, *scale, 1e-5, True, *window)
        ops.conv_weight_grad(output, input, weight.shape, norm, *scale, 1e-5, True, *window)

    def __str__(self) -> str:
        return self.name


CONVOLUTIONS: tuple[ConvCase, ...] = (
    ConvCase("conv-1x1-64-256-56", 64, 256, 56, 1),
    ConvCase("conv-1x1-256-64-56", 256, 64, 56, 1),
    ConvCase("conv-1x1-1024-512-14", 1024, 512, 14, 1),
    ConvCase("conv-1x1-256-512-56-s2", 256, 512, 56, 1, 2),
    ConvCase("conv-3x3-64-56", 64, 64, 56, 3),
    ConvCase("conv-3x3-128-56-s2", 128, 128, 56, 3, 2),
    ConvCase("conv-3x3-512-7", 512, 512, 7, 3),
)
