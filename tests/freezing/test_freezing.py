"""freeze on small networks: layers, dtypes and sizes, and its manners."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from freezing_cases import ACTIVATIONS, build, error, layers, randomize, run, small
from torch import nn

import pooling_ext
from pooling_ext import ArgumentError
from pooling_ext.freezing.layers import FrozenBatchNormAct, PackedConv

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model, x = small().eval(), torch.randn(2, 3, 12, 12)
    frozen = pooling_ext.freeze(model, x, dtype)
    assert frozen.dtype == (dtype or torch.float32)
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-5)
    assert error(run(frozen, x), run(model, x).double()) < tolerance
    for given in (torch.float64, torch.bfloat16):
        assert run(frozen, x.to(given)).dtype == given


def test_a_model_in_half_precision_keeps_it():
    model, x = small().eval().bfloat16(), torch.randn(2, 3, 12, 12)
    frozen = pooling_ext.freeze(model, x)
    assert frozen.dtype == torch.bfloat16
    assert error(run(frozen, x), run(model.float(), x).double()) < 3e-2


def test_memory_formats_and_sizes():
    model, x = small().eval(), torch.randn(2, 3, 12, 12)
    frozen = pooling_ext.freeze(model, x)
    expected = run(model, x)
    for given in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([x, x], 3)[..., :12],
    ):
        torch.testing.assert_close(run(frozen, given), expected)
    for shape in ((1, 3, 20, 14), (5, 3, 12, 12), (0, 3, 12, 12)):
        given = torch.randn(shape)
        torch.testing.assert_close(run(frozen, given), run(model, given))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation):
    model = randomize(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), activation)).eval()
    x = torch.randn(2, 4, 9, 9)
    frozen = pooling_ext.freeze(model, x)
    assert len(list(frozen.body.graph.children())) == 1
    torch.testing.assert_close(run(frozen, x), run(model, x), rtol=1e-4, atol=1e-5)
    plain = PackedConv(torch.ones(1, 1, 1, 1), None, [1, 1], [0, 0], [1, 1], 1, None, None, [1, 1, 2, 2])
    applied = layers(frozen, PackedConv)[0].activation(run(plain, x[:1, :1]))
    torch.testing.assert_close(applied, activation(x[:1, :1]))


CONVOLUTIONS = [
    nn.Conv2d(4, 8, 3, padding="same", dilation=2),
    nn.Conv2d(4, 8, (2, 3), padding="same"),
    nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(4, 8, 3, stride=2, padding=(0, 1), groups=2, bias=False),
    nn.Conv2d(4, 8, 5, padding=2, groups=4),
    nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, output_padding=1),
    nn.ConvTranspose2d(4, 8, 2, stride=2, groups=2, bias=False),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_convolutions(conv):
    model = randomize(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU())).eval()
    x = torch.randn(2, 4, 9, 9)
    frozen = pooling_ext.freeze(model, x)
    assert not layers(frozen, FrozenBatchNormAct)
    torch.testing.assert_close(run(frozen, x), run(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank):
    conv, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
    model = nn.Sequential(conv(4, 8, 3), norm(8), nn.ReLU(), conv(8, 8, 1), norm(8)).eval()
    model[1].running_mean.normal_()
    x = torch.randn(2, 4, *[7] * rank)
    torch.testing.assert_close(run(pooling_ext.freeze(model, x), x), run(model, x), rtol=1e-4, atol=1e-5)


def test_linear_with_batch_norm():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    model[1].running_mean.normal_()
    x = torch.randn(4, 6)
    frozen = pooling_ext.freeze(model, x)
    assert len(list(frozen.body.graph.children())) == 2
    torch.testing.assert_close(run(frozen, x), run(model, x))


class Odd(nn.Module):
    """Work in place, results read twice, a residual that is read later, and a shared layer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale=None):
        y = self.relu(self.a(x))
        z = self.b(y)
        w = z * 2
        self.relu(z)  # what reads z from here on reads this
        y = self.relu(y + z)
        v = self.norm(self.b(y)) + y
        u = torch.relu_(v.clone())
        left, right = torch.chunk(self.a(u), 2, 1)
        left.add_(1)
        return self.drop(torch.cat([left, right], 1)) + y + w + u.mean([2, 3], keepdim=True)


