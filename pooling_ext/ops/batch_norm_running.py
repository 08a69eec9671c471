"""Low-level operators of batch normalization with running statistics, on the CPU and without gradients.

They take a module's vectors as they are, of any floating dtype: around small layers, to prepare them takes
longer than to normalize.
"""

from __future__ import annotations

from . import _library

_ARGUMENTS = (
    "Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
    "int activation, float negative_slope"
)

normalize = _library.define(
    f"batch_norm_act_running(Tensor input, {_ARGUMENTS})",
    "Tensor",
    lambda input, *_: _library.empty(input, input.shape[2:]),
    vmap=False,
)

# The same into the input's memory.
overwrite = _library.define(
    f"batch_norm_act_running_(Tensor(a!) input, {_ARGUMENTS})",
    "()",
    lambda *_: None,
    vmap=False,
)

# Weight and bias of one convolution that also normalizes, in the weight's memory format.
fold = _library.define(
    "fold_batch_norm(Tensor weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, ScalarType dtype)",
    "(Tensor, Tensor)",
    lambda weight, bias, mean, variance, norm_weight, norm_bias, eps, dtype: (
        _library.empty(weight, weight.shape[2:], dtype),
        weight.new_empty(weight.shape[:1], dtype=dtype),
    ),
    vmap=False,
)
