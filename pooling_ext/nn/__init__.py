"""Modules: pooling, fused batch norm and convolutions; drop-ins for those of :mod:`torch.nn`.

A module that torch.nn has is a subclass of it, with the same constructor, attributes and ``extra_repr``.
Where torch.nn takes ``padding``, these also take ``"same"``, ``"valid"`` and per-side padding.
"""

from .._docstrings import complete as _complete
from .._module_docs import SECTIONS as _SECTIONS
from .fused import (
    CONVOLUTIONS as CONVOLUTIONS,
)
from .fused import (
    BatchNormAct2d,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvBNAct2d,
)
from .pools import (
    REPLACES as REPLACES,
)
from .pools import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    GlobalAvgPool2d,
    GlobalLPPool2d,
    GlobalMaxPool2d,
    LPPool1d,
    LPPool2d,
    LPPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
)

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNormAct2d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvBNAct2d",
    "GlobalAvgPool2d",
    "GlobalLPPool2d",
    "GlobalMaxPool2d",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
]

for _name in __all__:  # pickles and reports name the public module
    globals()[_name].__module__ = __name__
for _name, _sections in _SECTIONS.items():
    _complete(globals()[_name], _sections)
