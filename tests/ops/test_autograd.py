"""Derivatives: reverse and forward mode, second order, torch.func, what is saved, determinism."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as TF
from helpers import (
    assert_same,
    gradient,
    here,
    integers,
    interpreted,
    our_op,
    torch_op,
    with_layout,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import pooling_ext
import pooling_ext.functional as F

SIZES = {1: (7,), 2: (5, 4), 3: (3, 4, 3)}


def distinct(*shape: int) -> torch.Tensor:
    """Values far apart, so that no small step changes a maximum; none of them is 0."""
    values = torch.randperm(math.prod(shape)).to(torch.float64) - math.prod(shape) // 2 + 0.5
    return (values / 4).reshape(shape)


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.5


def _cases():
    for rank in (1, 2, 3):
        for name, make, args, kwargs in (
            ("max_pool", distinct, (3, 2, 1), {}),
            ("max_pool", distinct, (2, 1), {"dilation": 2}),
            ("max_pool", distinct, (2,), {"padding": "same"}),
            ("avg_pool", distinct, (3, 2, 1), {}),
            ("avg_pool", distinct, (2,), {"ceil_mode": True}),
            ("avg_pool", distinct, (2, 2, 1), {"count_include_pad": False}),
            ("adaptive_max_pool", distinct, (2,), {}),
            ("adaptive_avg_pool", distinct, (2,), {}),
            ("lp_pool", positive, (1, 2), {}),
            ("lp_pool", positive, (2, 2), {"ceil_mode": True}),
            ("lp_pool", positive, (3, 2, 1), {}),
            ("lp_pool", positive, (2.5, 2), {}),
            ("lp_pool", positive, (math.inf, 2), {}),
            ("lp_pool", distinct, (1, 2), {"safe": True}),
            ("lp_pool", distinct, (2, 2), {"safe": True}),
            ("lp_pool", distinct, (3, 2), {"safe": True}),
            ("lp_pool", distinct, (1.5, 2), {"safe": True}),
        ):
            if (rank > 1 and name in ("max_pool", "adaptive_avg_pool")) or rank == 2 or len(args) == 3:
                options = "".join(f"-{key}={value}" for key, value in kwargs.items())
                label = f"{name}{rank}d-{','.join(map(str, args))}{options}"
                x = make(2, 2, *SIZES[rank])
                yield pytest.param(
                    lambda x, n=f"{name}{rank}d", a=args, k=kwargs: our_op(n)(x, *a, **k), x, id=label
                )
    yield pytest.param(F.global_avg_pool2d, distinct(2, 2, 3, 4), id="global_avg_pool2d")
    yield pytest.param(lambda x: F.global_max_pool2d(x, False), distinct(2, 2, 3, 4), id="global_max_pool2d")
    yield pytest.param(lambda x: F.global_lp_pool2d(x, 3), positive(2, 2, 3, 4), id="global_lp_pool2d")
    yield pytest.param(
        lambda x: F.global_lp_pool2d(x, 3, safe=True), distinct(2, 2, 3, 4), id="global_lp_pool2d-safe"
    )


CASES = list(_cases())
#: One of each operator and formula, for the slower checks.
FEW = [
    case for case in CASES if "2d" in case.id and not any(s in case.id for s in ("=2", "mode", "pad", "2.5"))
]


#: One of each kind of kernel, for interpreted ones.
KINDS = (
    "max_pool2d-2,1-dilation=2",
    "avg_pool2d-3,2,1",
    "adaptive_max_pool2d-2",
    "adaptive_avg_pool2d-2",
    "lp_pool2d-3,2",
    "global_avg_pool2d",
    "global_max_pool2d",
)


@pytest.mark.parametrize(
    "backend, function, x",
    [
        pytest.param(backend, *case.values, id=f"{case.id}-{backend}", marks=marks)
        for backend, marks in (
            ("default", ()),
            ("cuda", ()),
            ("triton", ()),
            ("cuda-cuda", pytest.mark.gpu),
            ("triton-cuda", pytest.mark.gpu),
        )
        for case in CASES
        if backend != "triton" or case.id in KINDS or case.id.startswith("lp_pool2d-3,2-safe")
    ],
    indirect=["backend"],
)
def test_gradcheck(backend, function, x):
    """Reverse mode and forward mode against differences, and both under vmap."""
    gradcheck(
        function,
        (here(x.clone()).requires_grad_(),),
        check_forward_ad=True,
        check_batched_grad=True,
        fast_mode=interpreted(backend),
    )


@pytest.mark.parametrize("function, x", CASES)
def test_gradgradcheck(function, x):
    gradgradcheck(function, (x.clone().requires_grad_(),), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced", "expanded"])
@pytest.mark.parametrize(
    "name, args", [("max_pool2d", (3, 2, 1)), ("avg_pool2d", (3, 2, 1)), ("lp_pool2d", (2, 2))]
)
def test_gradcheck_of_layouts(name, args, layout):
    x = with_layout(positive(2, 3, 5, 4) if name == "lp_pool2d" else distinct(2, 3, 5, 4), layout)
    # The base is the variable, since differences in an expanded tensor would move several elements.
    base = x.contiguous()
    assert gradcheck(lambda b: our_op(name)(with_layout(b, layout), *args), (base.requires_grad_(),))


@pytest.mark.parametrize("function, x", FEW)
def test_jvp_and_vjp_agree(function, x):
    """<w, J v> == <J' w, v>, by torch.func."""
    v = torch.randn_like(x)
    output, tangent = jvp(function, (x,), (v,))
    w = torch.randn_like(output)
    again, pull = vjp(function, x)
    assert torch.equal(again, output) and torch.equal(output, function(x))
    torch.testing.assert_close((w * tangent).sum(), (pull(w)[0] * v).sum())


