"""Convolution, batch normalisation, an optional residual and ReLU, from the modules that hold them."""

from __future__ import annotations

from torch import Tensor, nn

from .batch_norm_act import batch_norm_act, batch_norm_arguments


def conv_bn_act(
    conv: nn.Module,
    bn: nn.Module,
    input: Tensor,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """``activation(bn(conv(input)) + residual)``.

    Args:
        conv: a :class:`torch.nn.Conv2d`.
        bn: the :class:`torch.nn.BatchNorm2d` or :class:`torch.nn.SyncBatchNorm` after it, whose running
            statistics are updated in training.
        input: ``(N, C_in, H, W)``, what ``conv`` takes.
        residual: added before the activation; the output's shape and dtype.
        activation: "relu" or "identity".

    Returns:
        ``(N, C_out, H_out, W_out)``.

    Raises:
        ArgumentError: an argument does not go with the others.
    """
    return batch_norm_act(conv(input), **batch_norm_arguments(bn), residual=residual, activation=activation)
