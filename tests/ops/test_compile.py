"""torch.compile, torch.export, meta and fake tensors, autocast, and the operators' own registrations."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers import LAYOUTS, NATIVE, assert_same, gradient, our_op, require_native, strides, with_layout
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.ops.activations import RELU, Activation
from pooling_ext.windows import adaptive_windows, fixed_windows, global_windows

pytestmark = pytest.mark.usefixtures("fresh_compiler")

CALLS = [
    pytest.param(lambda x: F.max_pool2d(x, 3, 2, 1), id="max"),
    pytest.param(lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True), id="max-indices"),
    pytest.param(lambda x: F.max_pool2d(x, 2, padding="same", dilation=2, stride=2), id="max-same"),
    pytest.param(lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), id="avg"),
    pytest.param(lambda x: F.avg_pool2d(x, 3, 2, (1, 0, 2, 1)), id="avg-per-side"),
    pytest.param(lambda x: F.lp_pool2d(x, 2, 3, 2), id="lp"),
    pytest.param(lambda x: F.lp_pool2d(x, 3, 3, safe=True), id="lp-safe"),
    pytest.param(lambda x: F.adaptive_avg_pool2d(x, (3, None)), id="adaptive-avg"),
    pytest.param(lambda x: F.adaptive_max_pool2d(x, 3), id="adaptive-max"),
    pytest.param(lambda x: F.global_avg_pool2d(x, keepdim=False), id="global-avg"),
    pytest.param(lambda x: F.global_max_pool2d(x), id="global-max"),
    pytest.param(lambda x: F.global_lp_pool2d(x, 2), id="global-lp"),
]


def inputs(*shape: int) -> torch.Tensor:
    return torch.rand(shape) + 0.1


@pytest.mark.parametrize("call", CALLS)
def test_compiled_forward_and_backward(call):
    """In one graph, with the same bits as uncompiled."""
    x = inputs(2, 3, 9, 11)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), call(x))
    actual, expected = gradient(compiled, x), gradient(call, x)
    if "lp" in str(call):
        torch.testing.assert_close(actual, expected)
    else:
        assert_same(actual, expected)


@pytest.mark.parametrize("call", CALLS)
def test_compiled_with_dynamic_shapes(call):
    """One compilation serves all sizes alike in parity, in up to 255 places, in uneven adaptive windows."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for shape in ((2, 3, 10, 11), (4, 5, 14, 13), (3, 2, 8, 17)):
        x = inputs(*shape)
        assert_same(compiled(x), call(x))
        assert_same(gradient(compiled, x), gradient(call, x))
    # One for inference, one for training.
    assert counter.frame_count == 2 or not NATIVE


