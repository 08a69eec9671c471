"""Functions: pooling, fused batch norm and convolutions; drop-ins for those of :mod:`torch.nn.functional`.

Use ``import pooling_ext.functional as F``. Unsupported inputs fall back to PyTorch with identical results;
:func:`pooling_ext.explain` shows the reason.
"""

from . import scripting as _scripting
from .ops.add_relu_global_avg_pool import add_relu_global_avg_pool
from .ops.avg_pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
)
from .ops.batch_norm_act import batch_norm_act
from .ops.batch_norm_relu_max_pool import batch_norm_relu_max_pool
from .ops.conv_bn_act import conv_bn_act
from .ops.convolution import conv1d, conv2d, conv3d
from .ops.global_pool import global_avg_pool2d, global_lp_pool2d, global_max_pool2d
from .ops.lp_pool import lp_pool1d, lp_pool2d, lp_pool3d
from .ops.max_pool import (
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
)

__all__ = [
    "add_relu_global_avg_pool",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm_act",
    "batch_norm_relu_max_pool",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_bn_act",
    "global_avg_pool2d",
    "global_lp_pool2d",
    "global_max_pool2d",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
]

for _name in __all__:
    if (_counterpart := _scripting.counterpart(_name)) is not None:
        _scripting.compiles_as(globals()[_name], _counterpart)
