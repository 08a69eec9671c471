"""The drop-in conv2d and Conv2d, by Winograd's and the depthwise kernels."""

from __future__ import annotations

import copy
import gc
import pickle
from itertools import product

import pytest
import torch
import torch.nn.functional as TF
from helpers import dtype_id, integers, run_python, strides, with_layout
from torch import Tensor, nn

import pooling_ext
from pooling_ext.functional import conv2d
from pooling_ext.ops import conv_choice, conv_speeds, winograd_weights
from pooling_ext.ops.conv_choice import DEPTHWISE, PHASES, WINOGRAD

pytestmark = pytest.mark.native

BOTH_FORMATS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
KERNELS = pytest.mark.parametrize("kernels", [WINOGRAD, DEPTHWISE])
#: Of the largest element, in float32.
ERROR = 5e-5


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """The kernels do what they can, though PyTorch's may be faster."""
    monkeypatch.setattr(conv_speeds, "speedup", lambda *_: None)
    monkeypatch.setattr(conv_choice, "LEAST_WORK", 0)
    monkeypatch.setattr(conv_choice, "HAS_AMX", False)


def sample(kernels: str, layout: str = "contiguous", dtype=torch.float32, size=(11, 10)):
    """Input, weight, bias and the options of a convolution that they are for."""
    if kernels == WINOGRAD:
        x, weight = torch.randn(2, 32, *size), torch.randn(24, 16, 3, 3) / 12
        options = {"padding": (1, 0), "groups": 2}
        weight = torch.cat((weight, weight.flip(0)))[:48]
    else:
        x, weight = torch.randn(2, 24, *size), torch.randn(24, 1, 5, 5) / 5
        options = {"stride": 2, "padding": (2, 1), "groups": 24}
    bias = torch.randn(weight.shape[0])
    return with_layout(x, layout).to(dtype), weight.to(dtype), bias.to(dtype), options


def off(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max())


def gradients(function, *tensors: Tensor | None, **options) -> tuple[Tensor, ...]:
    """The output for copies of ``tensors`` that ask for gradients, then those."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    output = function(*leaves, **options)
    grad = (torch.arange(output.numel()) % 17 - 8).view(output.shape).to(output.dtype)
    output.backward(grad)
    return output.detach(), *(x.grad for x in leaves if x is not None)


def taken(function, *args, **options) -> list[tuple[str, str]]:
    found = pooling_ext.explain(function, *args, **options).decisions
    return [(decision.op, decision.backend) for decision in found]


@KERNELS
@BOTH_FORMATS
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=dtype_id)
def test_values_and_gradients(kernels, layout, biased, dtype):
    x, weight, bias, options = sample(kernels, layout, dtype)
    given = (x, weight, bias if biased else None)
    assert dtype == torch.float16 or taken(conv2d, *given, **options) == [("conv2d", kernels)]
    ours = gradients(conv2d, *given, **options)
    with torch.no_grad():
        alone = conv2d(*given, **options)
    assert strides(alone) == strides(ours[0]) and off(alone, ours[0]) <= torch.finfo(dtype).eps
    theirs = gradients(TF.conv2d, *given, **options)
    expected = gradients(TF.conv2d, *(None if t is None else t.double() for t in given), **options)
    for one, other, exact in zip(ours, theirs, expected, strict=True):
        assert one.dtype == dtype and strides(one) == strides(other)
        allowed = ERROR if dtype == torch.float32 else torch.finfo(dtype).eps * 16
        assert off(one, exact) <= allowed


@KERNELS
@BOTH_FORMATS
def test_gradcheck(kernels, layout):
    x, weight, bias, options = sample(kernels, layout, torch.float64, (6, 5))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def function(*given: Tensor) -> Tensor:
        return conv2d(*given, **options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@KERNELS
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_wanted(kernels, wanted):
    *given, options = sample(kernels)
    found = []
    for function in (conv2d, TF.conv2d):
        leaves = [x.clone().requires_grad_(want) for x, want in zip(given, wanted, strict=True)]
        function(*leaves, **options).sum().backward()
        found.append([x.grad for x in leaves])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or off(one, other) <= ERROR


@KERNELS
@pytest.mark.parametrize("ours", list(product((False, True), repeat=3)))
def test_phases_are_chosen_one_by_one(kernels, ours, monkeypatch):
    """Whichever of them are PyTorch's, values are the same."""

    def why_not(conv, phase):
        return None if ours[PHASES.index(phase)] else "a test"

    monkeypatch.setitem(conv_choice.WHY_NOT, kernels, why_not)
    x, weight, bias, options = sample(kernels, "channels_last")
    given = gradients(conv2d, x, weight, bias, **options)
    for one, other in zip(given, gradients(TF.conv2d, x, weight, bias, **options), strict=True):
        assert off(one, other) <= ERROR and strides(one) == strides(other)