@pytest.mark.parametrize("function, x", FEW)
def test_vmap(function, x):
    """Over any dimension, nested, and over samples without a batch."""
    many = torch.stack([x, x.flip(-1), x.flip(0)])
    one_by_one = torch.stack([function(y) for y in many])
    torch.testing.assert_close(vmap(function)(many), one_by_one)
    torch.testing.assert_close(vmap(function, in_dims=2)(many.movedim(0, 2)), one_by_one)
    torch.testing.assert_close(vmap(function, out_dims=1)(many), one_by_one.movedim(0, 1))
    torch.testing.assert_close(vmap(vmap(function))(many), one_by_one)


@pytest.mark.parametrize("name", ["max_pool2d", "adaptive_max_pool2d"])
def test_vmap_with_indices(name):
    x = distinct(3, 2, 2, 6, 6)
    output, indices = vmap(lambda x: our_op(name)(x, 2, return_indices=True))(x)
    expected = our_op(name)(x.flatten(0, 1), 2, return_indices=True)
    assert torch.equal(output.flatten(0, 1), expected[0])
    assert torch.equal(indices.flatten(0, 1), expected[1])


def test_vmap_over_something_else():
    """The pooled tensor need not be the one that is mapped."""
    x, scales = distinct(1, 2, 4, 4), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    actual = vmap(lambda scale: F.max_pool2d(x, 2) * scale)(scales)
    assert torch.equal(actual, F.max_pool2d(x, 2) * scales[:, None, None, None, None])


@pytest.mark.parametrize("function, x", FEW)
def test_jacobians(function, x):
    x = x[:1]
    forward, reverse = jacfwd(function)(x), jacrev(function)(x)
    torch.testing.assert_close(forward, reverse)
    torch.testing.assert_close(reverse, torch.autograd.functional.jacobian(function, x))


@pytest.mark.parametrize("safe", [False, True], ids=["torch", "safe"])
def test_hessian(safe):
    """Second derivatives by forward over reverse; max and average pooling have none of their own."""
    x = positive(1, 1, 4, 4)
    theirs = hessian(lambda x: TF.lp_pool2d(x, 3, 2).sum())(x)
    torch.testing.assert_close(hessian(lambda x: F.lp_pool2d(x, 3, 2, safe=safe).sum())(x), theirs)
    for name in ("max_pool2d", "avg_pool2d"):
        actual = hessian(lambda x, name=name: our_op(name)(x, 2).pow(3).sum())(x)
        torch.testing.assert_close(actual, hessian(lambda x, name=name: torch_op(name)(x, 2).pow(3).sum())(x))


def test_per_sample_gradients():
    """The idiom of torch.func: vmap over grad over functional_call."""

    def network(pool):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), pool, torch.nn.Flatten(), torch.nn.Linear(36, 2))

    x = torch.randn(5, 3, 8, 8)

    def gradients(model):
        def loss(parameters, sample):
            return functional_call(model, parameters, (sample[None],)).square().sum()

        return vmap(grad(loss), in_dims=(None, 0))(dict(model.named_parameters()), x)

    for ours, theirs in (
        (pooling_ext.MaxPool2d(2), torch.nn.MaxPool2d(2)),
        (pooling_ext.AvgPool2d(2), torch.nn.AvgPool2d(2)),
        (pooling_ext.LPPool2d(2, 2), torch.nn.LPPool2d(2, 2)),
    ):
        torch.testing.assert_close(gradients(network(ours)), gradients(network(theirs)))


