"""Chains that patch takes together, and forwards that it must not misread."""

from __future__ import annotations

import copy
import gc
import random
import re
import time
import warnings
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as TF
from helpers import BACKENDS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pooling_ext
from pooling_ext import chains

Pair = namedtuple("Pair", "left right")


class Block(nn.Module):
    """Children for the forwards below; subclasses differ in their forward only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.inplace = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.flag = False
        self.downsample = None
        self.layers = nn.ModuleList([nn.BatchNorm2d(4)])
        self.pair = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def block(forward, **members) -> nn.Module:
    cls = type("Net", (Block,), {"forward": forward, "__module__": __name__, **members})
    net = cls().double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return net


def tensors(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [x for item in output for x in tensors(item)] if isinstance(output, (list, tuple)) else []


def run(net: nn.Module, *args, **kwargs):
    """The output, the inputs afterwards, the gradients and the buffers."""
    leaves = [x.clone().requires_grad_() for x in args if isinstance(x, Tensor)]
    copies = iter([leaf.clone() for leaf in leaves])  # a forward may write into its input
    args = [next(copies) if isinstance(x, Tensor) else x for x in args]
    net.zero_grad()
    output = net(*args, **kwargs)
    if any(x.requires_grad for x in tensors(output)):
        sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in tensors(output)).backward()
    grads = [x.grad for x in (*leaves, *net.parameters())]
    return output, [x.detach() for x in args if isinstance(x, Tensor)], grads, list(net.buffers())


def assert_equal(net: nn.Module, twin: nn.Module, *args, **kwargs) -> None:
    ours, theirs = run(net, *args, **kwargs), run(twin, *args, **kwargs)
    assert type(ours[0]) is type(theirs[0])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def batch(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 6, 6)), dtype=torch.float64)


def residual_block(self, x):
    identity = x
    out = self.inplace(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(out))
    if self.downsample is not None:
        identity = self.downsample(x)
    out += identity
    return self.inplace(out)


def add_pool(self, x):
    return self.gap(self.act(self.conv1(x) + x))


#: A forward, and the chains in it.
CHAINS = {
    "conv-bn": (lambda s, x: s.bn1(s.conv1(x)), ["conv1-bn1"]),
    "conv-bn-relu": (lambda s, x: s.act(s.bn1(s.conv1(x))), ["conv1-bn1-act"]),
    "inplace": (lambda s, x: s.inplace(s.bn1(s.conv1(x))), ["conv1-bn1-inplace"]),
    "F.relu": (lambda s, x: TF.relu(s.bn1(s.conv1(x))), ["conv1-bn1-relu"]),
    "F.relu inplace": (lambda s, x: TF.relu(s.bn1(s.conv1(x)), True), ["conv1-bn1-relu"]),
    "torch.relu": (lambda s, x: torch.relu(s.bn1(x)), ["bn1-relu"]),
    "Tensor.relu": (lambda s, x: s.bn1(x).relu(), ["bn1-relu"]),
    "Tensor.relu_": (lambda s, x: s.bn1(x).relu_(), ["bn1-relu"]),
    "bn-relu-conv": (lambda s, x: s.conv1(s.act(s.bn1(x))), ["bn1-act"]),
    "other activation": (lambda s, x: TF.silu(s.bn1(s.conv1(x))), ["conv1-bn1"]),
    "residual": (residual_block, ["conv1-bn1-inplace", "conv2-bn2-add-inplace"]),
    "add": (lambda s, x: s.act(s.bn1(s.conv1(x)) + x), ["conv1-bn1-add-act"]),
    "radd": (lambda s, x: s.act(x + s.bn1(s.conv1(x))), ["conv1-bn1-add-act"]),
    "torch.add": (lambda s, x: torch.add(s.bn1(s.conv1(x)), x).relu(), ["conv1-bn1-add-relu"]),
    "Tensor.add_": (lambda s, x: s.bn1(s.conv1(x)).add_(x).relu_(), ["conv1-bn1-add-relu"]),
    "add without relu": (lambda s, x: s.bn1(s.conv1(x)) + x, ["conv1-bn1-add"]),
    "two norms": (
        lambda s, x: s.act(s.bn1(s.conv1(x)) + s.bn2(s.conv2(x))),
        ["conv1-bn1", "conv2-bn2-add-act"],
    ),
    "stem": (lambda s, x: s.pool(s.act(s.bn1(s.conv1(x)))), ["conv1-bn1-act-pool"]),
    "stem without conv": (lambda s, x: s.pool(s.inplace(s.bn1(x))), ["bn1-inplace-pool"]),
    "functional stem": (
        lambda s, x: TF.max_pool2d(TF.relu(s.bn1(s.conv1(x))), [3, 3], stride=2, padding=1),
        ["conv1-bn1-relu-max_pool2d"],
    ),
    "tail": (add_pool, ["add-act-gap"]),
    "functional tail": (
        lambda s, x: TF.adaptive_avg_pool2d(TF.relu(torch.add(x, s.conv1(x))), (1, 1)),
        ["add-relu-adaptive_avg_pool2d"],
    ),
    "mean": (lambda s, x: (s.conv1(x) + x).relu().mean((2, 3)), ["add-relu-mean"]),
    "mean, kept": (lambda s, x: (s.conv1(x) + x).relu().mean([-1, -2], keepdim=True), ["add-relu-mean"]),
    "into a Sequential": (
        lambda s, x: s.act(x + s.pair(x)),
        ["Conv2d(pair.0)-BatchNorm2d(pair.1)-add-act"],
    ),
    "list of layers": (lambda s, x: next(layer(x) for layer in s.layers), ["BatchNorm2d(layers.0)"]),
    "pooling functions": (
        lambda s, x: [TF.max_pool2d(x, 2), torch.max_pool2d(x, 2), TF.avg_pool2d(x, 3, 1, 1)],
        ["max_pool2d", "avg_pool2d"],
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CHAINS)
def test_chain(name, training, monkeypatch):
    forward, expected = CHAINS[name]
    net = block(forward).train(training)
    twin = copy.deepcopy(net)
    report = pooling_ext.patch(net, strict=True)
    assert [entry.what for entry in report.replaced if entry.path == "(root)"] == expected
    x = batch()
    assert_equal(net, twin, x)
    # The fused operators did run: the modules that they stand for were not called.
    called = []
    for module in (nn.BatchNorm2d, nn.ReLU):
        plain = module.forward
        monkeypatch.setattr(module, "forward", lambda *a, plain=plain: (called.append(a[0]), plain(*a))[1])
    net(x)
    assert not called
    with torch.no_grad():
        torch.testing.assert_close(net(x), twin(x))


def small_resnet(self, x):
    x = self.pool(self.act(self.bn1(self.conv1(x))))
    x = self.inplace(self.bn2(self.conv2(x)) + x)
    return self.gap(self.act(self.conv1(x) + x))


@BACKENDS
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_backend(backend, training, memory_format):
    """A stem, a block's end and a tail: outputs, gradients and running statistics."""
    net = block(small_resnet).train(training).to(memory_format=memory_format)
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    x = batch(3, 4, 9, 8).to(memory_format=memory_format)
    assert_equal(net, twin, x)
    name = backend.partition("-")[0]
    names = {choice.op for choice in pooling_ext.explain(net, x).decisions if choice.backend == name}
    fused = {"batch_norm_relu_max_pool", "batch_norm_act", "add_relu_global_avg_pool"}
    assert names >= (fused if training else {"add_relu_global_avg_pool"})


