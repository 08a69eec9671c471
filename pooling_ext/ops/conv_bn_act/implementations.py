"""The ways to do a convolution with what follows it, in the order in which they are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.compiler import is_compiling

from ... import backends
from ...exporting import is_exporting, tracing_state
from .. import conv_speeds
from ..conv_choice import DEPTHWISE, IMAGE, WINOGRAD
from . import cpu, gpu, norm
from .call import LEAST_ELEMENTS, NO_CONVOLUTION, Call


class Implementation(NamedTuple):
    """One way.

    Attributes:
        name: as :func:`pooling_ext.explain` gives it.
        why_not: the reason why it should not do a call, or None if it should.
        prepare: what calls of one key have in common beside the way.
        run: does a call, given that; or does the convolution alone, and returns the call with the rest.
    """

    name: str
    why_not: Callable[[Call], str | None]
    prepare: Callable[[Call], Any]
    run: Callable[[Call, Any], Any]


def _convolve_why_not(call: Call) -> str | None:
    return None if call.conv is not None else NO_CONVOLUTION


def _convolve(call: Call, _: None) -> Any:
    output = cpu.convolved(call)
    if call.bn is None:
        return output
    call.continue_with(output)
    return call


def _nothing(call: Call) -> None:
    return None


#: The first that gives no reason against it does a call; the last one can do any.
IMPLEMENTATIONS = (
    Implementation("tuned", gpu.why_not, _nothing, gpu.run),
    Implementation("Winograd", cpu.winograd_why_not, partial(cpu.prepare, WINOGRAD), cpu.run_winograd),
    Implementation("depthwise", cpu.depthwise_why_not, partial(cpu.prepare, DEPTHWISE), cpu.run_depthwise),
    Implementation("image", cpu.image_why_not, partial(cpu.prepare, IMAGE), cpu.run_image),
    Implementation("pointwise", cpu.pointwise_why_not, cpu.prepare_pointwise, cpu.run_pointwise),
    Implementation("oneDNN, folded", cpu.folded_why_not, _nothing, cpu.run_folded),
    Implementation("PyTorch's convolution", _convolve_why_not, _nothing, _convolve),
    Implementation("norm by constants", norm.running_why_not, _nothing, norm.run_running),
    Implementation("fused norm", norm.fused_why_not, _nothing, norm.run_fused),
    Implementation("eager", _nothing, _nothing, norm.run_eager),
)


class _Choice:
    """An implementation, what it has prepared, and the choice for what it leaves."""

    __slots__ = ("implementation", "prepared", "rest")

    def __init__(self, implementation: Implementation, prepared: Any) -> None:
        self.implementation, self.prepared = implementation, prepared
        self.rest: _Choice | None = None


#: What was chosen, by all that the choice depends on but hooks and classes, which callers look at.
_chosen: dict[tuple[Any, ...], _Choice] = {}
_MOST = 1 << 13

#: With gradients nothing pays for fewer elements than this, of input and output, be there a convolution.
_SMALL = 1 << 14
_small = _SMALL


def run(call: Call) -> Any:
    """Do ``call`` in the first way that can.

    An exported or traced program has PyTorch's operators. It is for every size of a batch, where the list
    asks for sizes; and it can be trained, where of an autograd Function it would have the forward alone.
    """
    # Around small operators a look at the list shows.
    if is_exporting() or tracing_state() is not None or (call.wants_grad and _is_small(call)):
        if call.conv is not None:
            call.continue_with(cpu.convolved(call))
        return norm.run_eager(call)
    if is_compiling() or backends.recording() or not call.input.is_cpu:
        choice = _choose(call)
    else:
        key = call.key()
        choice = _chosen.get(key)  # type: ignore[assignment]
        if choice is None:
            choice = _choose(call)
            if len(_chosen) >= _MOST:
                _chosen.clear()
            _chosen[key] = choice
    result = choice.implementation.run(call, choice.prepared)
    while result is call:
        if choice.rest is None:
            choice.rest = _choose(call)
        choice = choice.rest
        result = choice.implementation.run(call, choice.prepared)
    return result


def _is_small(call: Call) -> bool:
    input, conv = call.input, call.conv
    elements = input.numel()
    if elements >= _small or not input.is_cpu or isinstance(call.bn, nn.SyncBatchNorm):
        return False
    return conv is None or elements * conv.out_channels < _small * conv.in_channels


def _choose(call: Call) -> _Choice:
    """The implementation that does ``call``; for explain its name and the reasons of those before it."""
    declined: dict[str, str] = {}
    for implementation in IMPLEMENTATIONS:
        reason = implementation.why_not(call)
        if reason is None:
            break
        if reason is not NO_CONVOLUTION:
            declined[implementation.name] = reason
    if not is_compiling():
        what = "batch_norm_act" if call.conv is None else "conv_bn_act"
        backends.record(what, implementation.name, declined)
    return _Choice(implementation, implementation.prepare(call))


@contextmanager
def from_size(elements: int, keep: Sequence[str] = (), fold_ratio: int | None = None) -> Iterator[None]:
    """Take calls together from this size on, in the whole process, whatever pays; for tests.

    Args:
        keep: the ways, of call.LEAST_ELEMENTS, whose sizes stay as they are.
        fold_ratio: in place of cpu.FOLD_RATIO.
    """
    global _small
    before = dict(LEAST_ELEMENTS), cpu.FOLD_RATIO, _small, conv_speeds.weights_count
    LEAST_ELEMENTS.update(
        {how: (elements, elements, elements, elements) for how in LEAST_ELEMENTS.keys() - keep}
    )
    cpu.FOLD_RATIO = cpu.FOLD_RATIO if fold_ratio is None else fold_ratio
    _small = min(elements, _SMALL)
    conv_speeds.weights_count = elements > 0
    _chosen.clear()
    try:
        yield
    finally:
        LEAST_ELEMENTS.update(before[0])
        cpu.FOLD_RATIO, _small, conv_speeds.weights_count = before[1:]
        _chosen.clear()
