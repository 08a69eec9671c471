"""Compares a frozen model with the one it was made from, before anybody relies on it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: The largest error, over the largest element of an output, that needs no closer look.
_BARS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
#: How many times the error of the model in the same dtype the frozen one's may be.
_FACTOR = 4.0

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Undecided(Exception):
    """The model's own results vary too much for a comparison; the message says why."""


def difference(
    model: nn.Module, frozen: Callable[..., Any], call: Call, dtype: torch.dtype | None
) -> str | None:
    """How results of ``frozen`` differ from those of ``model``, or None.

    Both run on the example and on a changed copy of it, ``frozen`` twice on the example, with the same random
    numbers and inputs of their own.

    Args:
        model: in eval mode; a copy that may change its state.
        frozen: what was made of it.
        call: positional and keyword arguments of the example.
        dtype: what ``frozen`` computes in; None for the model's own.

    Raises:
        Undecided: see there.
    """
    dtype = dtype or _floating_dtype(call) or torch.float32
    state = _random_state()
    # The changed copy comes last: where it differs alone, a value of the example was kept as a constant.
    for example, times in ((call, 2), (None, 1)):
        if example is not None:
            expected = _run(model, example, state)
        else:
            example, expected = _run_changed(model, call, state)
        for _ in range(times):
            try:
                found = _run(frozen, example, state)
            except Exception as error:
                return f"the frozen model raises {type(error).__name__}: {error}"
            problem = _mismatch(found, expected, _BARS[dtype])
            if problem is not None:
                expected = _explain(model, frozen, example, (found, expected), dtype, state, problem)
                if isinstance(expected, str):
                    return expected
    return None


def _explain(
    model: nn.Module, frozen: Any, call: Call, results: Any, dtype: torch.dtype, state: Any, problem: str
) -> Any:
    """Look closer at a difference: what it is, or the results that later runs are to have."""
    found, expected = results
    again = _run(model, call, state)
    if _mismatch(again, expected, _BARS[dtype]) is not None:
        if _mismatch(found, again, _BARS[dtype]) is None:
            return again  # state that both keep alike
        raise Undecided(f"the model's own results differ from call to call ({problem})")
    other, frozen_other = _run(model, call, None), _run(frozen, call, None)
    drawn = _mismatch(other, expected, _BARS[dtype]) is not None
    if drawn and _mismatch(frozen_other, found, _BARS[dtype]) is not None:
        raise Undecided(f"the model's results are random ({problem})")
    one = _one_image(call)
    try:
        exact = _run(_in_dtype(model, torch.float64), _cast(one, torch.float64), state)
        own = _run(_in_dtype(model, dtype), _cast(one, dtype), state)
    except Exception as error:
        raise Undecided(f"the model does not run in another dtype ({error}); {problem}") from error
    frozen_one = _run(frozen, one, state)
    own_error, frozen_error = _error(own, exact), _error(frozen_one, exact)
    if frozen_error is not None and own_error is not None:
        return expected if frozen_error <= _FACTOR * own_error + 1e-6 else problem
    noisy = _run(model, _with_noise(call, _BARS[dtype] / 10), state)
    if own_error is None or _mismatch(noisy, expected, float("inf")) is not None:
        raise Undecided(f"rounding decides the model's results ({problem})")
    return problem