def test_in_place_and_shared():
    model = randomize(Odd()).eval()
    x = torch.randn(2, 4, 6, 6)
    frozen = pooling_ext.freeze(model, x)
    before = x.clone()
    torch.testing.assert_close(run(frozen, x), run(model, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)


class Broadcasts(nn.Module):
    """A sum of one shape at the example's size alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.a(x)
        return torch.relu(self.b(y.mean([2, 3], keepdim=True)) + y) + torch.relu(
            y + y.mean([0], keepdim=True)
        )


def test_sums_that_broadcast_at_other_sizes():
    model = Broadcasts().eval()
    frozen = pooling_ext.freeze(model, torch.randn(1, 4, 1, 1))
    for shape in ((1, 4, 1, 1), (3, 4, 5, 5)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(frozen, x), run(model, x))


class Branches(nn.Module):
    """Cannot be traced as a whole."""

    def __init__(self):
        super().__init__()
        self.stem = small()[:3]
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        y = self.stem(x)
        return self.head(y) if y.sum() > 0 else -self.head(y)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_parts_of_what_cannot_be_traced(dtype):
    inner = Branches()
    outer = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), inner, nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    for model in (inner.eval(), outer.eval()):
        frozen = pooling_ext.freeze(model, x, dtype)
        tolerance = 1e-4 if dtype is None else 5e-2
        assert error(run(frozen, x), run(model, x).double()) < tolerance
        assert "traced" in str(frozen.report)
        twin = pickle.loads(pickle.dumps(frozen))
        assert torch.equal(run(twin, x), run(frozen, x))


def test_the_model_is_left_alone():
    model = build("resnet18").train()
    pooling_ext.patch(model)
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    frozen = pooling_ext.freeze(model, torch.randn(1, 3, 64, 64))
    run(frozen, torch.randn(2, 3, 64, 64))
    assert all(module.training for module in model.modules())
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.relu.inplace and "forward" not in vars(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the frozen one has its own weights
    assert run(frozen, torch.randn(1, 3, 64, 64)).abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies(dtype):
    x = torch.randn(2, 3, 64, 64)
    frozen = pooling_ext.freeze(build("resnet18"), x, dtype)
    expected = run(frozen, x)
    buffer = io.BytesIO()
    torch.save(frozen, buffer)
    buffer.seek(0)
    for twin in (
        torch.load(buffer, weights_only=False),
        copy.deepcopy(frozen),
        pickle.loads(pickle.dumps(frozen)),
    ):
        assert torch.equal(run(twin, x), expected)
        assert str(twin.report) == str(frozen.report) and twin.dtype == dtype
    assert torch.equal(run(copy.deepcopy(copy.deepcopy(frozen)), x), expected)


def test_threads():
    model = build("resnet18").eval()
    inputs = [torch.randn(1 + i % 3, 3, 64, 64) for i in range(6)]
    frozen = pooling_ext.freeze(model, inputs[0])
    expected = [run(frozen, x) for x in inputs]
    wrong = []

    def work(x, y):
        for _ in range(4):
            if not torch.allclose(run(frozen, x), y, rtol=1e-5, atol=1e-6):
                wrong.append(x.shape)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_autocast_and_grad_mode_do_not_matter():
    frozen = pooling_ext.freeze(small(), torch.randn(1, 3, 12, 12))
    x = torch.randn(1, 3, 12, 12, requires_grad=True)
    expected = run(frozen, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x), expected)
    assert not frozen(x).requires_grad


def test_modes_and_moves():
    frozen = pooling_ext.freeze(small(), torch.randn(1, 3, 12, 12))
    assert not frozen.train().training
    assert frozen.to("cpu") is frozen and frozen.float() is frozen
    with pytest.raises(ArgumentError, match="freeze the model again"):
        frozen.bfloat16()


def test_hooks_stay():
    model, seen = small().eval(), []
    model[4].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    frozen = pooling_ext.freeze(model, torch.randn(1, 3, 12, 12))
    seen.clear()
    torch.testing.assert_close(run(frozen, torch.ones(1, 3, 12, 12)), run(model, torch.ones(1, 3, 12, 12)))
    assert len(seen) == 2


BAD = [
    (torch.ones(1, 4, 12, 12), r"^0 takes a tensor of 4 dimensions with 3 channels.*\(1, 4, 12, 12\)"),
    (torch.ones(3, 12, 12), r"^0 takes a tensor of 4 dimensions"),
    (torch.ones(1, 3, 12, 12, dtype=torch.uint8), r"^0 takes a floating-point tensor.*uint8"),
    (torch.ones(1, 3, 12, 12, device="meta"), r"^0 was frozen on cpu.*meta"),
    (torch.ones(1, 3, 1, 1), r"^3: "),  # too small for the pool
]


@pytest.mark.parametrize("x, message", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_inputs_name_the_layer(x, message, dtype):
    frozen = pooling_ext.freeze(small(), torch.randn(1, 3, 12, 12), dtype)
    with pytest.raises(ArgumentError, match=message):
        frozen(x)


def test_bad_arguments():
    x = torch.randn(1, 3, 12, 12)
    with pytest.raises(TypeError, match=r"torch.nn.Module.*int"):
        pooling_ext.freeze(3, x)
    with pytest.raises(TypeError, match="dtype"):
        pooling_ext.freeze(small(), x, "bfloat16")
    with pytest.raises(ArgumentError, match="int8"):
        pooling_ext.freeze(small(), x, torch.int8)
    with pytest.raises(ArgumentError, match=r"example.*0"):
        pooling_ext.freeze(small(), torch.randn(1, 4, 12, 12))
    frozen = pooling_ext.freeze(small(), x)
    with pytest.raises(ArgumentError, match="already"):
        pooling_ext.freeze(frozen, x)
    with pytest.raises(TypeError, match=r"^0 takes a torch.Tensor.*list"):
        frozen([1.0])
    with pytest.raises(TypeError, match="1 arguments"):
        frozen(x, x)


def test_batch_norm_without_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    for given in (model, nn.Sequential(nn.ReLU(), model)):
        with pytest.raises(ArgumentError, match=r"1 \(BatchNorm2d\).*track_running_stats=False"):
            pooling_ext.freeze(given, torch.randn(2, 3, 4, 4))
