"""The sections of docstrings that functions and modules of 1, 2 and 3 dimensions share.

A function or module has its summary beside its code. The sections after it (Args, Shape, Returns, Raises,
Example) are filled in here, from one template for each kind of pooling; _conv_docstrings.py has that of
convolutions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

Documented = TypeVar("Documented", bound=Callable[..., Any])

#: The words that differ between 1, 2 and 3 dimensions, results of examples included.
WORDS: dict[int, dict[str, str]] = {
    1: {
        "batch": "(N, C, L)",
        "single": "(C, L)",
        "pooled": "(N, C, L_out)",
        "single_pooled": "(C, L_out)",
        "kernel": "(kL,)",
        "pads": "(pL,)",
        "sides": "(left, right)",
        "sizes": "(L_out,)",
        "count": "8",
        "example": "1, 1, 8",
        "largest": "1.0, 3.0, 5.0, 7.0",
        "indices": "1, 3, 5, 7",
        "means": "0.5, 2.5, 4.5, 6.5",
        "norms": "1.0000, 3.6056, 6.4031, 9.2195",
        "same": "1, 1, 3",
        "halves": "3.0, 7.0",
        "half_means": "1.5, 5.5",
    },
    2: {
        "batch": "(N, C, H, W)",
        "single": "(C, H, W)",
        "pooled": "(N, C, H_out, W_out)",
        "single_pooled": "(C, H_out, W_out)",
        "kernel": "(kH, kW)",
        "pads": "(pH, pW)",
        "sides": "(left, right, top, bottom)",
        "sizes": "(H_out, W_out)",
        "count": "16",
        "example": "1, 1, 4, 4",
        "largest": "5.0, 7.0, 13.0, 15.0",
        "indices": "5, 7, 13, 15",
        "means": "2.5, 4.5, 10.5, 12.5",
        "norms": " 6.4807,  9.8995, 21.4009, 25.3377",
        "same": "1, 1, 2, 2",
        "halves": "5.0, 7.0, 13.0, 15.0",
        "half_means": "2.5, 4.5, 10.5, 12.5",
    },
    3: {
        "batch": "(N, C, D, H, W)",
        "single": "(C, D, H, W)",
        "pooled": "(N, C, D_out, H_out, W_out)",
        "single_pooled": "(C, D_out, H_out, W_out)",
        "kernel": "(kD, kH, kW)",
        "pads": "(pD, pH, pW)",
        "sides": "(left, right, top, bottom, front, back)",
        "sizes": "(D_out, H_out, W_out)",
        "count": "16",
        "example": "1, 1, 2, 2, 4",
        "largest": "13.0, 15.0",
        "indices": "13, 15",
        "means": "6.5, 8.5",
        "norms": "22.3607, 27.2029",
        "same": "1, 1, 1, 1, 2",
        "halves": "1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0",
        "half_means": "0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5, 14.5",
    },
}

_INPUT = """\
    input: a tensor, see Shape; float32, float64, bfloat16 or float16; any strides.
"""
_INPUT_OR_INTEGERS = """\
    input: a tensor, see Shape; float32, float64, bfloat16, float16 or an integer dtype; any strides.
"""
_WINDOW = """\
    kernel_size: the window's size, an int or ``{kernel}``.
    stride: the step between windows, an int or ``{kernel}``; default ``kernel_size``.
"""
_PADDING = """\
    padding: implicit {fill} on both sides, an int or ``{pads}``, at most half the effective kernel size.
        Beyond PyTorch: ``"valid"``; ``"same"`` (output size ``ceil(size / stride)``); or an int for
        each side, ``{sides}``, each smaller than the effective kernel size.
"""
_DILATION = """\
    dilation: the step between the elements of a window, an int or ``{kernel}``.
"""
_CEIL = """\
    ceil_mode: round the output size up instead of down.
"""
_INDICES = """\
    return_indices: also return the int64 index of each maximum in its plane, as
        :func:`torch.nn.functional.max_unpool{rank}d` takes it.
"""
_COUNT = """\
    count_include_pad: count padding in the divisor. The overhang that ``ceil_mode`` adds never counts.
"""
_DIVISOR = """\
    divisor_override: divide by this number instead of the window's size; negative is allowed, 0 is not.
"""
_NORM = """\
    norm_type: the norm p, not 0; ``inf`` is the largest and ``-inf`` the smallest ``|x|``.
"""
_SAFE = """\
    safe: pool ``|x| ** p`` in float32, with a finite gradient at 0 (beyond PyTorch).
"""
_OUTPUT_SIZE = """\
    output_size: an int or ``{sizes}``; None keeps the input's size along an axis.
"""
_SHAPE = """\
Shape:
    input: ``{batch}`` or ``{single}``.
    output: ``{pooled}`` or ``{single_pooled}``. {size}