def used_twice(self, x):
    out = self.bn1(self.conv1(x))
    return self.act(out) + out


def into_the_input(self, x):
    x += self.bn1(self.conv1(x))
    return self.act(x)


def relu_thrown_away(self, x):
    out = self.bn1(x)
    self.inplace(out)
    return out


def input_changed_between(self, x):
    out = self.conv1(x)
    x.mul_(2)
    return self.act(self.bn1(out) + x)


def residual_changed_between(self, x):
    out = self.bn1(self.conv1(x)) + x
    x.zero_()
    return self.act(out)


def norm_input_changed_between(self, x):
    out = self.bn1(x)
    x.view(-1).add_(1)
    return self.act(out), x


def sum_into_the_input(self, x):
    y = self.conv1(x)
    x += y
    return self.gap(self.act(x)), x


def in_place_before_the_norm(self, x):
    y = x
    y *= 2
    return self.act(self.bn1(x)) + y


TRAPS = (used_twice, into_the_input, relu_thrown_away, input_changed_between)
TRAPS += (residual_changed_between, norm_input_changed_between, sum_into_the_input, in_place_before_the_norm)


@pytest.mark.parametrize("forward", TRAPS, ids=lambda f: f.__name__)
def test_what_is_written_in_place_shows(forward):
    net = block(forward)
    twin = copy.deepcopy(net)
    assert not pooling_ext.patch(net).skipped
    with torch.no_grad():  # PyTorch has no backward for most of these
        assert_equal(net, twin, batch())


