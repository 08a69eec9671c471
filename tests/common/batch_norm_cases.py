"""Arguments of the operators on batch norm, and their results beside the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import with_layout
from torch import Tensor

from pooling_ext.ops.activations import activation_of
from pooling_ext.testing import reference
from pooling_ext.testing.tolerances import assert_close

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
RESIDUAL = pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
LAYOUT = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])

#: The arguments that gradients are taken of.
DIFFERENTIABLE = ("input", "weight", "bias", "residual")
#: Tolerances are for results of about 1; sums over a batch and the terms of its gradient are larger.
SUMS = 16.0


def arguments(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    residual: bool = False,
    parameters: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Tensors to normalize, with channels of different mean and deviation.

    Args:
        shape: of the input.
        dtype: of the input.
        layout: of the input and the residual; see :func:`helpers.with_layout`.
        residual: whether there is one.
        parameters: the dtype of the others; by default the input's, but float32 for 16 bits.
    """
    channels = shape[1]
    wide = parameters or (torch.float64 if dtype == torch.float64 else torch.float32)
    each = (1, channels, *(1,) * (len(shape) - 2))
    x = torch.randn(tuple(shape)) * (torch.rand(each) + 0.5) + torch.randn(each)
    tensors = {
        "input": with_layout(x.to(dtype), layout),
        "running_mean": torch.randn(channels).to(wide),
        "running_var": (torch.rand(channels) + 0.5).to(wide),
        "weight": torch.randn(channels).to(wide),
        "bias": torch.randn(channels).to(wide),
    }
    if residual:
        tensors["residual"] = with_layout(torch.randn(tuple(shape)).to(dtype), layout)
    return tensors


def copies(tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    """Fresh leaves, with their strides."""
    fresh: dict[str, Any] = {}
    for name, value in tensors.items():
        # Not clone(), which makes strided views dense.
        fresh[name] = value if value is None or name in DIFFERENTIABLE else value.clone()
        if value is not None and name in DIFFERENTIABLE:
            fresh[name] = value.detach().requires_grad_()
    return fresh


def results(
    function: Callable[..., Tensor], tensors: dict[str, Any], grad: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """The output, and the gradient of each argument that has one, for ``grad`` (or ones)."""
    leaves = copies(tensors)
    output = function(**leaves, **options)
    names = [name for name in DIFFERENTIABLE if leaves.get(name) is not None]
    grad = torch.ones_like(output) if grad is None else grad
    gradients = torch.autograd.grad(output, [leaves[name] for name in names], grad)
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def composition(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """PyTorch's operators in turn."""
    output = torch.nn.functional.batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps
    )
    output = output if residual is None else output + residual
    return activation_of(activation, negative_slope)(output)


def expected(
    tensors: dict[str, Any],
    grad: Tensor | None = None,
    training: bool = False,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    after: Callable[[Tensor], Tensor] = lambda output: output,
) -> dict[str, Tensor]:
    """What :func:`results` should give, in float64; ``after`` is what follows the normalization."""

    def function(input, running_mean, running_var, weight=None, bias=None, residual=None):
        act = activation_of(activation, negative_slope)
        return after(
            reference.batch_norm_act(
                input, running_mean, running_var, weight, bias, training, eps, residual, act
            )
        )

    wide = {name: None if x is None else x.to(torch.float64) for name, x in tensors.items()}
    return results(function, wide, None if grad is None else grad.to(torch.float64))


def assert_results(actual: dict[str, Tensor], wanted: dict[str, Tensor], scale: float = SUMS) -> None:
    """Each result lies at its float64 reference, outputs to the dtype's own tolerance."""
    assert actual.keys() == wanted.keys()
    for name, value in actual.items():
        assert_close(value, wanted[name], scale=2.0 if name == "output" else scale, what=name)
