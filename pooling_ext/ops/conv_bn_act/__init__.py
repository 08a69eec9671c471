"""Convolution, batch normalization, an optional residual and an activation, from modules that hold them.

One ordered list of implementations (:mod:`.implementations`) does every call, be it of the function here, of
a module or of a block of a patched model: Winograd's and the depthwise kernels, oneDNN with the statistics
folded into the weights where these are constants (Jacob et al. 2018, section 3.2), a batch norm in one pass
over what PyTorch's convolution wrote, or the modules one by one; on a GPU the fastest of several ways.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from ...errors import ArgumentError
from ..activations import IDENTITY, activation_of
from .call import Call, is_plain
from .implementations import run
from .norm import run_eager


def conv_bn_act(
    conv: nn.Module,
    bn: nn.Module,
    input: Tensor,
    residual: Tensor | None = None,
    activation: str = "relu",
    *,
    negative_slope: float = 0.01,
) -> Tensor:
    """``activation(bn(conv(input)) + residual)``, on modules that exist.

    One ordered list of implementations decides how it runs; :func:`pooling_ext.explain` names the one that
    is taken, and says why others are not.

    Args:
        conv: a :class:`torch.nn.Conv2d`.
        bn: the :class:`torch.nn.BatchNorm2d` or :class:`torch.nn.SyncBatchNorm` after it, whose running
            statistics are updated in training.
        input: a tensor that ``conv`` takes.
        residual: added before the activation; a tensor of the output's dtype.
        activation: a name, as :func:`pooling_ext.functional.batch_norm_act` takes it.
        negative_slope: the slope of leaky_relu for negative numbers.

    Shape:
        input: ``(N, C, H, W)``.
        residual: the output's shape.
        output: ``(N, O, H_out, W_out)``, as of ``conv``.

    Returns:
        A tensor, differentiable in the input, the residual and the parameters of both modules.

    Raises:
        TypeError: ``conv`` is no module, or ``bn`` no batch norm.
        ArgumentError: an argument does not go with the others.
        RuntimeError: the input does not go with ``conv``.

    Example:
        >>> conv, bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        >>> F.conv_bn_act(conv, bn, torch.randn(2, 3, 8, 8), activation="silu").shape
        torch.Size([2, 8, 6, 6])
    """
    found = activation_of(activation, negative_slope)
    act = None if found == IDENTITY else found
    plain = type(conv) is nn.Conv2d and type(bn) is nn.BatchNorm2d
    if not plain and not _are_fusible(conv, bn):
        return run_eager(Call(None, bn, conv(input), residual, act))
    if not isinstance(input, Tensor) or not is_plain(conv):
        input = _convolved(conv, bn, input)
        return run(Call(None, bn, input, residual, act, checked=True, activation=found))
    if not plain or input.dim() != 4:
        _check_batch(conv, input, input)
        checked: Any = bn
        checked._check_input_dim(input)
    return run(Call(conv, bn, input, residual, act, checked=True, activation=found))


def _are_fusible(conv: Any, bn: Any) -> bool:
    """Whether ``bn`` is a batch norm that does what PyTorch's do.

    Raises:
        TypeError: ``conv`` or ``bn`` is of no kind that can be here.
    """
    if not isinstance(conv, nn.Module):
        raise TypeError(f"conv must be a convolution module, but got {type(conv).__name__}")
    if not isinstance(bn, _BatchNorm):
        raise TypeError(f"bn must be a batch norm module, but got {type(bn).__name__}")
    if isinstance(bn, LazyModuleMixin):  # which is made when it is called
        return False
    return type(bn).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _convolved(conv: Any, bn: Any, input: Tensor) -> Tensor:
    """``conv(input)``, a batch of as many dimensions as ``bn`` takes."""
    output = conv(input)
    _check_batch(conv, input, output)
    bn._check_input_dim(output)
    return output


def _check_batch(conv: Any, input: Tensor, output: Tensor) -> None:
    if isinstance(conv, _ConvNd) and output.dim() != len(conv.kernel_size) + 2:
        dims = len(conv.kernel_size) + 2
        raise ArgumentError(f"input must be a batch ({dims}D), but got shape {tuple(input.shape)}")