def _with_noise(call: Call, size: float) -> Call:
    def add(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
            return x
        finite = x[torch.isfinite(x)]  # infinities and NaN stay what they are
        return x + torch.randn_like(x) * (size * finite.abs().max()) if finite.numel() else x

    with random_state_kept():
        return pytree.tree_map(add, call)


def _error(found: Any, exact: Any) -> float | None:
    """The largest error over the largest element of each result; None where they are not alike."""
    if _mismatch(found, exact, float("inf")) is not None:
        return None
    worst = 0.0
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(exact), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            worst = max(worst, _relative(a, b))
    return worst


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    finite = torch.isfinite(b)
    if not finite.any():
        return 0.0
    size = b[finite].abs().max()
    off = (a - b)[finite].abs().max()
    return float(off / size) if size > 0 else float(off)


def _mismatch(found: Any, expected: Any, bar: float) -> str | None:
    """What differs between two results."""
    ours, spec = pytree.tree_flatten(found)
    theirs, other = pytree.tree_flatten(expected)
    if spec != other:
        return f"it gives {spec}, not {other}"
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(b, Tensor):
            if type(a) is not type(b):
                return f"it gives a {type(a).__name__}, not a {type(b).__name__}"
            if isinstance(b, (bool, int, float, str, type(None))) and a != b and bar != float("inf"):
                return f"it gives {a!r}, not {b!r}"
            continue
        if not isinstance(a, Tensor) or a.shape != b.shape:
            return f"it gives shape {tuple(getattr(a, 'shape', ()))}, not {tuple(b.shape)}"
        if not b.is_floating_point() or not a.is_floating_point():
            if a.dtype != b.dtype or not torch.equal(a, b):
                return f"it gives other {str(b.dtype).removeprefix('torch.')} values"
            continue
        if not torch.equal(torch.isnan(a), torch.isnan(b)):
            return "it gives NaN elsewhere"
        infinite = torch.isinf(b)
        if not torch.equal(a[infinite].double(), b[infinite].double()):
            return "it gives infinities elsewhere"
        off = _relative(a, b)
        if off > bar:
            return f"results are off by {off:.2g} of the largest"
    return None


# --- runs ------------------------------------------------------------------------------------------------


def _run(model: Callable[..., Any], call: Call, state: Any) -> Any:
    args, kwargs = cloned(call)
    with torch.no_grad(), random_state_kept():
        if state is not None:
            _set_random_state(state)
        else:
            _set_other_seeds()
        result = model(*args, **kwargs)
        return cloned((result, args, kwargs))  # the model may have changed its arguments


def cloned(tree: Any) -> Any:
    """A nest with copies of its tensors."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def _random_state() -> Any:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state(legacy=False)


def _set_random_state(state: Any) -> None:
    cpu, cuda, python, numpy = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpy)


def _set_other_seeds() -> None:
    torch.manual_seed(torch.initial_seed() + 1)
    random.seed(random.random())
    np.random.seed(np.random.randint(1 << 31))


@contextmanager
def random_state_kept() -> Iterator[None]:
    state = _random_state()
    try:
        yield
    finally:
        _set_random_state(state)


def _floating_dtype(call: Any) -> torch.dtype | None:
    floats = [x.dtype for x in pytree.tree_leaves(call) if isinstance(x, Tensor) and x.is_floating_point()]
    return floats[0] if floats else None


def _run_changed(model: nn.Module, call: Call, state: Any) -> tuple[Call, Any]:
    """Other values of the same kind, of half the batch where the model takes that; and what it gives."""

    def change(x: Any) -> Any:
        return 0.75 * x.flip(-1) if isinstance(x, Tensor) and x.is_floating_point() and x.dim() else x

    changed = pytree.tree_map(change, call)
    half = _first_images(changed, lambda n: (n + 1) // 2)
    if half is not None:
        with suppress(Exception):
            return half, _run(model, half, state)
    return changed, _run(model, changed, state)


def _one_image(call: Call) -> Call:
    one = _first_images(call, lambda n: 1)
    return call if one is None else one


def _first_images(call: Call, count: Callable[[int], int]) -> Call | None:
    """A call with fewer images; None where there is no batch of images alone."""
    leaves = pytree.tree_leaves(call)
    if not leaves or not all(isinstance(x, Tensor) and x.dim() in (4, 5) for x in leaves):
        return None
    sizes = {len(x) for x in leaves}
    if len(sizes) != 1 or sizes <= {0, 1}:
        return None
    return pytree.tree_map(lambda x: x[: count(len(x))], call)


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return replica(model, share=False).to(dtype)


def _cast(call: Call, dtype: torch.dtype) -> Call:
    return pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, call
    )


# --- copies and state --------------------------------------------------------------------------------------


def replica(model: nn.Module, share: bool = True) -> nn.Module:
    """A copy that may change its state.

    Args:
        share: whether it has the model's own parameters, which evaluation does not change.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if share:
            memo |= {id(p): p for p in module._parameters.values() if p is not None}
        for value in vars(module).values():
            # torch.nn.utils.weight_norm and pruning keep computed tensors, which cannot be deep-copied.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Give the modules of ``model`` back the attributes and buffers that they have now."""
    before = []
    for module in model.modules():
        if type(module).__module__.startswith("pooling_ext.freezing"):
            continue  # which have none
        fields = dict(vars(module))
        containers = {
            name: value.copy() for name, value in fields.items() if type(value) in (list, dict, set)
        }
        tensors = [*module._buffers.values(), *(v for v in fields.values() if type(v) is Tensor)]
        buffers = [(b, b.detach().clone()) for b in tensors if b is not None]
        before.append((module, fields, containers, buffers))
    try:
        yield
    finally:
        for module, fields, containers, buffers in before:
            own = vars(module)
            for name in own.keys() - fields.keys():
                del own[name]
            own.update(fields)
            for name, items in containers.items():
                _restore(own[name], items)
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _restore(container: Any, items: Any) -> None:
    if list(map(id, container)) != list(map(id, items)) or (
        isinstance(items, dict) and list(map(id, container.values())) != list(map(id, items.values()))
    ):
        container.clear()
        container.extend(items) if isinstance(container, list) else container.update(items)