@KERNELS
@BOTH_FORMATS
def test_compiled(kernels, layout):
    x, weight, bias, options = sample(kernels, layout)
    compiled = torch.compile(conv2d, fullgraph=True, backend="aot_eager")
    ours = gradients(conv2d, x, weight, bias, **options)
    for one, other in zip(gradients(compiled, x, weight, bias, **options), ours, strict=True):
        assert off(one, other) <= ERROR and strides(one) == strides(other)
    with torch.no_grad():
        assert off(compiled(x, weight, bias, **options), ours[0]) <= ERROR


@KERNELS
def test_transforms(kernels):
    """torch.func and forward mode go to PyTorch's operator."""
    x, weight, bias, options = sample(kernels)
    batches = torch.stack((x, -x))
    ours = torch.func.vmap(lambda one: conv2d(one, weight, bias, **options))(batches)
    torch.testing.assert_close(
        ours, torch.stack([TF.conv2d(one, weight, bias, **options) for one in batches])
    )
    tangent = torch.randn_like(x)
    _, ours = torch.func.jvp(lambda one: conv2d(one, weight, **options), (x,), (tangent,))
    torch.testing.assert_close(ours, TF.conv2d(tangent, weight, **options))


def test_a_trace_has_pytorchs_operator():
    conv, x = module(), torch.randn(1, 32, 12, 12)
    traced = torch.jit.trace(conv, x)
    assert "pooling_ext::" not in str(traced.inlined_graph)
    conv.weight.data.neg_()
    assert off(traced(x), conv(x)) <= ERROR


@KERNELS
@BOTH_FORMATS
def test_autocast(kernels, layout):
    x, weight, bias, options = sample(kernels, layout)
    expected = gradients(TF.conv2d, x.double(), weight.double(), bias.double(), **options)

    def autocast(function):
        def call(*given, **options):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*given, **options)

        return call

    ours = gradients(autocast(conv2d), x, weight, bias, **options)
    theirs = gradients(autocast(TF.conv2d), x, weight, bias, **options)
    for one, other, exact in zip(ours, theirs, expected, strict=True):
        assert one.dtype == other.dtype and strides(one) == strides(other)
        assert off(one, exact) <= 1.05 * off(other, exact) + 2**-9


@KERNELS
def test_weights_in_channels_last_decide_too(kernels):
    """As in PyTorch, where the input does not say so."""
    x, weight, bias, options = sample(kernels)
    weight = weight.contiguous(memory_format=torch.channels_last)
    weight = (
        weight
        if kernels == WINOGRAD
        else integers((24, 1, 5, 5), torch.float32).to(memory_format=torch.channels_last)
    )
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            ours, theirs = conv2d(x, weight, bias, **options), TF.conv2d(x, weight, bias, **options)
        assert strides(ours) == strides(theirs) and off(ours, theirs) <= ERROR


