"""The sections of docstrings that convolutions of 1, 2 and 3 dimensions share, functions and modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._docstrings import WORDS, Documented, complete

_ARGS = """\
Args:
    input: a tensor, see Shape.
    weight: the kernels.
    bias: added to the output; None for none.
    stride: the step between windows{each}.
    padding: zeros on both sides{each}; "same" or "valid".
    dilation: the step between the elements of a window{each}.
    groups: into how many groups the channels are divided.
"""
_MODULE_ARGS = """\
Args:
    in_channels: channels of the input. The other arguments are :class:`torch.nn.{name}`'s too.
"""
_SHAPE = """\
Shape:
    input: ``{batch}`` or ``{single}``.
    weight: ``(O, C / groups, {taps})``.
    bias: ``(O,)``.
    output: ``{pooled}`` or ``{single_pooled}``.
"""
_MODULE_SHAPE = """\
Shape:
    input: ``{batch}`` or ``{single}``.
    output: ``{pooled}`` or ``{single_pooled}``, as :class:`torch.nn.{name}`'s.
"""
_RAISES = """\
Raises:
    TypeError: an argument has the wrong type.
    RuntimeError: the arguments do not go together.
"""
_MODULE_RAISES = """\
Raises:
    ValueError: an argument is out of range.
    RuntimeError: from ``forward``, the input does not go with the weight.
"""
_MODULE_EXAMPLE = """\
Example:
    >>> conv = pooling_ext.{name}(3, 8, 3, padding=1)
    >>> conv(torch.randn(2, 3, {image})).shape
    torch.Size([2, 8, {image}])
"""
#: What differs between 1, 2 and 3 dimensions; `returns` of a function, and of a module.
_DIFFERENCES: dict[int, dict[str, Any]] = {
    1: {
        "each": "",
        "taps": "k",
        "image": "16",
        "returns": ("A tensor, contiguous as PyTorch's.", "a tensor."),
        "example": (
            "F.conv1d(torch.ones(1, 2, 4), torch.ones(1, 2, 3), padding=1)",
            "tensor([[[4., 6., 6., 4.]]])",
        ),
    },
    2: {
        "each": ", an int or one for each axis",
        "taps": "kH, kW",
        "image": "16, 16",
        "returns": ("A tensor in the memory format of PyTorch's result.",) * 2,
        "example": (
            "F.conv2d(torch.ones(1, 8, 4, 4), torch.ones(8, 1, 3, 3), padding=1, groups=8)[0, 0, 0]",
            "tensor([4., 6., 6., 4.])",
        ),
    },
    3: {
        "each": ", an int or one for each axis",
        "taps": "kD, kH, kW",
        "image": "4, 16, 16",
        "returns": (
            "A tensor. By Winograd it is in channels_last_3d if input or weight is; PyTorch's is contiguous "
            "for a\n    batch of one.",
            "a tensor; see :func:`pooling_ext.functional.conv3d` for its memory format.",
        ),
        "example": (
            "F.conv3d(torch.ones(1, 2, 3, 3, 3), torch.ones(1, 2, 3, 3, 3))",
            "tensor([[[[[54.]]]]])",
        ),
    },
}


def convolutions(rank: int) -> Callable[[Documented], Documented]:
    """Complete the docstring of a convolution, which has a summary.

    Args:
        rank: 1, 2 or 3.
    """

    def decorate(documented: Documented) -> Documented:
        complete(documented, _sections(rank, documented))
        return documented

    return decorate


def _sections(rank: int, documented: Any) -> str:
    own, is_module = _DIFFERENCES[rank], isinstance(documented, type)
    words = WORDS[rank] | {name: own[name] for name in ("each", "taps", "image")}
    words |= {name: words[name].replace("C", "O") for name in ("pooled", "single_pooled")}
    words["name"] = documented.__name__
    returns = own["returns"][is_module]
    if is_module:
        returns = f"From ``forward``, {returns[0].lower()}{returns[1:]}"
        parts = _MODULE_ARGS, _MODULE_SHAPE, f"Returns:\n    {returns}\n", _MODULE_RAISES, _MODULE_EXAMPLE
    else:
        call, result = own["example"]
        example = f"Example:\n    >>> {call}\n    {result}\n"
        parts = _ARGS, _SHAPE, f"Returns:\n    {returns}\n", _RAISES, example
    return "\n".join(parts).format_map(words)
