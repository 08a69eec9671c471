"""How fast our convolutions were measured to be beside PyTorch's, and what that says of others.

The measurements are data: ``conv_speeds.json`` beside this file, made by ``pooling-ext tune`` on a processor
for each instruction set, or the file that the same command writes on this machine (by default
``pooling_ext/conv_speeds.json`` in the user's cache folder; ``POOLING_EXT_CONV_SPEEDS`` names another). A
convolution that was not measured is judged by the nearest that was: in the logarithms of its channels,
features, pixels and batch, of the same kernel size, stride and kind of groups. Planes of a kernel count as
channels, those of the output as pixels.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..backends import cpu_library

if TYPE_CHECKING:
    from .conv_choice import Conv

SHIPPED = Path(__file__).with_suffix(".json")
#: A convolution further than this from all that were measured is judged by rules alone. One step is a
#: factor of two in one of its sizes.
REACH = 4.0
#: What is not measured itself has to be this much faster to be ours: the next processor is another one.
MARGIN = 1.05
#: Multiplications in a second of PyTorch's convolution on two cores, about (the number of threads must not
#: decide), and what Winograd's kernels gain where nothing is known.
RATE, USUAL_SPEEDUP = 110e9, 1.5
#: Seconds that a look at a weight takes, and for each of its bytes; and its transform, for each element.
LOOK, LOOK_AT_BYTE, TRANSFORM = 10e-6, 1e-10, 0.7e-9
#: Whether these count. They do not where tests have small convolutions done by our kernels.
weights_count = True


class Measured(NamedTuple):
    """A convolution that was measured.

    Attributes:
        sizes: batch, channels, features, and pixels of an output plane.
        ratios: PyTorch's time over ours, for each of conv_choice.PHASES.
    """

    sizes: tuple[int, int, int, int]
    ratios: tuple[float, float, float]


#: Measured convolutions by our kernels' name, dtype, memory format, kernel size and stride.
Table = dict[tuple[Any, ...], list[Measured]]


def user_file() -> Path:
    """Where ``pooling-ext tune`` writes what it measures here."""
    named = os.environ.get("POOLING_EXT_CONV_SPEEDS")
    if named:
        return Path(named)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pooling_ext" / "conv_speeds.json"


def read(file: Path) -> dict[str, Any]:
    """A file's sections, one for each instruction set; none if there is no file, or it is not ours."""
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"pooling_ext ignores {file}, which it cannot read: {error}", stacklevel=2)
        return {}
    return content if isinstance(content, dict) else {}


def table(section: dict[str, Any]) -> Table:
    """A section of a file."""
    found: Table = {}
    for kind, rows in section.get("speedups", {}).items():
        kernels, dtype, layout, kernel, stride = kind.split()
        key = kernels, dtype, layout == "channels_last", kernel, int(stride)
        found[key] = [Measured(tuple(row[:4]), tuple(row[4:])) for row in rows]
    return found


@cache
def known() -> Table:
    """What is known for the instruction set in use: measured here or shipped, or else that of AVX-512."""
    isa = getattr(cpu_library.module, "isa", "none")
    here, shipped = read(user_file()), read(SHIPPED)
    for section in (here.get(isa), shipped.get(isa), shipped.get("avx512")):
        if section is not None:
            return table(section)
    return {}


@cache
def is_measured_here() -> bool:
    """Whether what is known was measured by ``pooling-ext tune`` on this machine."""
    return getattr(cpu_library.module, "isa", "none") in read(user_file())


def forget() -> None:
    """Read the files again."""
    known.cache_clear()
    is_measured_here.cache_clear()
    _nearest.cache_clear()


def kind(kernels: str, conv: Conv) -> tuple[Any, ...]:
    """What a convolution has in common with those that say something of it."""
    dtype, (rows, columns) = str(conv.dtype).removeprefix("torch."), conv.kernel[-2:]
    kernel = str(rows) if rows == columns else "x".join(map(str, sorted((rows, columns))))  # turned or not
    return kernels, dtype, conv.channels_last, kernel, max(conv.stride[-2:])


def sizes(conv: Conv) -> tuple[int, int, int, int]:
    groups = conv.groups if conv.groups != conv.channels else 1
    pixels, channels = conv.outputs // conv.batch * groups, conv.channels // groups * conv.planes
    return conv.batch, channels, conv.features // groups, pixels


def speedup(kernels: str, conv: Conv, phase: int) -> tuple[float, bool] | None:
    """PyTorch's time over ours, and whether it was measured for these very sizes; None if nothing is known.

    Args:
        phase: its position in conv_choice.PHASES.
    """
    found = _nearest(kind(kernels, conv), sizes(conv))
    return None if found is None else (found[0].ratios[phase], found[1])


def saved(conv: Conv, found: tuple[float, bool] | None) -> float:
    """About how many seconds Winograd's kernels save of PyTorch's, whose speed-up was ``found``."""
    return conv.work / RATE * (1 - 1 / (USUAL_SPEEDUP if found is None else found[0]))


def look(conv: Conv) -> float:
    """About how many seconds it takes to see that a weight is the one whose transformed weight is kept."""
    return LOOK + _weight_elements(conv) * conv.dtype.itemsize * LOOK_AT_BYTE


def transform(conv: Conv) -> float:
    """About how many seconds it takes to transform a weight."""
    return _weight_elements(conv) * TRANSFORM


def _weight_elements(conv: Conv) -> int:
    return conv.features * (conv.channels // conv.groups) * math.prod(conv.kernel)


@cache
def _nearest(kind: tuple[Any, ...], sizes: tuple[int, int, int, int]) -> tuple[Measured, bool] | None:
    rows = known().get(kind)
    if not rows:
        return None

    def distance(row: Measured) -> float:
        return sum(abs(math.log2(one / other)) for one, other in zip(sizes, row.sizes, strict=True))

    nearest = min(rows, key=distance)
    away = distance(nearest)
    return (nearest, away == 0) if away <= REACH else None
