"""The low-level operators of batch normalization with a residual and an activation, and who has kernels.

The statistics are one ``(2, C)`` float64 tensor: means and biased variances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from . import _library
from .activations import Activation
from .batch_norm_statistics import channel_sums

FLOATS = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
#: The last arguments of the operators, :attr:`Activation.arguments`.
_ACTIVATION = "int activation, float negative_slope"
backends.register(
    "batch_norm_act",
    cpu=FLOATS,
    cuda=FLOATS,
    triton=FLOATS,
    kernels=(
        "batch_norm_stats",
        "batch_norm_act_elemt",
        "batch_norm_act_backward_reduce",
        "batch_norm_act_backward_elemt",
        "batch_norm_act_training",
        "batch_norm_act_training_backward",
        "batch_norm_update_running",
    ),
    triton_module="pooling_ext.triton.norm.batch_norm_act",
)
# CUDA's alone: ReLU's mask in place of its output.
backends.register("batch_norm_relu_mask", cuda=FLOATS - {torch.float64})


def like(input: Tensor) -> Tensor:
    return _library.empty(input, input.shape[2:])


def vector_like(input: Tensor, vector: Tensor | None) -> Tensor:
    if vector is None:
        return input.new_empty(0, dtype=torch.float64)
    return input.new_empty(vector.shape, dtype=vector.dtype)


batch_norm_act_elemt = _library.define(
    "batch_norm_act_elemt(Tensor input, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, "
    f"float eps, {_ACTIVATION})",
    "Tensor",
    lambda input, *_: like(input),
    vmap=False,
)

# The gradient of what the activation was given (of no size unless something is kept), and its sums over
# each channel: of itself, and of its products with `input - mean`. `kept` is given where a residual went
# into the output: for ReLU the output or its mask, for the other activations the residual.
batch_norm_act_backward_reduce = _library.define(
    "batch_norm_act_backward_reduce(Tensor grad, Tensor input, Tensor stats, Tensor? weight, Tensor? bias, "
    f"Tensor? kept, float eps, {_ACTIVATION})",
    "(Tensor, Tensor)",
    lambda grad, input, stats, weight, bias, kept, *_: (
        like(input) if kept is not None else input.new_empty(0),
        channel_sums(input),
    ),
    vmap=False,
)

# Without `sums` the statistics are constants.
batch_norm_act_backward_elemt = _library.define(
    "batch_norm_act_backward_elemt(Tensor grad, Tensor input, Tensor stats, Tensor? weight, Tensor? bias, "
    f"Tensor? sums, float count, float eps, {_ACTIVATION})",
    "Tensor",
    lambda grad, input, *_: like(input),
    vmap=False,
)

# The output and the input's own statistics: batch_norm_stats and batch_norm_act_elemt.
batch_norm_act_training = _library.define(
    "batch_norm_act_training(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
    f"{_ACTIVATION})",
    "(Tensor, Tensor)",
    lambda input, *_: (like(input), channel_sums(input)),
    vmap=False,
)

# ReLU's output with a residual, and its mask: a bit for each element, and a byte for each 16 bytes of them,
# in the order that MaskOrder says (csrc/kernels/cuda/norm/batch_norm.cuh).
batch_norm_relu_mask = _library.define(
    "batch_norm_relu_mask(Tensor input, Tensor stats, Tensor? weight, Tensor? bias, Tensor residual, "
    "float eps)",
    "(Tensor, Tensor)",
    lambda input, *_: (
        like(input),
        input.new_empty(-(-input.numel() // (16 // input.element_size())), dtype=torch.uint8),
    ),
    vmap=False,
)

# The gradients of input, residual, weight and bias: batch_norm_act_backward_reduce and
# batch_norm_act_backward_elemt. Gradients of what there is not have no size.
batch_norm_act_training_backward = _library.define(
    "batch_norm_act_training_backward(Tensor grad, Tensor input, Tensor stats, Tensor? weight, Tensor? bias, "
    f"Tensor? kept, float eps, {_ACTIVATION})",
    "(Tensor, Tensor, Tensor, Tensor)",
    lambda grad, input, stats, weight, bias, kept, *_: (
        like(input),
        like(input) if kept is not None else input.new_empty(0),
        vector_like(input, weight),
        vector_like(input, bias),
    ),
    vmap=False,
)


def normalize_batch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Activation,
    stats: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the input's statistics, which may be known already."""
    if stats is None:
        return batch_norm_act_training(input, weight, bias, residual, eps, *activation.arguments)
    return batch_norm_act_elemt(input, stats, weight, bias, residual, eps, *activation.arguments), stats
