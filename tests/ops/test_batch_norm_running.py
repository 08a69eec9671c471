"""Evaluation without gradients on the CPU: one operator after a convolution, and one that folds."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as TF
from batch_norm_cases import RESIDUAL, arguments
from helpers import dtype_id, with_layout
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pooling_ext
from pooling_ext.ops import batch_norm_running, conv_bn_act
from pooling_ext.ops.activations import IDENTITY, RELU, Activation
from pooling_ext.ops.conv_bn_act.call import INFERENCE
from pooling_ext.ops.conv_bn_act.implementations import from_size
from pooling_ext.testing import reference
from pooling_ext.testing.tolerances import assert_close

pytestmark = pytest.mark.native

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=dtype_id
)
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
#: Vectors with and without a tail, planes and rows shorter than one, one pixel, one channel.
SHAPES = [
    (2, 1, 1, 1),
    (3, 17, 1, 1),
    (2, 3, 7, 7),
    (2, 17, 7, 7),
    (2, 64, 5, 4),
    (1, 300, 3, 5),
    (0, 4, 3, 3),
]


class Called(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().partition("::")[2].partition(".")[0])
        return func(*args, **(kwargs or {}))


@DTYPES
@LAYOUTS
@RESIDUAL
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("activation", [RELU, Activation("silu"), Activation("leaky_relu", 0.2)], ids=str)
def test_normalizes(activation, shape, residual, layout, dtype):
    t = arguments(shape, dtype, layout, residual)
    vectors = [t[name] for name in ("running_mean", "running_var", "weight", "bias")]
    added = t.get("residual")
    before = None if added is None else added.clone()
    wide = None if added is None else added.double()
    mean, variance, weight, bias = (vector.double() for vector in vectors)
    expected = reference.batch_norm_act(
        t["input"].double(), mean, variance, weight, bias, False, 1e-5, wide, activation
    )
    rest = added, 1e-5, *activation.arguments
    output = batch_norm_running.normalize(t["input"], *vectors, *rest)
    assert_close(output, expected, scale=2.0)
    overwritten = with_layout(t["input"].clone(), layout)
    assert batch_norm_running.overwrite(overwritten, *vectors, *rest) is None
    assert torch.equal(overwritten, output)  # also where vectors overlap
    assert added is None or torch.equal(added, before)


@DTYPES
def test_vectors_of_any_kind(dtype):
    """Other dtypes than the input's, strided, or none."""
    x = torch.randn(2, 5, 3, 3)
    mean, variance = torch.randn(10).to(dtype)[::2], torch.rand(5, 2).to(dtype)[:, 1]
    expected = TF.batch_norm(x, mean.float(), variance.float())
    rest = None, None, None, 1e-5, *IDENTITY.arguments
    output = batch_norm_running.normalize(x, mean, variance, *rest)
    torch.testing.assert_close(output, expected)
    with pytest.raises(RuntimeError, match="value per channel"):
        batch_norm_running.normalize(x, mean[:4], variance, *rest)