@pytest.mark.parametrize(
    "options, error",
    [
        ({"padding": "same"}, None),
        ({"padding": "valid"}, None),
        ({"padding": (2,)}, None),
        ({"stride": [1, 1]}, None),
        ({"dilation": 2}, None),
        ({"stride": 2, "padding": "same"}, RuntimeError),
        ({"groups": 3}, RuntimeError),
        ({"groups": 0}, RuntimeError),
        ({"padding": "wide"}, RuntimeError),
        ({"padding": -1}, RuntimeError),
        ({"bias": torch.ones(3)}, RuntimeError),
        ({"weight": torch.ones(32, 32, 3, 3, dtype=torch.float64)}, RuntimeError),
        ({"weight": torch.ones(32, 16, 3, 3)}, RuntimeError),
        ({"input": torch.ones(1, 32, 1, 1)}, RuntimeError),
        ({"weight": 3}, TypeError),
        ({"weight": torch.ones(32, 32, 3)}, RuntimeError),
        ({"bias": 3, "groups": 32, "weight": torch.ones(32, 1, 3, 3)}, TypeError),
        ({"input": torch.ones(32, 8, 8)}, None),
        ({"input": torch.ones(0, 32, 8, 8)}, None),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else None,
)
def test_arguments_are_pytorchs(options, error):
    call = {"input": torch.randn(2, 32, 9, 8), "weight": torch.randn(32, 32, 3, 3)} | options
    x, weight = call.pop("input"), call.pop("weight")
    if error is not None:
        for function in (TF.conv2d, conv2d):
            with pytest.raises(error):
                function(x, weight, **call)
        return
    ours, theirs = conv2d(x, weight, **call), TF.conv2d(x, weight, **call)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert strides(ours) == strides(theirs)


# --- the weights that are kept ------------------------------------------------------------------------------


class Changes:
    """Ways to change a module's weight, of which PyTorch's counters see some."""

    @staticmethod
    def in_place(conv):
        with torch.no_grad():
            conv.weight.mul_(2)

    @staticmethod
    def data(conv):
        conv.weight.data.neg_()

    @staticmethod
    def one_element(conv):
        conv.weight.data[3, 2, 1, 0] += 1

    @staticmethod
    def swapped_elements(conv):
        conv.weight.data.copy_(conv.weight.data.flip(0).clone())

    @staticmethod
    def new_data(conv):
        conv.weight.data = torch.randn_like(conv.weight.data)

    @staticmethod
    def new_parameter(conv):
        conv.weight = nn.Parameter(torch.randn_like(conv.weight))

    @staticmethod
    def inference_mode(conv):
        with torch.inference_mode():
            conv.weight.add_(1)

    @staticmethod
    def load_state_dict(conv):
        conv.load_state_dict({name: torch.randn_like(value) for name, value in conv.state_dict().items()})

    @staticmethod
    def numpy(conv):
        conv.weight.detach().numpy()[:] *= 3

    @staticmethod
    def bias(conv):
        conv.bias.data += 1


CHANGES = [name for name in vars(Changes) if not name.startswith("_")]


def module(channels: int = 32) -> nn.Conv2d:
    conv = pooling_ext.Conv2d(channels, channels, 3, padding=1)
    return conv.eval().requires_grad_(False)


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_changed_is_transformed_again(change):
    conv, x = module(), torch.randn(2, 32, 9, 9)
    before = conv(x)
    assert torch.equal(conv(x), before)
    getattr(Changes, change)(conv)
    expected = TF.conv2d(x, conv.weight, conv.bias, padding=1)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert off(conv(x), expected) <= ERROR


def test_another_process_changes_a_weight():
    conv, x = module(), torch.randn(2, 32, 9, 9)
    conv.share_memory()
    before = conv(x)
    worker = torch.multiprocessing.get_context("fork").Process(target=Changes.data, args=(conv,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    expected = TF.conv2d(x, conv.weight, conv.bias, padding=1)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert off(conv(x), expected) <= ERROR


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias", "eps"])
def test_a_batch_norm_that_changed_is_folded_again(name):
    net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()).eval()
    pooling_ext.patch(net)
    x = torch.randn(2, 32, 9, 9)
    with torch.no_grad():
        before = net(x)
        if name == "eps":
            net[1].eps = 1.0
        else:
            getattr(net[1], name).data += 1
        expected = TF.relu(net[1](TF.conv2d(x, net[0].weight, net[0].bias, padding=1)))
        assert not torch.allclose(before, expected, atol=1e-3)
        assert off(net(x), expected) <= ERROR


def test_what_is_kept_is_in_no_copy_and_ends_with_its_weight():
    gc.collect()  # what other tests have left
    conv, x = module(), torch.randn(2, 32, 9, 9)
    size = len(pickle.dumps(conv))
    before = winograd_weights.kept_bytes()
    conv(x)
    assert winograd_weights.kept_bytes() == before + 36 * 32 * 32 * 4
    assert set(conv.state_dict()) == {"weight", "bias"} and len(pickle.dumps(conv)) == size
    assert torch.equal(copy.deepcopy(conv)(x), conv(x))
    del conv
    assert winograd_weights.kept_bytes() == before


def test_training_and_the_limit_keep_nothing(monkeypatch):
    gc.collect()
    conv, x = module(), torch.randn(2, 32, 9, 9)
    before = winograd_weights.kept_bytes()
    expected = conv(x)
    conv.requires_grad_(True)(torch.randn(4, 32, 16, 16)).sum().backward()
    assert winograd_weights.kept_bytes() == before
    monkeypatch.setenv("POOLING_EXT_WINOGRAD_MIB", "0.001")
    conv.requires_grad_(False)
    for _ in range(2):
        assert torch.equal(conv(x), expected)
    assert winograd_weights.kept_bytes() == before


# --- the switch -----------------------------------------------------------------------------------------


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.ReLU()
    )


@pytest.mark.parametrize("training", [False, True])
def test_exact_leaves_winograd_out(training):
    model, exact = net().train(training), net()
    exact.load_state_dict(model.state_dict())
    pooling_ext.patch(model)
    report = pooling_ext.patch(exact.train(training), exact=True)
    assert not any(entry.why.endswith("Conv2d") for entry in report.replaced)
    x = torch.randn(2, 32, 20, 20)
    assert WINOGRAD in {name for _, name in taken(model, x)}
    assert WINOGRAD not in {name for _, name in taken(exact, x)}
    again = pickle.loads(pickle.dumps(exact))
    assert WINOGRAD not in {name for _, name in taken(again, x)}
    pooling_ext.patch(model, exact=True)  # the choice may change
    assert WINOGRAD not in {name for _, name in taken(model, x)} and type(model[3]) is nn.Conv2d
    pooling_ext.patch(exact)
    assert WINOGRAD in {name for _, name in taken(exact, x)}
    pooling_ext.unpatch(exact)
    assert type(exact) is nn.Sequential and type(exact[3]) is nn.Conv2d


def test_the_environment_leaves_winograd_out():
    script = (
        "import torch, pooling_ext; from pooling_ext.functional import conv2d;"
        "x, w = torch.randn(1, 64, 32, 32), torch.randn(64, 64, 3, 3);"
        "print(pooling_ext.explain(conv2d, x, w));"
        "assert torch.equal(conv2d(x, w), torch.conv2d(x, w))"
    )
    result = run_python(script, POOLING_EXT_WINOGRAD="0")
    assert result.returncode == 0, result.stderr
    assert "POOLING_EXT_WINOGRAD=0" in result.stdout


def test_hooks_on_a_convolution_run():
    model, x = net().eval(), torch.randn(2, 32, 20, 20)
    pooling_ext.patch(model)
    calls = []
    for index in (0, 3):
        model[index].register_forward_hook(lambda module, args, output: calls.append(module))
    with torch.no_grad():
        model(x)
    assert calls == [model[0], model[3]]


def test_bits_do_not_depend_on_threads():
    model, x = net(), torch.randn(4, 32, 20, 20)
    pooling_ext.patch(model)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        twin = copy.deepcopy(model)
        output = twin(x)
        output.square().sum().backward()
        with torch.no_grad():
            frozen_norm = twin.eval()(x)
        found.append([output.detach(), frozen_norm, *(p.grad for p in twin.parameters())])
    torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)
