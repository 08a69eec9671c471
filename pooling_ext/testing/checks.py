"""What is checked of every :class:`~pooling_ext.testing.opspec.OpSpec`.

Each check takes a case and raises AssertionError with the first difference. None needs pytest: the stable
ABI's smoke test and processes of other instruction sets call them too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, jvp, vmap
from torch.library import opcheck

from .opspec import ACTIVATIONS, BUFFERS, LowLevelCall, OpCase, Tensors, differentiable, first, with_layout
from .tolerances import assert_close

Results = dict[str, Tensor]


def results(
    function: Callable[..., Any],
    tensors: Tensors,
    grad: Tensor | None = None,
    grad_layout: str = "contiguous",
) -> tuple[Results, Tensor | None]:
    """Outputs, gradients and updated buffers of a call by name, and the output's gradient that was used.

    Args:
        function: of ``tensors`` by name.
        tensors: buffers among them are copied.
        grad: the output's gradient; small whole numbers of one sign by default, whose sums are exact.
        grad_layout: of that, one of :data:`~pooling_ext.testing.opspec.LAYOUTS`.
    """
    names = differentiable(tensors)
    mine = {name: x.detach().clone() if name in BUFFERS else x.detach() for name, x in tensors.items()}
    leaves = [mine[name].requires_grad_() for name in names]
    outcome = function(**mine)
    outputs = outcome if isinstance(outcome, (tuple, list)) else (outcome,)
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if leaves and outputs[0].requires_grad:
        output = outputs[0]
        if grad is None:
            grad = with_layout(torch.randint(1, 5, output.shape).to(output.dtype), grad_layout)
        gradients = torch.autograd.grad(output, leaves, grad.to(output.dtype))
        found |= {f"gradient of {name}": x for name, x in zip(names, gradients, strict=True)}
    return found | {name: mine[name] for name in BUFFERS if name in mine}, grad


def check_values(
    case: OpCase, tensors: Tensors, keeps_format: bool = True, grad_layout: str = "contiguous"
) -> Results:
    """Outputs, gradients and buffers beside the float64 reference; without gradients the same bits.

    Args:
        case: the operator and its options.
        tensors: its arguments, as :meth:`OpCase.tensors` makes them.
        keeps_format: whether outputs have the input's memory format, where the spec says so. PyTorch's 3-d
            average does not keep it.
        grad_layout: of the output's gradient.
    """
    spec = case.spec
    with torch.no_grad():
        alone = case.ours(**{n: x.clone() if n in BUFFERS else x for n, x in tensors.items()})
    actual, grad = results(case.ours, tensors, grad_layout=grad_layout)
    wide = {name: x.to(torch.float64) for name, x in tensors.items()}
    wanted, _ = results(case.theirs, wide, grad)
    # Integers have no gradients; the reference, in float64, may.
    wanted = {name: x for name, x in wanted.items() if name in actual}
    assert actual.keys() == wanted.keys(), (set(actual), set(wanted))
    input = tensors["input"]
    assert first(alone).dtype == input.dtype, (first(alone).dtype, input.dtype)
    if keeps_format and spec.keeps_format and first(alone).dim() == input.dim():
        assert suggest_memory_format(first(alone)) == suggest_memory_format(input), "memory format"
    off = spec.off.get(input.dtype, 0.0)
    same = f"{case} without gradients"
    slack = off * _largest(wanted["output 0"])
    assert_close(first(alone), wanted["output 0"], spec.exact, spec.scale, same, slack)
    for name, value in actual.items():
        scale = spec.scale if name.startswith("output") else spec.gradient_scale
        exact = spec.exact or not value.is_floating_point()
        slack = off * _largest(wanted[name])
        assert_close(value, wanted[name], exact, scale, f"{case}, {name}", slack)
        if name.startswith("gradient"):
            assert value.dtype == tensors[name.removeprefix("gradient of ")].dtype, name
    return actual


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


# --- derivatives --------------------------------------------------------------------------------


def _function(case: OpCase, tensors: Tensors, theirs: bool = False) -> tuple[Callable, tuple[Tensor, ...]]:
    """A function of the arguments that have gradients, by position, and these."""
    names = differentiable(tensors)
    constants = {name: x for name, x in tensors.items() if name not in names}
    call = case.theirs if theirs else case.ours

    def function(*args: Tensor) -> Tensor:
        return first(call(**dict(zip(names, args, strict=True)), **constants))

    return function, tuple(tensors[name].detach() for name in names)


def check_first_derivatives(case: OpCase, tensors: Tensors, fast: bool = False) -> None:
    """Reverse mode and forward mode against differences, and reverse mode under vmap; float64.

    Args:
        case: the operator and its options.
        tensors: its arguments, small ones.
        fast: compare along one random direction only.
    """
    function, args = _function(case, tensors)
    leaves = tuple(x.requires_grad_() for x in args)
    gradcheck(
        function, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=fast or case.spec.fast
    )


def check_second_derivatives(case: OpCase, tensors: Tensors) -> None:
    """Reverse over reverse and forward over reverse against differences; float64."""
    function, args = _function(case, tensors)
    leaves = tuple(x.requires_grad_() for x in args)
    gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)


def check_transforms(case: OpCase, tensors: Tensors) -> None:
    """jvp, jacfwd, jacrev and vmap (over any dimension and nested) of torch.func, beside the reference."""
    function, args = _function(case, tensors)
    theirs, _ = _function(case, tensors, theirs=True)
    tangents = tuple(torch.randn_like(x) for x in args)
    close = torch.testing.assert_close
    actual, wanted = jvp(function, args, tangents), jvp(theirs, args, tangents)
    for one, other in zip(actual, wanted, strict=True):
        close(one, other, rtol=1e-6, atol=1e-8)
    close(jacrev(function)(*args), jacrev(theirs)(*args), rtol=1e-6, atol=1e-8)
    close(jacfwd(function)(*args), jacrev(theirs)(*args), rtol=1e-6, atol=1e-8)
    x, others = args[0], args[1:]
    many = torch.stack([x, x.flip(-1), x.flip(0)])

    def alone(x: Tensor) -> Tensor:
        return function(x, *others)

    one_by_one = torch.stack([alone(y) for y in many])
    close(vmap(alone)(many), one_by_one)
    close(vmap(alone, in_dims=2)(many.movedim(0, 2)), one_by_one)
    close(vmap(alone, out_dims=1)(many), one_by_one.movedim(0, 1))
    twice = vmap(vmap(alone))(torch.stack([many, many.flip(0)]))
    close(twice, torch.stack([one_by_one, one_by_one.flip(0)]))


def check_layout(case: OpCase, tensors: Tensors, layout: str) -> None:
    """Outputs and gradients are those of contiguous arguments, to the order of additions."""
    wanted, grad = results(case.ours, tensors)
    moved = {name: with_layout(x, layout) if name in ACTIVATIONS else x for name, x in tensors.items()}
    for name, value in results(case.ours, moved, grad)[0].items():
        torch.testing.assert_close(
            value,
            wanted[name],
            rtol=1e-10,
            atol=1e-10,
            check_stride=False,
            msg=lambda text, n=name: f"{n}: {text}",
        )


def check_gradient_penalty(case: OpCase, tensors: Tensors) -> None:
    """The gradient of squared gradients beside the reference's, which is where rounding shows most."""
    found = []
    for theirs, dtype in ((False, None), (True, torch.float64)):
        wide = {name: x if dtype is None else x.to(dtype) for name, x in tensors.items()}
        function, args = _function(case, wide, theirs)
        leaves = [x.requires_grad_() for x in args]
        output = function(*leaves)
        grad = (torch.arange(output.numel()) % 5 - 2).reshape(output.shape).to(output.dtype)
        gradients = torch.autograd.grad(output, leaves, grad, create_graph=True)
        penalty = torch.stack([x.double().square().sum() for x in gradients]).sum()
        # That of a pool does not depend on its input.
        known = penalty.requires_grad
        second = torch.autograd.grad(penalty, leaves, allow_unused=True) if known else [None] * len(leaves)
        found.append([*gradients, *(torch.zeros(()) if x is None else x for x in second)])
    # Terms as large as the first gradients may cancel in the second.
    scale = max(map(_largest, found[1])) * torch.finfo(tensors["input"].dtype).eps
    for one, other in zip(*found, strict=True):
        other = other.expand_as(one) if other.dim() == 0 else other
        one = one.expand_as(other) if one.dim() == 0 else one
        assert_close(
            one, other, scale=case.spec.gradient_scale, slack=8 * scale, what=f"{case}, gradient penalty"
        )


