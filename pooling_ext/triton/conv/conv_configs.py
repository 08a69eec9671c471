"""Which tiles the convolutions' kernels may work in: tables, and what of them suits a problem.

Which entry is fastest only a card can tell: a tuner measures what ``configs_of`` lists, and passes one as
``config``. Until then a call takes ``default``, one that is known to compile without spills. The largest
tiles spill with the epilogues that need most registers.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from ...ops.conv import ConvGeometry, geometry
from ..pool.geometry import WARP_SIZE

#: With fewer channels than this (or twice as many that do not divide evenly) a step takes several taps of a
#: window.
FEW_CHANNELS = 16


#: More make AMD's compiler spill.
AMD_STAGES = 2
MOST_STAGES = AMD_STAGES if torch.version.hip else 8


class Config(NamedTuple):
    """How a kernel works on a matrix product: its tile, and what the compiler is told.

    ``group`` is how many rows of tiles share columns in time (see gemm.grouped_tile).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8

    @property
    def options(self) -> dict[str, int]:
        """What ``launch`` is to be given by name; AMD's warps are twice as wide, its pipelines shorter."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP": self.group,
            "num_warps": max(self.num_warps * 32 // WARP_SIZE, 1),
            "num_stages": min(self.num_stages, MOST_STAGES),
        }


class Problem(NamedTuple):
    """A matrix product of ``(m, k)`` and ``(k, n)``.

    Attributes:
        m: pixels.
        n: channels of the result.
        k: what the kernel steps through by block_k: channels of the operand, or elements of its windows.
        dtype: of the operands.
        precision: "ieee" or "tf32" for float32.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    precision: str


_HALF = (
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 8, 4),
    Config(128, 256, 64, 8, 3),
    Config(256, 128, 64, 8, 3),
    Config(128, 128, 64, 4, 3),
    Config(128, 64, 64, 8, 3),
    Config(128, 64, 32, 8, 4),
    Config(256, 64, 64, 8, 3),
    Config(128, 64, 64, 4, 3),
    Config(128, 64, 32, 4, 4),
    Config(64, 256, 64, 4, 3),
    Config(64, 128, 64, 4, 4),
    Config(64, 64, 64, 4, 4),
    Config(64, 64, 32, 4, 4),
    Config(128, 32, 64, 4, 4),
    Config(64, 32, 64, 4, 4),
    Config(32, 64, 64, 4, 4),
    Config(32, 32, 64, 4, 4),
    Config(16, 64, 64, 4, 4),
    Config(64, 16, 32, 4, 4),
    Config(16, 16, 32, 1, 4),
)
_TF32 = (
    Config(128, 128, 32, 8, 3),
    Config(128, 128, 32, 8, 2),
    Config(128, 256, 32, 8, 3),
    Config(128, 128, 32, 4, 3),
    Config(128, 64, 32, 4, 3),
    Config(64, 128, 32, 4, 3),
    Config(64, 64, 32, 4, 4),
    Config(64, 32, 32, 4, 4),
    Config(32, 64, 32, 4, 4),
    Config(64, 16, 16, 4, 4),
    Config(16, 16, 16, 1, 4),
)
# Products on the ordinary units: each thread holds an outer product.
_IEEE = (
    Config(128, 128, 16, 8, 2),
    Config(128, 64, 16, 8, 2),
    Config(64, 64, 16, 4, 2),
    Config(64, 64, 32, 8, 2),
    Config(64, 32, 16, 4, 2),
    Config(32, 32, 16, 4, 2),
    Config(16, 16, 16, 1, 2),
)


class Card(NamedTuple):
    """What a choice depends on: multiprocessors, and the bytes of shared memory of one program."""

    processors: int
    shared_memory: int


#: What there is to choose from where kernels are compiled for a card that is not there: all can run it.
ANY_CARD = Card(108, 64 * 1024)


@cache
def card(device: torch.device) -> Card:
    if device.type == "cpu":
        return ANY_CARD._replace(processors=1)  # the interpreter
    if device.type != "cuda":
        return ANY_CARD
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or ANY_CARD.shared_memory
    return Card(properties.multi_processor_count, shared)


def table(problem: Problem) -> tuple[Config, ...]:
    if problem.dtype != torch.float32:
        return _HALF
    return _TF32 if problem.precision == "tf32" else _IEEE