"""
_SIZE = """Each size is
        ``floor((size + 2 * padding - {reach} - 1) / stride) + 1``,
        rounded up with ``ceil_mode``."""
_RAISES = """\
Raises:
    TypeError: {when}an argument has the wrong type.
    ArgumentError: {when}an argument or the input's shape is out of range.
"""


class _Kind(NamedTuple):
    """The sections of one kind of pooling.

    Attributes:
        args: the arguments that its functions and modules share.
        calls: the calls of the example, and their results.
        integers: whether it takes integers.
        words: more words, beside those of :data:`WORDS`.
    """

    args: str
    calls: list[tuple[str, str]]
    integers: bool = False
    words: dict[str, str] = {}


_KINDS = {
    "max_pool": _Kind(
        _WINDOW + _PADDING + _DILATION + _CEIL + _INDICES,
        [
            ("{call}(x, 2).flatten().tolist()", "[{largest}]"),
            ("{call}(x, 2, return_indices=True)[1].flatten().tolist()", "[{indices}]"),
            ('{call}(x, 3, padding="same").shape', "torch.Size([{same}])"),
        ],
        integers=True,
        words={"fill": "-inf", "size": _SIZE.replace("{reach}", "dilation * (kernel_size - 1)")},
    ),
    "avg_pool": _Kind(
        _WINDOW + _PADDING + _CEIL + _COUNT,
        [
            ("{call}(x, 2).flatten().tolist()", "[{means}]"),
            ('{call}(x, 3, padding="same").shape', "torch.Size([{same}])"),
        ],
        words={"fill": "zeros", "size": _SIZE.replace("{reach} - 1", "kernel_size")},
    ),
    "lp_pool": _Kind(
        _NORM + _WINDOW + _CEIL + _PADDING.replace("Beyond PyTorch", "PyTorch has none. Beyond it") + _SAFE,
        [("{call}(x, 2, 2).flatten()", "tensor([{norms}])")],
        words={"fill": "zeros", "size": _SIZE.replace("{reach} - 1", "kernel_size")},
    ),
    "adaptive_max_pool": _Kind(
        _OUTPUT_SIZE + _INDICES,
        [("{call}(x, 2).flatten().tolist()", "[{halves}]")],
        integers=True,
        words={"size": "The sizes are ``output_size``."},
    ),
    "adaptive_avg_pool": _Kind(
        _OUTPUT_SIZE,
        [("{call}(x, 2).flatten().tolist()", "[{half_means}]")],
        words={"size": "The sizes are ``output_size``."},
    ),
}


def pools(kind: str, rank: int) -> Callable[[Documented], Documented]:
    """Complete the docstring of a function or module, which has a summary.

    Args:
        kind: a key of :data:`_KINDS`.
        rank: 1, 2 or 3.
    """

    def decorate(documented: Documented) -> Documented:
        complete(documented, _sections(kind, rank, documented))
        return documented

    return decorate


def complete(documented: Any, sections: str) -> None:
    """Put ``sections`` after the summary."""
    if documented.__doc__ is not None:  # python -OO leaves it out
        documented.__doc__ = f"{inspect.cleandoc(documented.__doc__)}\n\n{sections}"


def _sections(name: str, rank: int, documented: Any) -> str:
    kind, is_module = _KINDS[name], isinstance(documented, type)
    args, returns = kind.args, "a tensor of the input's dtype and memory format"
    if name == "avg_pool" and rank > 1:  # as in PyTorch
        args += _DIVISOR
    if is_module:
        returns = f"from ``forward``, {returns}"
    else:
        args = (_INPUT_OR_INTEGERS if kind.integers else _INPUT) + args
    if "max" in name:
        returns += "; with ``return_indices``\n    a pair, ``(output, indices)``"
    if name == "max_pool":
        returns += ". A window without an element in range gives -inf and index -1"
    example = [">>> x = torch.arange({count}.).reshape({example})"]
    for call, result in kind.calls:
        if is_module:  # F.pool(x, 2) is Pool(2)(x)
            call = call.replace("(x, ", "(", 1).replace(")", ")(x)", 1)
        example += [f">>> {call}", result]
    words = WORDS[rank] | kind.words
    words |= {
        "rank": str(rank),
        "when": "from ``forward``, " if is_module else "",
        "call": f"{'pooling_ext' if is_module else 'F'}.{documented.__name__}",
    }
    words["size"] = words["size"].format_map(words)
    sections = [
        f"Args:\n{args}",
        _SHAPE,
        f"Returns:\n    {returns[0].upper()}{returns[1:]}.\n",
        _RAISES,
        "Example:\n    " + "\n    ".join(example) + "\n",
    ]
    return "\n".join(sections).format_map(words)