def with_no_grad(self, x):
    with torch.no_grad():
        x = self.bn1(x)
    return self.act(x)


def with_checkpoint(self, x):
    return checkpoint(lambda x: self.act(self.bn1(x)), x, use_reentrant=False)


def with_branch(self, x):
    return self.act(self.bn1(x)) if x.sum() > 0 else x


def with_random(self, x):
    return self.act(self.bn1(x)) if random.random() > 0.5 else x


def with_torch_random(self, x):
    return self.act(self.bn1(x)) if torch.rand(1) > 0.5 else x


def with_print(self, x):
    print(end="")
    return self.bn1(x)


def with_memory(self, x):
    self.last = self.bn1(x)
    return self.last


def with_list(self, x):
    self.seen.append(x)
    return self.bn1(x)


def with_counter(self, x):
    self.bn1.num_batches_tracked += 1
    return self.bn1(x)


def with_type(self, x):
    return self.bn1(x) if type(x) is Tensor else x


def with_type_of_a_value(self, x):
    x = self.bn1(x)
    return x if isinstance(x, Tensor) else None


def with_grad_mode(self, x):
    return self.bn1(x) if torch.is_grad_enabled() else x


def with_object(self, x):
    return self.bn1(x) if self.options.norm else x


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + x

    @staticmethod
    def backward(ctx, grad):
        return grad


def with_function(self, x):
    return self.bn1(Double.apply(x))


UNTRACEABLE = {
    with_no_grad: r"torch.utils._contextlib.* \(test_fusing.py:\d+\)",
    with_checkpoint: "torch._compile",
    with_branch: "control flow",
    with_random: "random",
    with_torch_random: r"\(test_fusing.py:\d+\)",
    with_print: "print",
    with_memory: "changes self.last",
    with_list: "changes self.seen",
    with_counter: "changes self.bn1",
    with_type: r"type\(\)",
    with_type_of_a_value: "type of a value",
    with_grad_mode: "is_grad_enabled",
    with_object: "self.options, a Options",
    with_function: "Double.apply",
}
Options = type("Options", (), {"norm": True})


@pytest.mark.parametrize("forward", UNTRACEABLE, ids=lambda f: f.__name__)
def test_a_forward_that_no_trace_can_stand_for_is_skipped(forward):
    net = block(forward)
    net.seen, net.options = [], Options()
    before, fields = type(net), dict(net.__dict__)
    report = pooling_ext.patch(net)
    (entry,) = report.skipped
    assert entry.path == "(root)" and entry.what == "Net"
    assert re.search(UNTRACEABLE[forward], entry.why), entry.why
    assert type(net) is before and net.__dict__ == fields and not net.seen
    with pytest.raises(ValueError, match="Net"):
        pooling_ext.patch(net, strict=True)