def check_written_in_place(case: OpCase, tensors: Tensors) -> None:
    """The output may be overwritten before backward, as by an activation, wherever the reference's may.

    Autograd refuses to write into outputs of a Function that are views.
    """
    names = differentiable(tensors)

    def doubled(call: Callable[..., Any], dtype: torch.dtype | None = None) -> tuple[Tensor, ...] | None:
        mine = {name: x.detach().to(dtype or x.dtype, copy=True) for name, x in tensors.items()}
        leaves = [mine[name].requires_grad_() for name in names]
        output = first(call(**mine)).mul_(2)
        try:
            return torch.autograd.grad(output, leaves, torch.ones_like(output))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error), error
            return None

    function, args = _function(case, tensors)
    output = function(*(x.requires_grad_() for x in args))
    wanted = torch.autograd.grad(output, args, torch.full_like(output, 2.0))
    found = doubled(case.ours)
    if found is None:
        assert doubled(case.theirs, torch.float64) is None, f"{case}: the output is kept for backward"
        return
    for name, one, other in zip(names, found, wanted, strict=True):
        assert torch.equal(one, other), f"{case}: gradient of {name}"


def check_checkpointing(case: OpCase, tensors: Tensors) -> None:
    """Activation checkpointing and a retained graph give the same bits as a plain backward."""
    from torch.utils.checkpoint import checkpoint

    function, args = _function(case, tensors)
    leaves = [x.requires_grad_() for x in args]
    output = function(*leaves)
    grad = torch.randint(1, 5, output.shape).to(output.dtype)
    wanted = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(output, leaves, grad)
    kept = checkpoint(function, *leaves, use_reentrant=False)
    for one, other, third in zip(wanted, again, torch.autograd.grad(kept, leaves, grad), strict=True):
        assert torch.equal(one, other) and torch.equal(one, third), f"{case}: other bits"