@pytest.mark.native
def test_compiled_by_inductor():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        pooling_ext.MaxPool2d(3, 2, 1),
        pooling_ext.AvgPool2d(2, ceil_mode=True),
        pooling_ext.GlobalAvgPool2d(keepdim=False),
    )
    compiled = torch.compile(model, fullgraph=True)
    for x in (inputs(2, 3, 20, 22), inputs(2, 3, 20, 22).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(gradient(compiled, x), gradient(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.native
def test_compiled_with_ceil_mode_gradients_in_inductor():
    """A place where Inductor's own average pooling has had silently wrong gradients."""

    def pool(x):
        return F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)

    x = inputs(1, 2, 6, 8)
    actual = gradient(torch.compile(pool, fullgraph=True), x)
    torch.testing.assert_close(actual, gradient(lambda x: nn.functional.avg_pool2d(x, 3, 2, 1, True), x))


@pytest.mark.parametrize("call", CALLS)
def test_export(call):
    class Model(nn.Module):
        def forward(self, x):
            return call(x)

    x = inputs(2, 3, 9, 11)
    program = torch.export.export(Model(), (x,))
    # Not to the last bit: pooling to one element is PyTorch's in a program.
    torch.testing.assert_close(program.module()(x), call(x))


def test_export_with_a_dynamic_batch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pools = nn.Sequential(pooling_ext.MaxPool2d(3, 2, 1), pooling_ext.AdaptiveAvgPool2d(2))

        def forward(self, x):
            return self.pools(x)

    model = Model()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (inputs(2, 3, 9, 11),), dynamic_shapes={"x": {0: batch}})
    for size in (2, 7):
        x = inputs(size, 3, 9, 11)
        # Not to the last bit: adaptive pooling of known sizes is PyTorch's in a program.
        torch.testing.assert_close(program.module()(x), model(x))


def metadata(result):
    results = result if isinstance(result, tuple) else (result,)
    return [(tuple(y.shape), strides(y), y.dtype, y.storage_offset()) for y in results]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_meta_and_fake_tensors(call, dtype, layout):
    """Their outputs are described as the real ones are, batched and not, and so are the gradients."""
    if "lp" in str(call) and dtype == torch.bfloat16:
        require_native()
    batched = with_layout(inputs(2, 3, 9, 11).to(dtype), layout)
    for x in (batched, batched[0], batched[:0]):
        expected = metadata(call(x))
        assert metadata(call(x.to("meta"))) == expected
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x)
            assert metadata(call(fake)) == expected
    real = metadata(gradient(call, batched)[1])
    with FakeTensorMode() as mode:
        assert metadata(gradient(call, mode.from_tensor(batched))[1]) == real


@pytest.mark.native
@pytest.mark.parametrize("rank", [1, 3], ids="{}d".format)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name, args", [("max_pool", (3, 2, 1)), ("avg_pool", (3, 2, 1)), ("adaptive_avg_pool", (2,))]
)
def test_meta_tensors_of_other_ranks(name, args, layout, rank):
    x = with_layout(inputs(2, 3, *(7,) * rank), layout)
    pool = our_op(f"{name}{rank}d")
    assert metadata(pool(x.to("meta"), *args)) == metadata(pool(x, *args))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_dtype_alone(dtype, call):
    """As PyTorch's own pooling does on the CPU."""
    if dtype == torch.bfloat16:
        require_native()
    x = inputs(2, 3, 9, 11).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        result, grad = gradient(call, x)
    assert (result.dtype, grad.dtype) == (dtype, dtype)
    assert_same((result, grad), gradient(call, x))


