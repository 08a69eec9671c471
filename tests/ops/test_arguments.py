"""Arguments in every guise: NumPy's and PyTorch's numbers, sequences, other devices, and what is missing.

Where PyTorch has the operator its result or its kind of error is what ours must give.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from helpers import RANKS, assert_same, gradient, our_op, strides, torch_op
from torch import nn

pytest.importorskip("hypothesis")
from hypothesis import given, note, settings
from hypothesis import strategies as st

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.ops.conv_bn_act.implementations import from_size

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
META = torch.ones(4, device="meta")


def vectors(**changed):
    return {"running_mean": torch.zeros(4), "running_var": torch.ones(4)} | changed


# --- numbers ----------------------------------------------------------------------------------------------

TWOS = [np.int64(2), np.uint8(2), torch.tensor(2), torch.tensor([2]), [2], torch.Size([2])]


@pytest.mark.parametrize("two", TWOS, ids=repr)
@pytest.mark.parametrize("rank", RANKS, ids="{}d".format)
def test_integers(rank, two):
    x = torch.randn(2, 3, *(9,) * rank)
    for name in ("max_pool", "avg_pool"):
        ours, theirs = our_op(f"{name}{rank}d"), torch_op(f"{name}{rank}d")
        torch.testing.assert_close(ours(x, two), theirs(x, 2))
        torch.testing.assert_close(ours(x, 4, two, two), theirs(x, 4, 2, 2))
    torch.testing.assert_close(
        our_op(f"max_pool{rank}d")(x, 2, 2, 0, two), torch_op(f"max_pool{rank}d")(x, 2, 2, 0, 2)
    )
    torch.testing.assert_close(
        our_op(f"lp_pool{rank}d")(x, 2, two, two), torch_op(f"lp_pool{rank}d")(x, 2, 2, 2)
    )
    if rank == 1 or isinstance(two, np.integer) or (isinstance(two, torch.Tensor) and two.dim() == 0):
        for name in (f"adaptive_max_pool{rank}d", f"adaptive_avg_pool{rank}d"):
            torch.testing.assert_close(our_op(name)(x, two), torch_op(name)(x, 2))


@pytest.mark.parametrize(
    "size", [[2, None], np.array([2, 6]), torch.tensor([2, 6]), (torch.tensor(2), np.int8(6))], ids=repr
)
def test_output_sizes(size):
    assert_same(F.adaptive_avg_pool2d(X, size), F.adaptive_avg_pool2d(X, (2, 6)))
    assert_same(F.adaptive_max_pool2d(X, size), F.adaptive_max_pool2d(X, (2, 6)))


@pytest.mark.parametrize("divisor", [np.int64(3), torch.tensor(3), -(2**63)], ids=repr)
def test_divisors(divisor):
    expected = TF.avg_pool2d(X, 2, divisor_override=int(divisor))
    torch.testing.assert_close(F.avg_pool2d(X, 2, divisor_override=divisor), expected)
    torch.testing.assert_close(pooling_ext.AvgPool2d(2, divisor_override=divisor)(X), expected)


@pytest.mark.parametrize(
    "norm", [np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor(2), torch.tensor([2.0])], ids=repr
)
def test_norms(norm):
    x = X.abs()
    torch.testing.assert_close(F.lp_pool2d(x, norm, 2), TF.lp_pool2d(x, 2.0, 2))
    torch.testing.assert_close(F.lp_pool2d(x, norm, 2, safe=True), TF.lp_pool2d(x, 2.0, 2))


def test_a_norm_can_be_learned():
    found, expected = (torch.tensor(2.5, requires_grad=True) for _ in range(2))
    F.lp_pool2d(X.abs() + 0.1, found, 2).sum().backward()
    TF.lp_pool2d(X.abs() + 0.1, expected, 2).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)
    each = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1)
    found = F.lp_pool2d(X.abs(), each, 2, safe=True)
    for channel, norm in enumerate((1, 2, 3, 4)):
        torch.testing.assert_close(found[:, channel], TF.lp_pool2d(X[:, channel].abs(), norm, 2))


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25)], ids=repr)
@pytest.mark.parametrize("name", ["eps", "momentum"])
def test_numbers_of_batch_norm(name, number):
    for kind in (F.batch_norm_act, F.batch_norm_relu_max_pool):
        found, expected = vectors(), vectors()
        ours = kind(X, **found, training=True, **{name: number})
        torch.testing.assert_close(ours, kind(X, **expected, training=True, **{name: 0.25}))
        torch.testing.assert_close(found, expected)
    for training in (True, False):
        block, plain = (pooling_ext.ConvBNAct2d(4, 8, 3, **{name: n}).train(training) for n in (number, 0.25))
        plain.load_state_dict(block.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(block(X), plain(X))
        torch.testing.assert_close(block(X), plain(X))


def test_huge_strides():
    """One window fits, so the stride does not matter, nor is there memory for it."""
    for rank, name, ceil_mode in product(RANKS, ("max_pool", "avg_pool"), (False, True)):
        x, name = torch.randn(1, 2, *(6,) * rank), f"{name}{rank}d"
        usual = gradient(partial(torch_op(name), kernel_size=2, stride=100, ceil_mode=ceil_mode), x)
        for huge in (2**31 + 5, 2**62, 2**63 - 1):
            found = gradient(partial(our_op(name), kernel_size=2, stride=huge, ceil_mode=ceil_mode), x)
            torch.testing.assert_close(found, usual)
    with pytest.raises(ValueError, match="stride"):
        F.max_pool2d(X, 2, 2**63)


def test_earlier_calls_do_not_decide():
    """Tuples that are equal are not the same arguments."""
    F.max_pool2d(X, (1, 2))
    for kernel in ((1.0, 2), (True, 2), (1, 2.0)):
        with pytest.raises(TypeError, match="kernel_size"):
            F.max_pool2d(X, kernel)
    size = torch.tensor(2)
    assert F.max_pool2d(X, size).shape[-1] == 3
    size.fill_(3)
    assert F.max_pool2d(X, size).shape[-1] == 2


@pytest.mark.parametrize("value", [1, np.bool_(True), torch.tensor(True), None], ids=repr)
def test_flags_are_bools(value):
    with pytest.raises(TypeError, match="ceil_mode"):
        F.max_pool2d(X, 2, ceil_mode=value)
    with pytest.raises(TypeError, match="count_include_pad"):
        F.avg_pool2d(X, 2, count_include_pad=value)
    with pytest.raises(TypeError, match="training"):
        F.batch_norm_act(X, **vectors(), training=value)


# --- tensors and modules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_tensors_on_another_device_are_refused(name, training):
    value = torch.empty(X.shape, device="meta") if name == "residual" else META
    with pytest.raises(RuntimeError, match=name):
        F.batch_norm_act(X, **vectors(**{name: value}), training=training)
    if name == "residual":
        with pytest.raises(RuntimeError, match=name):
            F.add_relu_global_avg_pool(X, value)
        return
    with pytest.raises(RuntimeError, match=name):
        F.batch_norm_relu_max_pool(X, **vectors(**{name: value}), training=training)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("size", [6, 64], ids=["small", "folded"])
@pytest.mark.parametrize("least", [0, 1 << 40], ids=["together", "one by one"])
def test_blocks_refuse_vectors_on_another_device(name, size, least):
    block = pooling_ext.ConvBNAct2d(4, 4, 3).eval().requires_grad_(False)
    value = nn.Parameter(META, requires_grad=False) if name in ("weight", "bias") else META
    setattr(block.bn, name, value)
    with from_size(least), pytest.raises(RuntimeError, match=name):
        block(torch.randn(2, 4, size, size))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_blocks_take_batches(training):
    block = pooling_ext.ConvBNAct2d(4, 8, 3, padding=1).train(training)
    with pytest.raises(ValueError, match="4D"):
        block(torch.randn(4, 8, 8))
    with pytest.raises(ValueError, match="4D"):
        F.conv_bn_act(block.conv, nn.SyncBatchNorm(8).train(training), torch.randn(4, 8, 8))
    with pytest.raises(ValueError, match="4D"):
        F.conv_bn_act(block.conv, nn.BatchNorm1d(8).train(training), X)


@pytest.mark.parametrize("given", ["running_mean", "running_var"])
def test_one_running_statistic_alone_is_refused(given):
    statistics = {"running_mean": None, "running_var": None} | {given: torch.ones(4)}
    for training in (True, False):
        for function in (F.batch_norm_act, F.batch_norm_relu_max_pool):
            with pytest.raises(ValueError, match="running"):
                function(X, **statistics, training=training)


@pytest.mark.parametrize(
    "wrong",
    [None, nn.Identity(), nn.InstanceNorm2d(4), torch.relu],
    ids=["None", "Identity", "InstanceNorm2d", "function"],
)
def test_what_is_no_batch_norm_is_named(wrong):
    conv = nn.Conv2d(4, 4, 3)
    with pytest.raises(TypeError, match="bn must"):
        F.conv_bn_act(conv, wrong, X)
    with pytest.raises(TypeError, match="conv must"):
        F.conv_bn_act(None, nn.BatchNorm2d(4), X)


def test_a_batch_norm_with_a_forward_of_its_own_runs_it():
    conv, norm = nn.Conv2d(4, 4, 3, padding=1), pooling_ext.BatchNormAct2d(4)
    expected = TF.relu(norm(conv(X)) - X)
    torch.testing.assert_close(F.conv_bn_act(conv, norm, X, -X), expected)
    lazy = nn.LazyBatchNorm2d()
    assert F.conv_bn_act(conv, lazy, X).shape == X.shape and lazy.num_features == 4


def test_a_patched_model_takes_such_numbers():
    x = torch.randn(4, 16, 32, 32)
    for options in ({"eps": np.float32(1e-3)}, {"momentum": torch.tensor(0.1)}):
        model = nn.Sequential(nn.BatchNorm2d(16, **options), nn.ReLU())
        plain = nn.Sequential(nn.BatchNorm2d(16, **{k: float(v) for k, v in options.items()}), nn.ReLU())
        pooling_ext.patch(model)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compile_with_a_tensor_given_twice(training):
    torch._dynamo.reset()
    shared = torch.rand(4, requires_grad=True)

    def norm(x):
        return F.batch_norm_act(x, **vectors(), weight=shared, bias=shared, residual=x, training=training)

    def tail(x):
        return F.add_relu_global_avg_pool(x, x)

    for function in (norm, tail):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(gradient(compiled, X), gradient(function, X))


# --- any argument, beside PyTorch's -----------------------------------------------------------------------

ints = st.sampled_from([0, 1, 2, 2, 3, 3, -1, 9, 2.0, None, True, "2"])


def disguised(number: object) -> st.SearchStrategy:
    if type(number) is not int or abs(number) > 100:
        return st.just(number)
    return st.sampled_from([number, number, np.int64(number), np.int8(number), torch.tensor(number)])


@st.composite
def arguments(draw, rank: int):
    """A number, or a list or tuple of some, that PyTorch may or may not take."""
    one = ints.flatmap(disguised)
    if draw(st.booleans()):
        return draw(one | st.just(2**63))  # which in a list is a TypeError to PyTorch
    length = rank if draw(st.integers(0, 5)) else draw(st.integers(0, 4))
    return draw(st.sampled_from([list, tuple]))(draw(st.lists(one, min_size=length, max_size=length)))


def outcome(function, x, *args, **kwargs):
    try:
        return gradient(lambda x: function(x, *args, **kwargs), x)
    except Exception as error:
        return error


def ours_alone(name: str, options: dict, rank: int) -> bool:
    """Whether ours takes what PyTorch does not."""
    if name.startswith("lp_pool"):
        return isinstance(options["kernel_size"], (list, tuple, torch.Tensor))
    if "adaptive" in name:
        size = options["output_size"]
        return (
            size is None
            or not isinstance(size, (int, list, tuple))
            or (rank == 1 and size in ([None], (None,)))
        )
    padding = options["padding"]
    return isinstance(padding, str) or (isinstance(padding, (list, tuple)) and len(padding) == 2 * rank)


@given(st.data())
@settings(max_examples=60)
@pytest.mark.parametrize("rank", RANKS, ids="{}d".format)
@pytest.mark.parametrize(
    "kind", ["max_pool", "avg_pool", "lp_pool", "adaptive_max_pool", "adaptive_avg_pool"]
)
@pytest.mark.usefixtures("one_thread")
def test_any_argument(kind, rank, data):
    name = f"{kind}{rank}d"
    good: dict = (
        {"output_size": 2} if "adaptive" in kind else {"kernel_size": 3, "stride": 2, "ceil_mode": False}
    )
    if kind in ("max_pool", "avg_pool"):
        good["padding"] = 1
    if kind == "lp_pool":
        good["norm_type"] = 2
    # One at a time: of several that are wrong either may be named first.
    odd = data.draw(st.sampled_from(sorted(good)))
    values = {"ceil_mode": [True, 1], "norm_type": [1, np.float32(2), torch.tensor(3), 0, None]}
    options = good | {odd: data.draw(st.sampled_from(values[odd]) if odd in values else arguments(rank))}
    note(f"{name} {options}")
    x = torch.rand(2, 3, *(6,) * rank) + 0.5
    ours, theirs = outcome(our_op(name), x, **options), outcome(torch_op(name), x, **options)
    if ours_alone(name, options, rank) and isinstance(theirs, Exception):
        return
    if isinstance(theirs, Exception):
        # As PyTorch's, or named by the argument's value where PyTorch says RuntimeError.
        assert isinstance(ours, (type(theirs), ValueError, TypeError)), (ours, theirs)
        assert not isinstance(theirs, TypeError) or isinstance(ours, TypeError), (ours, theirs)
        return
    assert not isinstance(ours, Exception), ours
    torch.testing.assert_close(ours, theirs)
    assert strides(ours[0]) == strides(theirs[0])
