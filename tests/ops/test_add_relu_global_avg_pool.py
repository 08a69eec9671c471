"""add_relu_global_avg_pool: means of relu(input + residual) that are never written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from helpers import BACKENDS, assert_same, dtype_id, integers, with_layout

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.testing.tolerances import assert_close

LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "offset", "expanded")


def with_gradients(function, x, residual, grad):
    leaves = (x.detach().requires_grad_(), residual.detach().requires_grad_())
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def reference(x, residual):
    return (x.double() + residual.double()).relu().mean((2, 3), keepdim=True)


def reference_gradient(x, residual, grad):
    shared = grad.double() / (x.shape[2] * x.shape[3])
    return shared.expand(x.shape).where(x.double() + residual.double() > 0, 0.0)


@BACKENDS
def test_table(backend):
    x = torch.tensor([[[[1.0, -2.0], [3.0, 0.0]]]])
    residual = torch.tensor([[[[1.0, 1.0], [-3.0, 4.0]]]])
    output, grad, other = with_gradients(
        F.add_relu_global_avg_pool, x, residual, torch.full((1, 1, 1, 1), 8.0)
    )
    assert output.item() == 1.5
    assert grad.tolist() == other.tolist() == [[[[2.0, 0.0], [0.0, 2.0]]]]


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("residual_layout", ["contiguous", "channels_last"])
def test_residuals_in_other_layouts(backend, residual_layout, layout, dtype):
    """Small integers, whose sums are exact in every dtype; 64 pixels, so that means are too."""
    x = with_layout(integers((3, 37, 4, 16), dtype), layout)
    residual = with_layout(integers((3, 37, 4, 16), dtype), residual_layout)
    grad = integers((3, 37, 1, 1), dtype)
    output, first, second = with_gradients(F.add_relu_global_avg_pool, x, residual, grad)
    assert output.dtype == first.dtype == second.dtype == dtype
    assert_close(output, reference(x, residual), exact=True)
    wanted = reference_gradient(x, residual, grad)
    assert_close(first, wanted, exact=True)
    assert_close(second, wanted, exact=True)


@BACKENDS
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (2, 3, 1, 1),
        (16, 5, 7, 7),
        (1, 257, 7, 7),
        (1, 2, 3, 5463),  # 256 runs of the kernel and a rest
        (2, 2000, 2, 3),
        (1, 2, 113, 97),
        (2, 0, 3, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_shapes(backend, dtype, layout, shape):
    x = with_layout(torch.randn(shape).to(dtype), layout)
    residual = with_layout(torch.randn(shape).to(dtype), layout)
    if x.numel() == 0:
        with pytest.raises(ValueError, match="input"):
            F.add_relu_global_avg_pool(x, residual)
        return
    grad = torch.randn(*shape[:2], 1, 1).to(dtype)
    output, first, second = with_gradients(F.add_relu_global_avg_pool, x, residual, grad)
    # The sum may have been rounded to the dtype before it is averaged, as PyTorch's operators round it.
    tolerance = 2e-6 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(output.double(), reference(x, residual), rtol=tolerance, atol=tolerance)
    wanted = reference_gradient(x, residual, grad)
    assert_close(first, wanted)
    assert_same(first, second, check_strides=False)


@BACKENDS
def test_keepdim(backend):
    x, residual = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    kept = F.add_relu_global_avg_pool(x, residual)
    assert kept.shape == (2, 3, 1, 1)
    flat = F.add_relu_global_avg_pool(x, residual, keepdim=False)
    assert_same(flat, kept[:, :, 0, 0], check_strides=False)


@BACKENDS
def test_an_empty_batch(backend):
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    output = F.add_relu_global_avg_pool(x, torch.randn(0, 3, 4, 4))
    assert output.shape == (0, 3, 1, 1)
    output.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@BACKENDS
@pytest.mark.parametrize("wanted", [0, 1])
def test_gradient_of_one_input_only(backend, wanted):
    tensors = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)]
    tensors[wanted].requires_grad_()
    F.add_relu_global_avg_pool(*tensors).sum().backward()
    assert_close(tensors[wanted].grad, reference_gradient(*tensors, torch.ones(2, 3, 1, 1)))
    assert tensors[1 - wanted].grad is None


@BACKENDS
def test_one_tensor_as_both(backend):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    F.add_relu_global_avg_pool(x, x).sum().backward()
    assert_close(x.grad, 2 * reference_gradient(x, x, torch.ones(2, 3, 1, 1)))


def test_gradients_are_not_one_tensor_in_place():
    """Whoever changes one gradient in place does not change the other."""
    x, residual = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4, requires_grad=True)
    F.add_relu_global_avg_pool(x, residual).sum().backward()
    assert x.grad is not None and residual.grad is not None
    before = residual.grad.clone()
    x.grad.zero_()
    assert_same(residual.grad, before)


@BACKENDS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_infinity(backend, layout, value):
    x = with_layout(torch.randn(2, 3, 4, 4), layout)
    residual = with_layout(torch.randn(2, 3, 4, 4), layout)
    x[1, 2, 3, 1] = value

    def theirs(x, residual):
        return TF.relu(x + residual).mean((2, 3), keepdim=True)

    grad = torch.randn(2, 3, 1, 1)
    actual = with_gradients(F.add_relu_global_avg_pool, x, residual, grad)
    wanted = with_gradients(theirs, x, residual, grad)
    torch.testing.assert_close(actual, wanted, equal_nan=True, check_stride=False)


def test_a_residual_of_another_dtype_is_promoted():
    x, residual = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4)
    output = F.add_relu_global_avg_pool(x, residual)
    assert output.dtype == torch.float32
    assert_close(output, reference(x, residual))


def test_the_aten_backend():
    x, residual, grad = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 1, 1)
    with pooling_ext.use_backend("aten"):
        explanation = pooling_ext.explain(F.add_relu_global_avg_pool, x, residual)
        aten = with_gradients(F.add_relu_global_avg_pool, x, residual, grad)
    assert explanation.backend == "aten"
    ours = with_gradients(F.add_relu_global_avg_pool, x, residual, grad)
    torch.testing.assert_close(ours, aten)


@BACKENDS
def test_explain(backend):
    x = torch.ones(1, 2, 3, 3)
    explanation = pooling_ext.explain(F.add_relu_global_avg_pool, x, x)
    assert explanation.backend == backend.partition("-")[0]


@pytest.mark.native
def test_peak_memory():
    """No sum of the size of the input is made."""
    x, residual = torch.randn(2, 64, 32, 32), torch.randn(2, 64, 32, 32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        F.add_relu_global_avg_pool(x, residual)
    events = run.profiler.kineto_results.events()
    made = sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")
    assert made < x.nbytes / 4


@pytest.mark.parametrize(
    "args, kind, named",
    [
        ((torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 5)), ValueError, "residual"),
        ((torch.ones(2, 3, 4, 4), torch.ones(3, 1, 1)), ValueError, "residual"),
        ((torch.ones(2, 3, 4, 4), 1.0), TypeError, "residual"),
        ((1.0, torch.ones(2, 3, 4, 4)), TypeError, "input"),
        ((torch.ones(2), torch.ones(2)), ValueError, "input"),
    ],
    ids=["size", "broadcast", "number", "input", "dimensions"],
)
def test_bad_arguments(args, kind, named):
    with pytest.raises(kind, match=named):
        F.add_relu_global_avg_pool(*args)
