"""The statistics of a batch, over one process or several, and the running ones that they move.

They are one ``(2, C)`` float64 tensor: means and biased variances, merged with the pairwise update of Chan,
Golub and LeVeque, so that they stay accurate where the mean is large beside the deviation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..errors import ArgumentError
from . import _library


def channel_sums(input: Tensor, *_: Any) -> Tensor:
    return input.new_empty((2, input.shape[1]), dtype=torch.float64)


batch_stats = _library.define("batch_norm_stats(Tensor input)", "Tensor", channel_sums, vmap=False)

# The running mean and unbiased variance, moved toward those of a batch of `count` elements a channel.
_move_running = _library.define(
    "batch_norm_update_running(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor stats, float count, "
    "float momentum)",
    "()",
    lambda *_: None,
    vmap=False,
)


def statistics(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    group: Any,
) -> tuple[Tensor, float | None]:
    """The statistics to normalize with, and how many elements they were taken from if they are the batch's.

    In training the running ones are updated.
    """
    if not training:
        running = torch.stack((running_mean, running_var))  # type: ignore[arg-type]
        return running.to(torch.float64), None
    if group is None:
        count = batch_count(input)
        stats = batch_stats(input.detach())
    else:
        stats, count = _combine(batch_stats(input.detach()), _elements(input), group)
        _check_count(count, input)
    if count == 0:  # which PyTorch takes, and gives gradients of zero
        stats = torch.zeros_like(stats)
    _update(running_mean, running_var, stats, count, momentum)
    return stats, count if is_compiling() else float(count)


def _elements(input: Tensor) -> int:
    """How many elements a channel has."""
    return input.numel() // max(input.shape[1], 1)


def batch_count(input: Tensor) -> int:
    """How many elements each channel's statistics are taken from; one is too few."""
    count = _elements(input)
    _check_count(count, input)
    return count


def _check_count(count: int, input: Tensor) -> None:
    if count == 1:
        raise ArgumentError(
            "Expected more than 1 value per channel when training, but got input of shape "
            f"{tuple(input.shape)}"
        )


def _combine(stats: Tensor, count: int, group: Any) -> tuple[Tensor, int]:
    """The statistics of all processes' elements from those of each."""
    own = torch.cat((stats.flatten(), stats.new_tensor([count])))
    size = torch.distributed.get_world_size(group)
    gathered = own.new_empty(size * own.numel())  # gloo takes no more dimensions than own's
    torch.distributed.all_gather_into_tensor(gathered, own, group=group)
    gathered = gathered.unflatten(0, (size, -1))
    counts = gathered[:, -1:]
    means, variances = gathered[:, :-1].unflatten(1, stats.shape).unbind(1)
    shares = counts / counts.sum()
    # A process without elements has no mean.
    means = torch.where(counts > 0, means, 0)
    variances = torch.where(counts > 0, variances, 0)
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean) ** 2)).sum(0)
    return torch.stack((mean, variance)), int(counts.sum())


def update_running(
    input: Tensor,
    stats: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
) -> None:
    """Move the running statistics, if there are any, toward the input's, as :func:`in_training` does."""
    _update(running_mean, running_var, stats, batch_count(input), momentum)


def _update(
    running_mean: Tensor | None, running_var: Tensor | None, stats: Tensor, count: int, momentum: float
) -> None:
    """Moves the running statistics, if there are any, toward those of a batch."""
    if running_mean is not None and running_var is not None and count > 0:
        if is_compiling():  # the operator takes no symbol for the count
            running_mean.lerp_(stats[0].to(running_mean.dtype), momentum)
            elements = stats.new_full((), count)
            unbiased = stats[1] * (elements / (elements - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
            return
        # Their versions stay, as with PyTorch's batch norm, which saves them for a backward that does not
        # read them: a module may be called twice before it, once by PyTorch's operator and once by ours.
        _move_running(running_mean, running_var, stats, float(count), momentum)


def means_of_all(sums: Tensor, count: float | None, group: Any) -> tuple[Tensor | None, float]:
    """The sums and the count that an input's gradient takes, of which the mean is what counts.

    Args:
        count: of elements; None where the statistics are constants.
    """
    if count is None:
        return None, 1.0
    total = sums_of_all(sums, group)
    return (total / count, 1.0) if is_compiling() else (total, count or 1.0)


def sums_of_all(sums: Tensor, group: Any) -> Tensor:
    """The sums over all processes' elements."""
    if group is None:
        return sums
    total = sums.clone()
    torch.distributed.all_reduce(total, group=group)
    return total
