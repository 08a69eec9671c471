"""The sections after the summary in the docstrings of global pools and fused modules.

:mod:`pooling_ext.nn` has the modules with their summaries; pools with windows and convolutions have templates
(:mod:`pooling_ext._docstrings`, :mod:`pooling_ext._conv_docstrings`).
"""

from __future__ import annotations

_GLOBAL_SHAPE = """\
Shape:
    input: ``(N, C, H, W)`` or ``(C, H, W)``.
    output: ``(N, C, 1, 1)`` or ``(C, 1, 1)``; without ``keepdim`` ``(N, C)`` or ``(C,)``.

Returns:
    From ``forward``, a tensor of the input's dtype.

Raises:
    TypeError: from ``forward``, the input is not a tensor{more}.
    ArgumentError: from ``forward``, the input's shape is out of range{beyond}.
"""
_KEEPDIM = "    keepdim: keep the two axes that are pooled, with size 1.\n"
_NORM_ARGS = """\
    activation: "relu", "identity", "relu6", "silu", "hardswish", "leaky_relu", "gelu", "gelu_tanh" (the
        approximation) or "hardsigmoid".
    negative_slope: the slope of leaky_relu for negative numbers.
"""
_FUSED_RAISES = """\
Raises:
    TypeError: from ``forward``, the residual is not a tensor.
    ArgumentError: there is no such activation; from ``forward``, the residual does not go with the input.
    {error}: from ``forward``, the input does not have the module's {what}.
"""

SECTIONS: dict[str, str] = {
    "GlobalAvgPool2d": f"""\
Args:
{_KEEPDIM}
{_GLOBAL_SHAPE.format(more="", beyond="")}
Example:
    >>> x = torch.arange(8.0).reshape(1, 2, 2, 2)
    >>> pooling_ext.GlobalAvgPool2d(keepdim=False)(x)
    tensor([[1.5000, 5.5000]])
""",
    "GlobalMaxPool2d": f"""\
Args:
{_KEEPDIM}
{_GLOBAL_SHAPE.format(more="", beyond="")}
Example:
    >>> x = torch.arange(8.0).reshape(1, 2, 2, 2)
    >>> pooling_ext.GlobalMaxPool2d(keepdim=False)(x)
    tensor([[3., 7.]])
""",
    "GlobalLPPool2d": f"""\
Args:
    norm_type: the norm p, not 0.
{_KEEPDIM}\
    safe: pool ``|x| ** p`` in float32, with a finite gradient at 0.

{_GLOBAL_SHAPE.format(more=", or ``norm_type`` not a number", beyond=", or ``norm_type`` is 0")}
Example:
    >>> x = torch.arange(8.0).reshape(1, 2, 2, 2)
    >>> pooling_ext.GlobalLPPool2d(1, keepdim=False)(x)
    tensor([[ 6., 22.]])
""",
    "BatchNormAct2d": f"""\
Args:
    num_features: the number of channels, C.
    eps: added to the variance.
    momentum: the weight of the batch in the running statistics; None for a cumulative average.
    affine: whether there are a weight and a bias.
    track_running_stats: whether there are running statistics.
    device: where parameters and buffers are made.
    dtype: what parameters and buffers are made in.
{_NORM_ARGS}
Shape:
    input: ``(N, C, H, W)``.
    residual: the input's shape and dtype, or None.
    output: the input's shape.

Returns:
    From ``forward(input, residual=None)``, a tensor of the input's dtype and memory format.

{_FUSED_RAISES.format(error="ValueError", what="number of dimensions")}
Example:
    >>> norm = pooling_ext.BatchNormAct2d(8, activation="silu")
    >>> x = torch.randn(2, 8, 4, 4)
    >>> norm(x, residual=x).shape
    torch.Size([2, 8, 4, 4])
""",
    "ConvBNAct2d": f"""\
Args:
    in_channels: channels of the input.
    out_channels: channels of the output.
    kernel_size: the convolution's, as are stride, padding, dilation, groups and padding_mode.
    bias: whether the convolution has a bias, which the batch norm makes superfluous.
    device: where parameters and buffers are made.
    dtype: what parameters and buffers are made in.
    eps: the batch norm's, as are momentum, affine and track_running_stats.
{_NORM_ARGS}
Shape:
    input: ``(N, C, H, W)``.
    residual: the output's shape and dtype, or None.
    output: ``(N, O, H_out, W_out)``, as :class:`torch.nn.Conv2d`'s.

Returns:
    From ``forward(input, residual=None)``, a tensor.

{_FUSED_RAISES.format(error="RuntimeError", what="number of channels")}
Example:
    >>> block = pooling_ext.ConvBNAct2d(8, 8, 3, padding=1)
    >>> x = torch.randn(2, 8, 4, 4)
    >>> block(x, residual=x).shape  # relu(bn(conv(x)) + x)
    torch.Size([2, 8, 4, 4])
""",
}