def outputs_of_a_kind(make):
    return lambda self, x: make(self.bn1(x), self.act(x))


@pytest.mark.parametrize(
    "make",
    [
        Pair,
        lambda *v: OrderedDict(b=v[1], a=v[0]),
        lambda *v: {"x": v},
        lambda *v: [*v],
        lambda *v: (v, None),
    ],
)
def test_outputs_keep_their_types(make):
    net = block(outputs_of_a_kind(make))
    twin = copy.deepcopy(net)
    assert pooling_ext.patch(net, strict=True).replaced
    assert_equal(net, twin, batch())


def with_options(self, x, residual=None, *rest, flip=False):
    out = self.bn1(self.conv1(x))
    if residual is not None:
        out = out + residual
    if flip:
        out = -out
    return (self.act(out), *rest)


def test_arguments():
    net = block(with_options)
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    x, y = batch(), batch()
    assert_equal(net, twin, x)
    assert_equal(net, twin, x=x)
    assert_equal(net, twin, x, None)
    assert_equal(net, twin, x, y)
    assert_equal(net, twin, x, residual=y, flip=True)
    assert_equal(net, twin, x, y, y, 3)
    for wrong in ((), (None,), ([x],), (x[0],)):
        with pytest.raises(Exception) as theirs:
            twin(*wrong)
        with pytest.raises(theirs.type):
            net(*wrong)


def tensor_or_list(self, input):
    features = [input] if isinstance(input, Tensor) else input
    return self.act(self.bn1(torch.cat(features, 1)))


def test_tensor_or_list():
    net = block(tensor_or_list)
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    x = batch()
    for value in (x, [x], [x[:, :2], x[:, 2:]], (x[:, :1], x[:, 1:])):
        torch.testing.assert_close(net(value), twin(value))
    torch.testing.assert_close(net.state_dict(), twin.state_dict())


def flags(self, x):
    x = self.act(self.bn1(self.conv1(x)))
    if self.flag:
        x = x * 2
    if self.training:
        x = x + 1
    if self.downsample is not None:
        x = self.downsample(x)
    for layer in self.layers:
        x = layer(x)
    return x


def change_flag(net):
    net.flag = True


def change_downsample(net):
    net.downsample = nn.Sequential(nn.Sigmoid())


def change_layers(net):
    net.layers.append(nn.Tanh())


def change_activation(net):
    net.act = nn.LeakyReLU(0.3)


def change_norm(net):
    net.bn1 = nn.GroupNorm(2, 4).double()


def change_to_identity(net):
    net.bn1 = nn.Identity()


def change_conv(net):
    net.conv1 = nn.Sequential(net.conv1, nn.Sigmoid())


def change_forward_of_child(net):
    net.bn1.forward = lambda x: x * 3


def change_forward(net):
    net.forward = lambda x: x * 5


def parametrize(net):
    nn.utils.parametrizations.weight_norm(net.conv1)


def old_weight_norm(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.conv1)


def freeze_norm(net):
    net.bn1.eval().requires_grad_(False)


def no_statistics(net):
    net.bn1.track_running_stats, net.bn1.momentum = False, None


def cumulative(net):
    net.bn1.momentum = None


def replace_parameters(net):
    net.conv1.weight = nn.Parameter(net.conv1.weight.detach() * 2)
    net.bn1.weight = nn.Parameter(net.bn1.weight.detach() + 1)
    net.bn1.running_mean = net.bn1.running_mean + 1


def plain_tensor_for_a_parameter(net):
    weight = net.bn1.weight.detach() * 2
    del net.bn1.weight
    net.bn1.weight = weight


def plain_function_for_a_child(net):
    del net.act
    net.act = torch.tanh


def freeze_all(net):
    net.requires_grad_(False)