def saved_bytes(function, x) -> list[int]:
    """The sizes of what autograd keeps for the backward of ``function(x)``."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        function(x)
    return sizes


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_resnet_stem_saves_one_byte_an_output(dtype):
    x = torch.randn(2, 64, 112, 112, dtype=dtype, requires_grad=True)
    outputs = 2 * 64 * 56 * 56
    assert saved_bytes(lambda x: F.max_pool2d(x, 3, 2, 1), x) == [outputs]
    assert saved_bytes(pooling_ext.MaxPool2d(3, 2, 1), x) == [outputs]
    # PyTorch keeps int64 indices, and its input.
    assert sum(saved_bytes(lambda x: TF.max_pool2d(x, 3, 2, 1), x)) >= 8 * outputs


@pytest.mark.native
@pytest.mark.parametrize(
    "kernel, bytes_an_output", [((15, 17), 1), ((16, 16), 4)], ids=["255-places", "256-places"]
)
def test_larger_windows_save_four_bytes(kernel, bytes_an_output):
    x = torch.randn(1, 2, 20, 20, requires_grad=True)
    outputs = F.max_pool2d(x, kernel, 1).numel()
    assert saved_bytes(lambda x: F.max_pool2d(x, kernel, 1), x) == [outputs * bytes_an_output]


@pytest.mark.native
def test_averages_save_nothing():
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    for name, args in (("avg_pool2d", (3,)), ("adaptive_avg_pool2d", (2,)), ("global_avg_pool2d", ())):
        assert saved_bytes(lambda x, name=name, args=args: our_op(name)(x, *args), x) == []


def test_nothing_is_saved_without_gradients():
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    with torch.no_grad():
        assert saved_bytes(lambda x: F.max_pool2d(x, 3), x) == []
    assert saved_bytes(lambda x: F.max_pool2d(x, 3), x.detach()) == []
    with torch.inference_mode():
        assert not F.max_pool2d(torch.randn(1, 1, 4, 4), 2).requires_grad


@pytest.mark.parametrize(
    "name, args", [("max_pool", (3, 2, 1)), ("avg_pool", (3, 2, 1)), ("lp_pool", (2, 3, 2))]
)
@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}d".format)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_backward_is_deterministic(layout, rank, name, args):
    """The setting that refuses whatever is not is on throughout the suite; twice gives the same bits."""
    assert torch.are_deterministic_algorithms_enabled()
    x = with_layout(torch.randn(4, 8, *(9,) * rank), layout)
    assert_same(
        gradient(lambda x: our_op(f"{name}{rank}d")(x, *args), x),
        gradient(lambda x: our_op(f"{name}{rank}d")(x, *args), x),
    )


@pytest.mark.parametrize("name", ["adaptive_max_pool", "adaptive_avg_pool"])
@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}d".format)
def test_adaptive_backward_is_deterministic(rank, name):
    x = torch.randn(4, 8, *(9,) * rank)
    pool = our_op(f"{name}{rank}d")
    assert_same(gradient(lambda x: pool(x, 4), x), gradient(lambda x: pool(x, 4), x))


def test_backward_twice_and_freed_graph():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    output = F.max_pool2d(x, 2).sum()
    output.backward(retain_graph=True)
    output.backward()
    assert x.grad is not None and x.grad.sum() == 8
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


def test_gradient_of_the_gradient_reaches_the_incoming_one():
    x = integers((1, 1, 6, 6), torch.float64).requires_grad_()
    incoming = torch.ones(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    for pool in (F.max_pool2d, F.avg_pool2d):
        (first,) = torch.autograd.grad(pool(x, 2), x, incoming, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), incoming)
        # The derivative of sum over windows of g ** 2 times the sum of squared weights.
        weights = 2.0 if pool is F.max_pool2d else 0.5
        assert torch.equal(second, torch.full_like(second, weights))


def test_gradients_under_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(2, 3, 9, 9)
    for pool in (F.max_pool2d, F.avg_pool2d):
        actual = gradient(lambda x, pool=pool: checkpoint(pool, x, 3, 2, 1, use_reentrant=False), x)
        assert_same(actual, gradient(lambda x, pool=pool: pool(x, 3, 2, 1), x))