def shared_memory(config: Config, problem: Problem) -> int:
    """The bytes of the tiles that are on their way from memory, or of the result's on its way back."""
    size = problem.dtype.itemsize
    ahead = config.num_stages * (config.block_m + config.block_n) * config.block_k * size
    return max(ahead, config.block_m * config.block_n * size)


def configurations(problem: Problem, card: Card = ANY_CARD) -> tuple[Config, ...]:
    """The table's entries that suit ``problem`` on ``card``, larger tiles first; there is always one."""

    def covers(block: int, extent: int) -> bool:
        # No more than the least power of two that covers it, or the least a matrix instruction takes.
        return block <= max(16, triton.next_power_of_2(extent))

    suited = [
        config
        for config in table(problem)
        if covers(config.block_m, problem.m)
        and covers(config.block_n, problem.n)
        and (covers(config.block_k, problem.k) or config.block_k <= 32)
        and shared_memory(config, problem) <= card.shared_memory
    ]
    return tuple(suited) or table(problem)[-1:]


def default(problem: Problem, card: Card = ANY_CARD) -> Config:
    """The first with a tile for every other multiprocessor, else the one with the most tiles."""

    def tiles(config: Config) -> int:
        return triton.cdiv(problem.m, config.block_m) * triton.cdiv(problem.n, config.block_n)

    suited = configurations(problem, card)
    return next((c for c in suited if 2 * tiles(c) >= card.processors), max(suited, key=tiles))


def precision_of(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as PyTorch's convolutions are told to. Other dtypes have one way."""
    if dtype != torch.float32 or torch.version.hip is not None:  # few of AMD's cards have it
        return "ieee"
    precision = torch.backends.cudnn.conv.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    return "tf32" if precision == "tf32" else "ieee"


def should_fold(conv: ConvGeometry) -> bool:
    """Whether a step of conv.py's kernel takes several taps of a window."""
    return conv.channels < (FEW_CHANNELS if conv.channels % 8 == 0 else 2 * FEW_CHANNELS)


def forward_problem(conv: ConvGeometry, dtype: torch.dtype) -> Problem:
    k = conv.channels
    if should_fold(conv) and not conv.pointwise:
        k *= conv.kernel_size[0] * conv.kernel_size[1]
    pixels = conv.batch * conv.output_size[0] * conv.output_size[1]
    return Problem(pixels, conv.features, k, dtype, precision_of(dtype))


def input_grad_problem(conv: ConvGeometry, dtype: torch.dtype) -> Problem:
    """With a stride, ``m`` is of the pixels of one of the kinds that conv_input_grad.py's kernel has."""
    high, wide = map(triton.cdiv, conv.size, conv.stride)
    return Problem(conv.batch * high * wide, conv.channels, conv.features, dtype, precision_of(dtype))


def weight_grad_problem(conv: ConvGeometry, dtype: torch.dtype) -> Problem:
    """``m`` is features, ``n`` channels at each tap of a window, ``k`` pixels."""
    pixels = conv.batch * conv.output_size[0] * conv.output_size[1]
    return Problem(conv.features, conv.channels, pixels, dtype, precision_of(dtype))


def configs_of(operator: str, *args: Any) -> tuple[Config, ...]:
    """The configurations that suit a call, for a tuner to measure.

    Args:
        operator: "conv_bias_act", "conv_stats", "conv_input_grad" or "conv_weight_grad".
        args: what it is to be called with. Its function in ``triton/<operator>.py`` takes ``config`` besides.
    """
    names = [argument.name for argument in getattr(torch.ops.pooling_ext, operator).default._schema.arguments]
    call = dict(zip(names, args, strict=True))
    input_size = call["input_size"] if operator == "conv_input_grad" else call["input"].shape
    weight_size = call["weight_size"] if operator == "conv_weight_grad" else call["weight"].shape
    conv = geometry(input_size, weight_size, call["stride"], call["padding"], call["dilation"])
    problems = {"conv_input_grad": input_grad_problem, "conv_weight_grad": weight_grad_problem}
    first = call[names[0]]
    return configurations(problems.get(operator, forward_problem)(conv, first.dtype), card(first.device))
