"""The fused operators at the shapes of ResNet-50, and what a PyTorch user writes for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pooling_ext.functional as ours

from ..reports.results import FORWARD, STEP

#: An operator of named tensors.
Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class BlockCase:
    """One call of a fused operator.

    Attributes:
        name: unique, in kebab case.
        op: a function of :mod:`pooling_ext.functional`.
        shape: the input's.
        kwargs: what else decides the call; see :data:`MAKERS`.
        phases: what is measured.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    phases: tuple[str, ...] = (STEP,)

    def tensors(self) -> dict[str, Tensor]:
        """Random arguments with values that are exact in bfloat16, so that they serve every dtype."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16().float()

        found = {"input": normal(*self.shape)}
        if self.op == "conv_bn_act":
            stride = self.kwargs.get("stride", 1)
            batch, _, *sides = self.shape
            output = (batch, self.kwargs["channels"], *(side // stride for side in sides))
        else:
            output = self.shape
        if self.kwargs.get("residual", self.op == "add_relu_global_avg_pool"):
            found["residual"] = normal(*output)
        if self.op.startswith("batch_norm"):
            found |= {"weight": 1 + normal(self.shape[1]) / 8, "bias": normal(self.shape[1]) / 8}
        return found

    def rivals(self, dtype: torch.dtype, format: torch.memory_format) -> dict[str, Operator]:
        """PyTorch's and our operator of :meth:`tensors` in ``dtype``."""
        return dict(zip(("torch", "ours"), MAKERS[self.op](self, dtype, format), strict=True))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of the parameters and statistics that go with activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _running(case: BlockCase, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    channels, wide = case.shape[1], _wide(dtype)
    return torch.zeros(channels, dtype=wide), torch.ones(channels, dtype=wide)


def _batch_norm_act(case: BlockCase, dtype: torch.dtype, _: Any) -> tuple[Operator, Operator]:
    running = _running(case, dtype), _running(case, dtype)

    def theirs(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        output = F.batch_norm(input, *running[0], weight, bias, training=True)
        # As torchvision's models do it, in place.
        return F.relu_(output if residual is None else output.add_(residual))

    def fused(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return ours.batch_norm_act(input, *running[1], weight, bias, training=True, residual=residual)

    return theirs, fused


def _batch_norm_relu_max_pool(case: BlockCase, dtype: torch.dtype, _: Any) -> tuple[Operator, Operator]:
    running = _running(case, dtype), _running(case, dtype)

    def theirs(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        output = F.batch_norm(input, *running[0], weight, bias, training=True)
        return F.max_pool2d(F.relu_(output), 3, 2, 1)

    def fused(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ours.batch_norm_relu_max_pool(input, *running[1], weight, bias, training=True)

    return theirs, fused


def _add_relu_global_avg_pool(*_: Any) -> tuple[Operator, Operator]:
    def theirs(input: Tensor, residual: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(F.relu_(input + residual), 1)

    return theirs, ours.add_relu_global_avg_pool


def _conv_bn_act(
    case: BlockCase, dtype: torch.dtype, format: torch.memory_format
) -> tuple[Operator, Operator]:
    torch.manual_seed(0)
    channels, kernel, stride = (
        case.kwargs["channels"],
        case.kwargs["kernel_size"],
        case.kwargs.get("stride", 1),
    )
    conv = nn.Conv2d(case.shape[1], channels, kernel, stride, kernel // 2, bias=False).bfloat16().to(dtype)
    conv = conv.to(memory_format=format).eval()  # type: ignore[call-overload]
    bn = nn.BatchNorm2d(channels)
    nn.init.normal_(bn.running_mean, 0, 0.1)  # type: ignore[arg-type]
    nn.init.uniform_(bn.running_var, 0.2, 0.5)  # type: ignore[arg-type]
    bn = bn.to(_wide(dtype)).eval()

    def theirs(input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = bn(conv(input))
        return F.relu_(output if residual is None else output.add_(residual))

    def fused(input: Tensor, residual: Tensor | None = None) -> Tensor:
        return ours.conv_bn_act(conv, bn, input, residual)

    return theirs, fused


#: Operator -> what makes PyTorch's and ours.
MAKERS: dict[str, Callable[..., tuple[Operator, Operator]]] = {
    "batch_norm_act": _batch_norm_act,
    "batch_norm_relu_max_pool": _batch_norm_relu_max_pool,
    "add_relu_global_avg_pool": _add_relu_global_avg_pool,
    "conv_bn_act": _conv_bn_act,
}

#: Channels and side of every activation of ResNet-50 at 224 px that goes through batch norm and ReLU,
#: and of those to which a residual is added in between.
_PLAIN = ((64, 112), (64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7))
_RESIDUAL = ((256, 56), (512, 28), (1024, 14), (2048, 7))
#: Channels in, side, channels out, kernel, stride, residual.
_CONVS = (
    (64, 56, 64, 3, 1, False),
    (64, 56, 256, 1, 1, True),
    (128, 56, 128, 3, 2, False),
    (1024, 14, 256, 1, 1, False),
    (512, 7, 512, 3, 1, False),
)
BATCH = 16

CASES: tuple[BlockCase, ...] = (
    BlockCase("resnet-stem", "batch_norm_relu_max_pool", (BATCH, 64, 112, 112)),
    *(BlockCase(f"bn-relu-{c}-{s}", "batch_norm_act", (BATCH, c, s, s)) for c, s in _PLAIN),
    *(
        BlockCase(f"bn-add-relu-{c}-{s}", "batch_norm_act", (BATCH, c, s, s), {"residual": True})
        for c, s in _RESIDUAL
    ),
    BlockCase("resnet-tail", "add_relu_global_avg_pool", (BATCH, 2048, 7, 7), {}, (FORWARD, STEP)),
    *(
        BlockCase(
            f"conv{kernel}x{kernel}-{c}-{side}{f'-s{stride}' if stride > 1 else ''}{'-add' if add else ''}",
            "conv_bn_act",
            (BATCH, c, side, side),
            {"channels": out, "kernel_size": kernel, "stride": stride, "residual": add},
            (FORWARD,),
        )
        for c, side, out, kernel, stride, add in _CONVS
    ),
)
