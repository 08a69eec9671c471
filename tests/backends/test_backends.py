"""Which backend takes a call, how to choose one, and what goes to PyTorch's own operators."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as TF
from helpers import BACKENDS, INTEGERS, NATIVE, assert_same, dtype_id, gradient, our_op, run_python, torch_op
from torch import nn

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.testing import reference
from pooling_ext.testing.tolerances import assert_close
from pooling_ext.windows import adaptive_windows, fixed_windows

X = torch.arange(32.0).reshape(1, 2, 4, 4)


@pytest.mark.native
def test_explain_names_the_backend():
    explanation = pooling_ext.explain(F.max_pool2d, X, 2)
    assert explanation.backend == "cpu"
    assert str(explanation) == "max_pool: cpu"


def test_explain_says_why_not():
    explanation = pooling_ext.explain(F.avg_pool2d, X.long(), 2)
    assert explanation.backend == "aten"
    if NATIVE:
        assert str(explanation) == (
            "avg_pool: aten\n  not cpu: avg_pool has no CPU kernel for torch.int64\n"
            "  not cuda: the input is on cpu\n  not triton: the input is on cpu"
        )
    (decision,) = explanation.decisions
    assert set(decision.declined) == {"cpu", "cuda", "triton"}


@pytest.mark.native
def test_explain_takes_modules_and_whole_models():
    model = nn.Sequential(pooling_ext.MaxPool2d(2), nn.ReLU(), pooling_ext.GlobalLPPool2d(2))
    explanation = pooling_ext.explain(model, X)
    assert [decision.op for decision in explanation.decisions] == ["max_pool", "lp_pool"]
    assert explanation.backend == "cpu"
    nothing = pooling_ext.explain(nn.ReLU(), X)
    assert nothing.backend is None and "no pooling_ext operator" in str(nothing)


@BACKENDS
@pytest.mark.parametrize(
    "name", ["max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d", "lp_pool2d"]
)
def test_explain_names_the_backend_that_was_asked_for(backend, name):
    arguments = (2, 2) if name == "lp_pool2d" else (2,)
    explanation = pooling_ext.explain(our_op(name), torch.ones(1, 2, 4, 4), *arguments)
    assert explanation.backend == backend.partition("-")[0]


def test_explain_leaves_no_trace():
    x = X.clone().requires_grad_()
    pooling_ext.explain(F.max_pool2d, x, 2)
    with pytest.raises(ValueError):
        pooling_ext.explain(F.max_pool2d, x, 0)
    assert F.max_pool2d(x, 2).requires_grad
    assert len(pooling_ext.explain(F.max_pool2d, x, 2).decisions) == 1


def test_use_backend():
    with pooling_ext.use_backend("aten"):
        explanation = pooling_ext.explain(F.max_pool2d, X, 2)
        assert explanation.backend == "aten"
        if NATIVE:
            assert "'aten' was asked for" in str(explanation)
        assert_same(F.max_pool2d(X, 2), TF.max_pool2d(X, 2))
    expected = "cpu" if NATIVE else "aten"
    assert pooling_ext.explain(F.max_pool2d, X, 2).backend == expected
    with pooling_ext.use_backend("cpu"):
        assert pooling_ext.explain(F.max_pool2d, X, 2).backend == expected


def test_use_backend_nests_and_survives_errors():
    with pytest.raises(KeyError), pooling_ext.use_backend("aten"):
        with pooling_ext.use_backend("cpu"):
            pass
        assert pooling_ext.explain(F.max_pool2d, X, 2).backend == "aten"
        raise KeyError
    assert pooling_ext.explain(F.max_pool2d, X, 2).backend == ("cpu" if NATIVE else "aten")


@pytest.mark.native
def test_backend_from_the_environment():
    script = (
        "import torch, pooling_ext;"
        "print(pooling_ext.explain(pooling_ext.functional.max_pool2d, torch.ones(1, 1, 4, 4), 2).backend)"
    )
    for name in ("aten", "cpu"):
        assert run_python(script, POOLING_EXT_BACKEND=name).stdout.strip() == name
    result = run_python(script, POOLING_EXT_BACKEND="tpu")
    assert result.returncode != 0 and "'tpu'" in result.stderr


def test_without_native_kernels():
    """Imports, warns once, and gives PyTorch's results."""
    script = (
        "import torch, pooling_ext, pooling_ext.functional as F, importlib;"
        "x = torch.randn(2, 3, 9, 9, requires_grad=True);"
        "assert torch.equal(F.max_pool2d(x, 3, 2, 1), torch.nn.functional.max_pool2d(x, 3, 2, 1));"
        "F.avg_pool2d(x, 2, padding='same').sum().backward();"
        "pooling_ext.patch(torch.nn.Sequential(torch.nn.MaxPool2d(2)));"
        "print(pooling_ext.explain(F.max_pool2d, x, 2))"
    )
    result = run_python(script, POOLING_EXT_NO_NATIVE="1")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("NativeUnavailableWarning") == 1
    assert "POOLING_EXT_NO_NATIVE is set" in result.stderr
    assert result.stdout.splitlines() == [
        "max_pool: aten",
        "  not cpu: POOLING_EXT_NO_NATIVE is set",
        "  not cuda: the input is on cpu",
        "  not triton: the input is on cpu",
    ]