@DTYPES
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["OIHW", "OHWI"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)], ids=["1x1", "3x2"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_folds(bias, kernel, format, to, dtype):
    weight = torch.randn(5, 7, *kernel).to(dtype).to(memory_format=format)
    own = torch.randn(5).to(dtype) if bias else None
    mean, variance, norm_weight, norm_bias = (
        torch.randn(5),
        torch.rand(5) + 0.1,
        torch.randn(5),
        torch.randn(5),
    )
    folded, offset = batch_norm_running.fold(weight, own, mean, variance, norm_weight, norm_bias, 1e-3, to)
    scale = norm_weight.double() / (variance.double() + 1e-3).sqrt()
    moved = (0 if own is None else own.double()) - mean.double()
    assert folded.stride() == weight.stride() and folded.dtype == offset.dtype == to
    assert_close(folded, weight.double() * scale.view(-1, 1, 1, 1))
    assert_close(offset, moved * scale + norm_bias.double())
    plain, offset = batch_norm_running.fold(weight, own, mean, variance, None, None, 1e-3, to)
    scale = 1 / (variance.double() + 1e-3).sqrt()
    assert_close(plain, weight.double() * scale.view(-1, 1, 1, 1))
    assert_close(offset, moved * scale)


class Block(nn.Module):
    """A residual block of which the first convolution is the second's, or the input's, alone."""

    def __init__(self, channels: int = 17, in_place: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.in_place = in_place
        for bn in (self.bn1, self.bn2):
            for vector in (bn.weight, bn.bias, bn.running_mean):
                nn.init.normal_(vector)
            nn.init.uniform_(bn.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.in_place:
            y += x
        else:
            y = x + y
        return self.relu(y)


@pytest.fixture
def not_folded():
    """Convolutions are followed by a pass in place, whatever their size."""
    with from_size(1 << 40, keep=(INFERENCE,)):
        yield


def pair(**options):
    """A block in eval mode and a patched copy of it."""
    block = Block(**options).eval()
    patched = copy.deepcopy(block)
    pooling_ext.patch(patched, strict=True)
    return block, patched


@pytest.mark.usefixtures("not_folded")
@DTYPES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("in_place", [True, False], ids=["iadd", "add"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("size", [1, 7])
def test_block(size, context, in_place, layout, dtype):
    block, patched = (model.to(dtype) for model in pair(in_place=in_place))
    x = with_layout(torch.randn(3, 17, size, size).to(dtype), layout)
    given = x.clone()
    with context():
        with Called() as called:
            actual = patched(x)
        expected = block(x)
    assert called.names.count("batch_norm_act_running_") == 2
    assert not {"relu_", "add_", "add", "native_batch_norm"} & set(called.names)
    exact = copy.deepcopy(block).double()(x.double())
    error, allowed = ((y - exact).norm() for y in (actual, expected))
    assert error <= 1.5 * allowed + 4 * torch.finfo(dtype).eps * exact.norm()
    assert actual.dtype == dtype and torch.equal(x, given)
    assert actual.stride() == expected.stride()


@pytest.mark.usefixtures("not_folded")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels", [8, 80])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pointwise(layout, bias, channels, threads):
    """With one thread PyTorch makes a product of these, which is not always what runs here."""
    conv, bn = nn.Conv2d(8, channels, 1, bias=bias), nn.BatchNorm2d(channels)
    net = nn.Sequential(conv, bn, nn.ReLU()).eval()
    patched = copy.deepcopy(net)
    pooling_ext.patch(patched)
    x = with_layout(torch.randn(4, 8, 40, 40), layout)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), Called() as called:
            actual = patched(x)
        with torch.no_grad():
            torch.testing.assert_close(actual, net(x))
        for bad in (x[:, :5], x.double(), x[0, 0]):
            with torch.no_grad(), pytest.raises(RuntimeError) as theirs:
                net(bad)
            with torch.no_grad(), pytest.raises(RuntimeError) as ours:
                patched(bad)
            assert str(ours.value) == str(theirs.value)
        with torch.no_grad(), pytest.raises(ValueError, match="4D"):
            patched(x[0])
        with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(patched(x), net(x))
    finally:
        torch.set_num_threads(before)
    large = channels == 80
    assert ("mkldnn_convolution" in called.names) == (layout == "channels_last" and large) or threads == 2


def hook_convolution(block):
    block.kept = []
    block.conv1.register_forward_hook(lambda module, args, output: block.kept.append(output))


def wrap_convolution(block):
    block.conv1.forward = block.conv1.forward


def hook_norm(block):
    block.bn1.register_forward_hook(lambda module, args, output: output + 1)


def no_statistics(block):
    block.bn1.running_mean = block.bn1.running_var = None


def plain_weight(block):
    weight = block.bn1.weight.detach()
    del block.bn1.weight
    block.bn1.weight = weight


class Own(nn.Parameter):
    """A subclass of its own."""


def own_parameter(block):
    block.bn1.weight = Own(block.bn1.weight.detach())


CHANGES = (hook_convolution, wrap_convolution, hook_norm, no_statistics, plain_weight, own_parameter)


@pytest.mark.usefixtures("not_folded")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_not_ours_runs_as_it_would(change):
    block, patched = pair()
    for one in (block, patched):
        change(one)
    x = torch.randn(2, 17, 5, 5)
    with torch.no_grad(), Called() as called:
        actual = patched(x)
    with torch.no_grad():
        torch.testing.assert_close(actual, block(x))
    assert called.names.count("batch_norm_act_running_") == 1  # the second
    if change is hook_convolution:
        torch.testing.assert_close(patched.kept, block.kept)


@pytest.mark.usefixtures("not_folded")
def test_subclasses_go_to_pytorch():
    class Tagged(Tensor):
        pass

    block, patched = pair()
    x = torch.randn(2, 17, 5, 5).as_subclass(Tagged)
    with torch.no_grad():
        actual = patched(x)
        assert type(actual) is Tagged
        torch.testing.assert_close(actual, block(x))


@pytest.mark.usefixtures("not_folded")
def test_autocast():
    block, patched = pair()
    x = with_layout(torch.randn(2, 17, 7, 7), "channels_last")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = patched(x), block(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("not_folded")
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_have_what_they_need(frozen):
    block, patched = pair()
    for one in (block, patched):
        one.requires_grad_(not frozen)
    x = torch.randn(2, 17, 5, 5)
    with Called() as called:
        actual = patched(x)
    torch.testing.assert_close(actual, block(x))
    assert ("batch_norm_act_running_" in called.names) == frozen
    if not frozen:
        actual.sum().backward()
        block(x).sum().backward()
        for name, parameter in patched.named_parameters():
            wanted = block.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("not_folded")
@pytest.mark.parametrize("how", ["vmap", "jvp", "backend"])
def test_transforms_and_other_backends_go_to_pytorch(how):
    block, patched = pair()
    x = torch.randn(2, 17, 5, 5)
    uses = pooling_ext.use_backend("aten") if how == "backend" else nullcontext()
    with torch.no_grad(), uses, Called() as called:
        if how == "vmap":
            actual = torch.func.vmap(patched)(x[:, None])[:, 0]
        elif how == "jvp":
            actual, _ = torch.func.jvp(patched, (x,), (x,))
        else:
            actual = patched(x)
    assert "batch_norm_act_running_" not in called.names
    with torch.no_grad():
        torch.testing.assert_close(actual, block(x))


@pytest.mark.usefixtures("not_folded")
def test_compiled():
    torch._dynamo.reset()
    block, patched = pair()
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 17, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("relu", [True, False])
def test_the_functions_take_one_operator(relu):
    conv, bn = nn.Conv2d(4, 6, 3).eval(), nn.BatchNorm2d(6).eval()
    x, activation = torch.randn(2, 4, 9, 9), "relu" if relu else "identity"
    with torch.no_grad():
        y = conv(x)
        expected = TF.relu(bn(y)) if relu else bn(y)
        with Called() as called:
            actual = pooling_ext.functional.batch_norm_act(
                y, bn.running_mean, bn.running_var, bn.weight, bn.bias, activation=activation
            )
        assert called.names == ["batch_norm_act_running"]
        torch.testing.assert_close(actual, expected)
        with Called() as called:
            actual = conv_bn_act.conv_bn_act(conv, bn, x, activation=activation)
        assert called.names[-1] == "batch_norm_act_running_"
        torch.testing.assert_close(actual, expected)