def check_released(case: OpCase, tensors: Tensors) -> None:
    """Backward releases what forward kept: a second one without a retained graph raises."""
    function, args = _function(case, tensors)
    leaves = [x.requires_grad_() for x in args]
    output = function(*leaves).sum()
    output.backward()
    try:
        output.backward()
    except RuntimeError as error:
        assert "second time" in str(error), f"{case}: {error}"
    else:
        raise AssertionError(f"{case}: a second backward did not raise")


# --- torch.compile and its like -----------------------------------------------------------------


def check_compiled(case: OpCase, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> int:
    """Compiled as one graph, results and gradients are those uncompiled; the graphs that it took.

    Args:
        case: the operator and its options.
        shapes: of the input, in turn; more than one compiles for dynamic shapes.
        dtype: of the input.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(case.ours, fullgraph=True, backend=counter)

    def compiled(**tensors: Tensor) -> Any:
        if len(shapes) > 1:  # the sides alone: dynamic=True would take the options for dynamic too
            for name in set(ACTIVATIONS) & tensors.keys():
                x = tensors[name]
                torch._dynamo.maybe_mark_dynamic(x, [0, *range(2, x.dim())])
        return graph(**tensors)

    for shape in shapes:
        tensors = case.tensors(shape, dtype, buffers=False)
        with torch.no_grad():
            alone = first(compiled(**tensors))
            _assert_unchanged(case, alone, first(case.ours(**tensors)), "compiled")
        wanted, grad = results(case.ours, tensors)
        actual, _ = results(compiled, tensors, grad)
        for name, value in actual.items():
            _assert_unchanged(case, value, wanted[name], f"compiled, {name}")
    return counter.frame_count


def check_exported(case: OpCase, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
    """torch.export's program gives the operator's results."""

    class Model(torch.nn.Module):
        def forward(self, tensors: Tensors) -> Tensor:
            return first(case.ours(**tensors))

    tensors = case.tensors(shape, dtype, buffers=False)
    program = torch.export.export(Model(), (tensors,))
    _assert_unchanged(case, program.module()(tensors), first(case.ours(**tensors)), "exported")


def _assert_unchanged(case: OpCase, actual: Tensor, wanted: Tensor, what: str) -> None:
    """The same bits in the same layout; close to them where a program may have PyTorch's operators."""
    found, expected = description(actual), description(wanted)
    assert found == expected, f"{case}, {what}: {found}, not {expected}"
    tolerance = 1e-5 if case.spec.changes_in_programs else 0.0
    torch.testing.assert_close(
        actual,
        wanted,
        rtol=tolerance,
        atol=tolerance * max(_largest(wanted), 1.0),
        equal_nan=True,
        msg=lambda text: f"{case}, {what}: {text}",
    )


def check_fake(case: OpCase, tensors: Tensors) -> None:
    """Meta and fake tensors are described as the real ones are, gradients too."""
    real, grad = results(case.ours, tensors)
    wanted = {name: description(x) for name, x in real.items()}
    with torch.device("meta"):
        meta, _ = results(case.ours, {name: x.to("meta") for name, x in tensors.items()}, _meta(grad))
    _same(meta, wanted, f"{case} of meta tensors")
    with FakeTensorMode() as mode:
        fakes: Tensors = {name: mode.from_tensor(x) for name, x in tensors.items()}
        fake, _ = results(case.ours, fakes, None if grad is None else mode.from_tensor(grad))
    _same(fake, wanted, f"{case} of fake tensors")


def _same(actual: Results, wanted: dict[str, Any], what: str) -> None:
    found = {name: description(x) for name, x in actual.items()}
    assert found == wanted, f"{what}: {found}, not {wanted}"


def _meta(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to("meta")


def description(x: Tensor) -> tuple[Any, ...]:
    """Shape, strides that mean something, dtype and offset."""
    steps = [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1] if x.numel() else []
    return tuple(x.shape), steps, x.dtype, x.storage_offset()


def check_autocast(case: OpCase, tensors: Tensors) -> None:
    """Autocast leaves the dtype alone, as for PyTorch's pools and batch norms."""
    wanted, grad = results(case.ours, tensors)
    with torch.autocast(tensors["input"].device.type, torch.bfloat16):
        actual, _ = results(case.ours, tensors, grad)
    for name, value in actual.items():
        assert value.dtype == wanted[name].dtype, f"{case} under autocast, {name}"
        assert torch.equal(value, wanted[name]), f"{case} under autocast, {name}"


#: Derivatives live above the low-level operators, in autograd Functions.
CHECKS_OF_OPERATORS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def check_low_level(call: LowLevelCall) -> None:
    """Schema, fake tensors and tracing of a low-level operator, by ``opcheck``.

    One that gives a number by the values is in no compiled graph: its schema alone is checked.
    """
    _, operator, args = call
    overload = operator.default
    is_data = any(isinstance(output.type, torch.TensorType) for output in overload._schema.returns)
    made = is_data or not overload._schema.returns
    opcheck(overload, args, test_utils=CHECKS_OF_OPERATORS if made else CHECKS_OF_OPERATORS[:1])