CHANGES = (change_flag, change_downsample, change_layers, change_activation, change_norm, change_to_identity)
CHANGES += (change_conv, change_forward_of_child, change_forward, parametrize, old_weight_norm, freeze_norm)
CHANGES += (no_statistics, cumulative, nn.Module.eval, replace_parameters, plain_tensor_for_a_parameter)
CHANGES += (plain_function_for_a_child, freeze_all)


@pytest.fixture(params=["together", "one by one"])
def any_way(request):
    """Chains of small inputs are taken together, as in all tests, or go through the modules, as they do."""
    with chains.from_size(0 if request.param == "together" else 1 << 40):
        yield


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_changes_after_patch_is_heeded(change):
    net = block(flags)
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    for one in (net, twin):
        torch.manual_seed(1)
        change(one)
    x = batch()
    for _ in range(2):
        assert_equal(net, twin, x)


def test_a_forward_of_the_class_that_changes():
    net = block(flags)
    pooling_ext.patch(net)
    type(net).__mro__[1].forward = lambda self, x: x * 7
    x = batch()
    assert torch.equal(net(x), x * 7)


@pytest.mark.usefixtures("any_way")
def test_what_changes_between_calls_is_heeded():
    """Of one model, after calls that found it otherwise."""
    net = block(residual_block).float()
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    x = torch.randn(2, 4, 6, 6)
    seen = {net: 0, twin: 0}
    handles = []

    def count(one):
        def hook(*_):
            seen[one] += 1

        handles.append(one.bn2.register_forward_hook(hook))

    def autocast(one):
        one.autocast = True

    def full_precision(one):
        one.autocast = False

    def remove_hooks(one):
        while handles:
            handles.pop().remove()

    steps = (nn.Module.eval, freeze_all, count, autocast, remove_hooks, nn.Module.train, full_precision)
    steps += (lambda one: one.requires_grad_(True), replace_parameters, nn.Module.eval)
    for step in (lambda one: None, *steps):
        for one in (net, twin):
            step(one)
        for grad in (True, False):
            enabled = getattr(twin, "autocast", False)
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                ours, theirs = net(x), twin(x)
            assert ours.requires_grad == theirs.requires_grad and ours.dtype == theirs.dtype
            tolerance = 0.05 if enabled else 1e-5
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
            for one, other in zip(net.buffers(), twin.buffers(), strict=True):
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert seen[net] == seen[twin] > 0


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("where", ["conv1", "bn1", "act", "pool"])
def test_hooks_on_children_fire(where):
    net = block(CHAINS["stem"][0])
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    seen = {net: [], twin: []}
    for one, calls in seen.items():
        child = getattr(one, where)
        child.register_forward_pre_hook(lambda m, args, calls=calls: calls.append(args[0].detach().clone()))
        child.register_forward_hook(lambda m, args, out, calls=calls: calls.append(out.detach().clone()))
        child.register_full_backward_hook(lambda m, g, out, calls=calls: calls.append(out[0].clone()))
    assert_equal(net, twin, batch())
    assert len(seen[net]) == 3
    torch.testing.assert_close(seen[net], seen[twin])


@pytest.mark.usefixtures("any_way")
def test_global_hooks_fire():
    net = block(residual_block)
    pooling_ext.patch(net, strict=True)
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: calls.append(m))
    try:
        net(batch())
    finally:
        handle.remove()
    assert calls == [net.conv1, net.bn1, net.inplace, net.conv2, net.bn2, net.inplace, net]


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (1, 4, 6, 6), (4, 1, 1), (2, 4, 6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("in_place", [True, False])
def test_residuals_that_differ(shape, dtype, in_place):
    """Broadcasting and type promotion are PyTorch's."""

    def out_of_place(self, x, y):
        return self.act(self.bn1(self.conv1(x)) + y)

    def into_the_norm(self, x, y):
        out = self.bn1(self.conv1(x))
        out += y
        return self.act(out)

    net = block(into_the_norm if in_place else out_of_place).float().eval()
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    x, y = batch().float(), torch.randn(shape, dtype=dtype)
    ours, theirs = net(x, y), twin(x, y)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "option", [{}, {"padding": "same"}, {"padding": "valid"}, {"stride": 2, "dilation": 2}]
)
def test_the_residual_of_any_convolution(option):
    net = block(lambda s, x, y: s.act(s.bn1(s.conv1(x)) + y))
    net.conv1 = nn.Conv2d(4, 4, (3, 1), **option).double()
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    x = batch(2, 4, 9, 8)
    y = torch.randn_like(net.conv1(x))
    assert chains._fits(y, net.conv1, x)
    assert not chains._fits(y[..., :1], net.conv1, x)
    assert_equal(net, twin, x, y)