def test_compiled_patched_model_under_autocast():
    from torchvision.models import squeezenet1_1

    model = squeezenet1_1(weights=None).eval()
    x = inputs(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        pooling_ext.patch(model)
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def _samples():
    """Arguments for the low-level operators, which take windows as they lie."""
    ops, x = torch.ops.pooling_ext, torch.rand(2, 3, 7, 8)
    yield from _pool_samples(ops, x)
    if NATIVE:
        yield from _batch_norm_samples(ops, x)
        yield from _convolution_samples()
        yield from _stem_and_tail_samples(ops, x)


def _pool_samples(ops, x):
    fixed = fixed_windows(2, x.shape, 3, 2, (1, 0, 1, 1), 1, True)
    plane = (2, 3, *fixed.output_size)
    for windows in (fixed, adaptive_windows(2, x.shape, fixed.output_size)):
        kind = "adaptive" if windows.adaptive else "fixed"
        yield f"max_pool-{kind}", ops.max_pool, (x, *windows)
        for indices in (False, True):
            label = f"{kind}-{'indices' if indices else 'places'}"
            yield f"max_pool_places-{label}", ops.max_pool_places, (x, *windows, indices)
            if NATIVE:
                _, places = ops.max_pool_places(x, *windows, indices)
                grad = torch.rand(plane)
                yield f"max_pool_gather-{label}", ops.max_pool_gather, (x, places, *windows)
                yield f"max_pool_backward-{label}", ops.max_pool_backward, (grad, places, x.shape, *windows)
        yield f"avg_pool-{kind}", ops.avg_pool, (x, *windows, True, None)
        back = (torch.rand(plane), x.shape, False, *windows, True, None)
        yield f"avg_pool_backward-{kind}", ops.avg_pool_backward, back
    yield "avg_pool-divisor", ops.avg_pool, (x, *fixed, False, 3)
    yield "lp_pool-fixed", ops.lp_pool, (x, *fixed, 2, False)
    yield "lp_pool-global", ops.lp_pool, (x, *global_windows(2, x.shape), 3, True)
    line = torch.rand(2, 3, 9)
    yield "max_pool-1d", ops.max_pool, (line, *fixed_windows(1, line.shape, 3, 2, 1, 2, False))
    cube = torch.rand(3, 4, 5, 6)
    yield (
        "avg_pool-3d-unbatched",
        ops.avg_pool,
        (cube, *fixed_windows(3, cube.shape, 2, 1, 0, 1, False), True, None),
    )


def _batch_norm_samples(ops, x):
    stats, weight, bias = ops.batch_norm_stats(x), torch.rand(3), torch.rand(3)
    affine = (x, stats, weight, bias)
    yield "batch_norm_stats", ops.batch_norm_stats, (x,)
    for residual, activation in product((None, torch.rand_like(x)), (RELU, Activation("leaky_relu", 0.2))):
        label = f"{activation.name}-{'plain' if residual is None else 'residual'}"
        act = 1e-5, *activation.arguments
        output = ops.batch_norm_act(*affine, residual, *act)
        kept = None if residual is None else output if activation == RELU else residual
        _, sums = ops.batch_norm_act_sums(x, *affine, kept, *act)
        yield f"batch_norm_act-{label}", ops.batch_norm_act, (*affine, residual, *act)
        yield f"batch_norm_act_sums-{label}", ops.batch_norm_act_sums, (x, *affine, kept, *act)
        passed = None if residual is None else sums
        back = (x, *affine, passed, 112.0, *act)
        yield f"batch_norm_act_backward-{label}", ops.batch_norm_act_backward, back
        forward = (x, weight, bias, residual, *act)
        yield f"batch_norm_act_training-{label}", ops.batch_norm_act_training, forward
        back = (x, x, stats, weight, None, kept, *act)
        yield f"batch_norm_act_training_backward-{label}", ops.batch_norm_act_training_backward, back
    running = torch.zeros(3), torch.ones(3, dtype=torch.bfloat16)
    yield "batch_norm_update_running", ops.batch_norm_update_running, (*running, stats, 112.0, 0.1)
    evaluation = (x, *running, weight, None, torch.rand_like(x), 1e-5, *RELU.arguments)
    yield "batch_norm_act_running", ops.batch_norm_act_running, evaluation
    yield "batch_norm_act_running_", ops.batch_norm_act_running_, evaluation
    folding = (torch.rand(3, 2, 3, 3), None, *running, weight, None, 1e-5, torch.bfloat16)
    yield "fold_batch_norm", ops.fold_batch_norm, folding


def _stem_and_tail_samples(ops, x):
    affine = (x, ops.batch_norm_stats(x), torch.rand(3), torch.rand(3))
    stem = fixed_windows(2, x.shape, 3, 2, 1, 1, False)
    pooled, places = ops.batch_norm_relu_max_pool_places(*affine, 1e-5, *stem)
    back = (pooled, places, *affine)
    sums = ops.batch_norm_relu_max_pool_sums(*back, 1e-5, *stem)
    yield "stem", ops.batch_norm_relu_max_pool, (*affine, 1e-5, *stem)
    yield "stem-places", ops.batch_norm_relu_max_pool_places, (*affine, 1e-5, *stem)
    yield "stem-sums", ops.batch_norm_relu_max_pool_sums, (*back, 1e-5, *stem)
    yield "stem-backward", ops.batch_norm_relu_max_pool_backward, (*back, sums, 112.0, 1e-5, *stem)
    yield "tail", ops.add_relu_global_avg_pool, (x, torch.rand_like(x))
    tail = (torch.rand(2, 3, 1, 1), x, torch.rand_like(x))
    yield "tail-backward", ops.add_relu_global_avg_pool_backward, tail


def _convolution_samples():
    # They define the operators.
    from pooling_ext.ops import depthwise_conv, image_conv, winograd, winograd_weights  # noqa: F401

    ops = torch.ops.pooling_ext
    x, weight, bias = torch.rand(2, 16, 7, 8), torch.rand(16, 16, 3, 3), torch.rand(16)
    yield "winograd_weight", ops.winograd_weight, (weight, 1, False)
    yield "fingerprint", ops.fingerprint, (weight, bias, bias, None, bias, None)
    transformed, output = ops.winograd_weight(weight, 1, False), torch.rand(2, 16, 7, 8)
    padding, grouping = [1, 1, 1, 1], (16, 1)
    yield "winograd_conv", ops.winograd_conv, (x, transformed, bias, output, padding, *grouping, 1, 0.0)
    yield "winograd_conv_stats", ops.winograd_conv_stats, (x, transformed, bias, padding, *grouping)
    yield "winograd_input_grad", ops.winograd_input_grad, (output, weight, padding, 1)
    yield "winograd_weight_grad", ops.winograd_weight_grad, (x, output, padding, 1)
    weight, windows = torch.rand(16, 1, 3, 3), ([2, 1], [1, 1])
    grad = torch.rand(2, 16, 4, 8)
    yield "depthwise_conv", ops.depthwise_conv, (x, weight, bias, *windows, 1, 0.0)
    yield "depthwise_conv_stats", ops.depthwise_conv_stats, (x, weight, bias, *windows)
    back = (grad, weight, x.shape, *windows, False)
    yield "depthwise_conv_input_grad", ops.depthwise_conv_input_grad, back
    back = (grad, x, weight.shape, *windows, False, True)
    yield "depthwise_conv_weight_grad", ops.depthwise_conv_weight_grad, back
    image, weight, bias, grad = (
        torch.rand(2, 3, 7, 8),
        torch.rand(5, 3, 3, 3),
        torch.rand(5),
        torch.rand(2, 5, 4, 8),
    )
    yield "image_conv", ops.image_conv, (image, weight, bias, *windows, 1, 0.0)
    yield "image_conv_stats", ops.image_conv_stats, (image, weight, bias, *windows)
    yield "image_conv_weight_grad", ops.image_conv_weight_grad, (grad, image, weight.shape, *windows)


SAMPLES = list(_samples())


@pytest.mark.native
@pytest.mark.parametrize("op, args", [pytest.param(op, args, id=label) for label, op, args in SAMPLES])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(op, args, layout):
    """Schema, fake tensors and tracing of each operator. Derivatives live above them, in Functions."""
    # What winograd_weight makes (36 points of a tile) has a layout of its own.
    planes = [isinstance(a, torch.Tensor) and a.dim() > 2 and a.shape[1] != 36 for a in args]
    args = tuple(with_layout(a, layout) if p else a for a, p in zip(args, planes, strict=True))
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if op is torch.ops.pooling_ext.fingerprint:  # a number by the values: compiled graphs do not ask for it
        utils = ["test_schema"]
    opcheck(op.default, args, test_utils=tuple(utils))


@pytest.mark.native
def test_every_operator_has_a_sample():
    names = {
        name.removeprefix("pooling_ext::")
        for name in torch._C._dispatch_get_all_op_names()
        if "pooling_ext::" in name
    }
    # Those of GPUs alone are checked where Triton's interpreter runs them, in test_conv.py.
    names = {
        name
        for name in names
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"pooling_ext::{name}", "CPU")
    }
    assert names == {op._qualified_op_name.removeprefix("pooling_ext::") for _, op, _ in SAMPLES}