@pytest.mark.native
def test_no_warning_with_native_kernels():
    result = run_python("import warnings; warnings.simplefilter('error'); import pooling_ext")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("dtype", INTEGERS, ids=dtype_id)
@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}d".format)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_integer_maxima_on_the_aten_backend(memory_format, rank, dtype):
    """Integer max pooling works on every backend, also where PyTorch's operator lacks it."""
    # A plane of more than 255 elements, whose indices do not fit 8 bits.
    x = torch.randint(0, 100, (2, 3, *{1: (300,), 2: (17, 20), 3: (6, 7, 9)}[rank])).to(dtype)
    if memory_format == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    with pooling_ext.use_backend("aten"):
        fixed = our_op(f"max_pool{rank}d")(x, 3, 2, 1, return_indices=True)
        adaptive = our_op(f"adaptive_max_pool{rank}d")(x, 3, return_indices=True)
    for windows, actual in (
        (fixed_windows(rank, x.shape, 3, 2, 1, 1, False), fixed),
        (adaptive_windows(rank, x.shape, 3), adaptive),
    ):
        expected, indices = reference.max_pool(x, windows)
        assert actual[0].dtype == dtype
        assert_close(actual[0], expected, exact=True)
        assert torch.equal(actual[1], indices)


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: X.to(torch.complex64), id="complex"),
        pytest.param(lambda: X > 3, id="bool"),
        pytest.param(lambda: X.to_sparse(), id="sparse"),
        pytest.param(lambda: X.to_mkldnn(), id="mkldnn"),
        pytest.param(lambda: torch.quantize_per_tensor(X, 0.5, 3, torch.quint8), id="quantized"),
        pytest.param(lambda: X.to(torch.float8_e4m3fn), id="float8"),
    ],
)
def test_what_is_not_ours_is_pytorchs(name, make):
    """The same result, or the same kind of error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = make()
        try:
            expected = torch_op(name)(x, 2)
        except Exception as error:
            with pytest.raises(type(error)):
                our_op(name)(x, 2)
            return
        actual = our_op(name)(x, 2)
    assert (actual.layout, actual.dtype) == (expected.layout, expected.dtype)
    if x.is_mkldnn:
        actual, expected = actual.to_dense(), expected.to_dense()
    if x.is_quantized:
        actual, expected = actual.dequantize(), expected.dequantize()
    assert torch.equal(actual, expected)


class Subclass(torch.Tensor):
    """An ordinary subclass: PyTorch's operators keep its type."""


def test_subclasses_keep_their_type():
    x = X.as_subclass(Subclass)
    for name in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"):
        actual = our_op(name)(x, 2)
        assert type(actual) is type(torch_op(name)(x, 2)) is Subclass
        assert torch.equal(actual.as_subclass(torch.Tensor), our_op(name)(X, 2))
    assert type(F.global_avg_pool2d(x)) is Subclass


def test_parameters_are_tensors():
    parameter = nn.Parameter(X.clone())
    assert type(F.max_pool2d(parameter, 2)) is torch.Tensor
    if NATIVE:
        assert pooling_ext.explain(F.max_pool2d, parameter, 2).backend == "cpu"


def test_torch_function_is_asked_first():
    calls = []

    class Logged:
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append((function, args[1:], kwargs))
            return "handled"

    assert F.max_pool2d(Logged(), 3, stride=2) == "handled"
    assert F.global_avg_pool2d(Logged(), keepdim=False) == "handled"
    assert calls == [
        (F.max_pool2d, (3,), {"stride": 2}),
        (F.global_avg_pool2d, (), {"keepdim": False}),
    ]


def test_torch_function_mode_sees_the_operators():
    from torch.overrides import TorchFunctionMode

    seen = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", str(function)))
            return function(*args, **(kwargs or {}))

    with Spy():
        assert_same(F.max_pool2d(X, 2), TF.max_pool2d(X, 2))
    assert seen


def test_fx_tracing():
    model = nn.Sequential(
        pooling_ext.MaxPool2d(3, 2, 1),
        pooling_ext.AvgPool2d(2, padding=(1, 0, 0, 1)),
        pooling_ext.LPPool2d(2, 1),
        pooling_ext.AdaptiveMaxPool2d(1),
        pooling_ext.GlobalAvgPool2d(keepdim=False),
    )
    traced = torch.fx.symbolic_trace(model)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    modules = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert len(targets) + len(modules) == len(model)
    x = torch.rand(2, 3, 12, 12)
    assert_same(traced(x), model(x))
    assert_same(gradient(traced, x), gradient(model, x))


def test_make_fx_tracing():
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2), tracing_mode="symbolic")(X)
    other = torch.rand(3, 2, 6, 8)
    assert_same(traced(other), F.max_pool2d(other, 2) + F.avg_pool2d(other, 2))


def test_calls_from_several_threads():
    x = torch.randn(4, 16, 40, 40)
    expected = gradient(lambda x: F.max_pool2d(x, 3, 2, 1), x)
    failures = []

    def work():
        for _ in range(20):
            try:
                assert_same(gradient(lambda x: F.max_pool2d(x, 3, 2, 1), x), expected)
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
