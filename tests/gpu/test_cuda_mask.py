"""The mask that CUDA's batch norm with a residual keeps of ReLU in place of the output."""

from __future__ import annotations

import pytest
import torch
from helpers import dtype_id

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.backends import cuda_library
from pooling_ext.ops.activations import RELU
from pooling_ext.ops.batch_norm_autograd import _unpacked
from pooling_ext.testing.cuda_counts import counted
from pooling_ext.testing.launches import BACKWARD, CASES, TRAINING

pytestmark = pytest.mark.skipif(
    not cuda_library.on_cpu(), reason="needs the CUDA kernels as a library for the CPU"
)
ops = torch.ops.pooling_ext
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
formats = pytest.mark.parametrize(
    "format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)
#: With vectors, more than lie together and less; and with none: then the last byte has fewer bits than the
#: others.
SHAPES = [(2, 16, 6, 8), (3, 5, 3, 7), (1, 1, 1, 3), (2, 64, 1, 1), (2, 88, 3, 5), (3, 256, 2, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tensors(shape, dtype, format):
    """An input with a NaN, zeros among its outputs, and the other arguments of the operators."""
    x, residual, grad = (torch.randn(shape).to(dtype).contiguous(memory_format=format) for _ in range(3))
    x[0, 0, 0, 1 % shape[3]] = float("nan")
    stats = torch.stack((torch.randn(shape[1]), torch.rand(shape[1]) + 0.5)).double()
    weight = torch.randn(shape[1])
    weight[-1] = 0.0
    residual[-1, -1] = 0.0
    return x, residual, grad, (stats, weight, torch.zeros(shape[1]))


def in_its_order(flags: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Flags in the order of memory as a mask has them: in channels-last those of 128 bytes of each pixel."""
    channels, each = like.shape[1], 16 // like.element_size()
    if like.stride(1) != 1 or channels % each:
        return flags
    return torch.cat([part.flatten() for part in flags.view(-1, channels).split(8 * each, 1)])


@dtypes
@formats
@shapes
def test_it_has_a_bit_for_each_element_that_lets_gradients_through(shape, dtype, format):
    x, residual, _, norm = tensors(shape, dtype, format)
    with pooling_ext.use_backend("cuda"):
        output, mask = ops.batch_norm_relu_mask(x, *norm, residual, 1e-5)
        expected = ops.batch_norm_act_elemt(x, *norm, residual, 1e-5, *RELU.arguments)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    each = 16 // x.element_size()
    assert mask.numel() == -(-x.numel() // each)
    in_memory = ~(output.as_strided((x.numel(),), (1,)) <= 0)
    assert 0 < int(in_memory.sum()) < x.numel()
    bits = (mask[:, None] >> torch.arange(each) & 1).flatten()
    assert torch.equal(bits[: x.numel()].bool(), in_its_order(in_memory, x)) and not bits[x.numel() :].any()
    unpacked = _unpacked(mask, x)
    assert unpacked.stride() == output.stride() and torch.equal(unpacked.bool(), ~(output <= 0))


@formats
@shapes
def test_tensors_that_lie_anywhere_have_the_same_mask(shape, format):
    """They are read an element at a time."""
    x, residual, grad, norm = tensors(shape, torch.bfloat16, format)
    masks, gradients = [], []
    for first in (0, 1):
        ours = []
        for tensor in (x, residual, grad):
            memory = tensor.new_empty(tensor.numel() + first)
            ours.append(memory.as_strided(tensor.shape, tensor.stride(), first).copy_(tensor))
        with pooling_ext.use_backend("cuda"):
            _, mask = ops.batch_norm_relu_mask(ours[0], *norm, ours[1], 1e-5)
            gradients.append(
                ops.batch_norm_act_training_backward(
                    ours[2], ours[0], *norm, masks[0] if masks else mask, 1e-5, *RELU.arguments
                )
            )
        masks.append(mask)
    assert torch.equal(*masks)
    torch.testing.assert_close(*(of[1] for of in gradients), rtol=0, atol=0, equal_nan=True)


@dtypes
@formats
@shapes
def test_gradients_are_those_of_the_output(shape, dtype, format):
    x, residual, grad, norm = tensors(shape, dtype, format)
    with pooling_ext.use_backend("cuda"):
        output, mask = ops.batch_norm_relu_mask(x, *norm, residual, 1e-5)
        by_output, by_mask = (
            ops.batch_norm_act_training_backward(grad, x, *norm, kept, 1e-5, *RELU.arguments)
            for kept in (output, mask)
        )
    for ours, theirs in zip(by_mask, by_output, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_mask_of_another_size_is_refused():
    x, _, grad, norm = tensors(SHAPES[0], torch.float32, torch.contiguous_format)
    with pooling_ext.use_backend("cuda"), pytest.raises(RuntimeError, match="mask"):
        mask = torch.zeros(3, dtype=torch.uint8)
        ops.batch_norm_act_training_backward(grad, x, *norm, mask, 1e-5, *RELU.arguments)


@formats
def test_what_is_saved(format):
    """The input and a sixteenth of it; not the output, which whoever reads it keeps anyway."""
    x, residual = (torch.randn(2, 16, 12, 12).contiguous(memory_format=format) for _ in range(2))
    sizes = []
    with (
        pooling_ext.use_backend("cuda"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t),
    ):
        F.batch_norm_act(x.requires_grad_(), None, None, training=True, residual=residual)
    assert sorted(size for size in sizes if size > 2 * 16 * 8) == [x.nbytes // 16, x.nbytes]


@formats
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 88, 3, 2)], ids=str)
def test_second_derivatives(shape, format):
    x, residual = (torch.randn(shape).contiguous(memory_format=format) for _ in range(2))
    weight, found = torch.randn(shape[1]), {}
    for backend in ("cuda", "aten"):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, residual, weight)]
        with pooling_ext.use_backend(backend):
            output = F.batch_norm_act(leaves[0], None, None, leaves[2], training=True, residual=leaves[1])
            first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
            found[backend] = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    for ours, theirs in zip(found["cuda"], found["aten"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_traffic(dtype, format):
    """Training reads the input twice and the residual, and writes output and mask. Backward reads gradient,
    input and mask, writes the masked gradient, and reads that and the input for the input's gradient."""
    case = next(case for case in CASES if case.name == "bn-add-relu-256-56")
    given = case.tensors(8, dtype, format, "cpu")
    mask = 1 / 16
    for phase, times in ((TRAINING, 4), (BACKWARD, 6)):
        with pooling_ext.use_backend("cuda"):
            call = case.run(phase, given)
            with counted() as counts:
                call()
        moved = sum(sum(kernel.moved) for kernel in counts)
        assert moved <= 1.03 * (times + mask) * given["input"].nbytes, counts