def test_autocast():
    net = block(residual_block).float()
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    x = batch().float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = net(x), twin(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=4e-2, atol=4e-2)


def test_sync_batch_norm_before_and_after():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(block(residual_block))
    twin = block(residual_block)
    twin.load_state_dict(net.state_dict())
    assert [entry.what for entry in pooling_ext.patch(net, strict=True).replaced][:2] == CHAINS["residual"][1]
    late = copy.deepcopy(twin)
    pooling_ext.patch(late)
    late = nn.SyncBatchNorm.convert_sync_batchnorm(late)
    x = batch()
    assert_equal(net, copy.deepcopy(twin), x)
    assert_equal(late, twin, x)
    assert isinstance(late.bn1, nn.SyncBatchNorm)


def test_tracing_leaves_the_module_alone():
    net = block(flags)
    fields = {path: dict(module.__dict__) for path, module in net.named_modules()}
    pooling_ext.patch(net)
    for path, module in net.named_modules():
        assert {k: v for k, v in module.__dict__.items() if "pooling_ext" not in k} == fields[path]
    pooling_ext.unpatch(net)
    for path, module in net.named_modules():
        assert module.__dict__ == fields[path]


def test_garbage_collected_while_tracing_is_not_the_models_doing():
    def collected(phase, info):
        time.perf_counter()

    def forward(self, x):
        return TF.relu(self.bn1(self.conv1(x)))

    gc.callbacks.append(collected)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        report = pooling_ext.patch(block(forward))
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(collected)
    assert not report.skipped and report.replaced
    assert gc.isenabled()


def test_torch_fx_and_jit_trace_see_the_modules():
    net = block(residual_block).eval()
    x = batch()
    expected = net(x)
    pooling_ext.patch(net)
    graph = torch.fx.symbolic_trace(net)
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_module"][:3] == [
        "conv1",
        "bn1",
        "inplace",
    ]
    torch.testing.assert_close(graph(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, x)
    torch.testing.assert_close(traced(x), expected)
    assert "batch_norm" in str(traced.inlined_graph) and "pooling_ext" not in str(traced.inlined_graph)


@pytest.mark.parametrize("forward", [residual_block, flags, CHAINS["into a Sequential"][0]])
def test_compiles_and_exports(forward):
    net = block(forward)
    twin = copy.deepcopy(net)
    pooling_ext.patch(net)
    x = batch()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        torch.testing.assert_close(compiled.train(mode)(x), twin.train(mode)(x))
    assert net._modules.keys() == twin._modules.keys()
    if forward is flags:
        net.flag = twin.flag = True  # Dynamo's guards see what ours look at
        torch.testing.assert_close(compiled(x), twin(x))
    exported = torch.export.export(net, (x,))
    torch.testing.assert_close(exported.module()(x), twin(x))


def test_small_inputs_go_through_the_modules():
    def forward(self, x):
        return TF.relu(self.bn1(self.conv1(x)))

    net = block(forward).eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    expected = net(x)
    pooling_ext.patch(net)
    operators = []
    for least in (0, x.numel() + 1):
        with chains.from_size(least):
            found = pooling_ext.explain(net, x)
            operators.append([decision.op for decision in found.decisions])
            torch.testing.assert_close(net(x), expected)
    assert "batch_norm_act" in operators[0]
    assert operators[1] == []
