"""What changes in a model after patch, and hooks on its modules, are heeded."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from fusing_cases import assert_equal, batch, block, flags, residual_block, stem
from torch import nn

import pooling_ext
from pooling_ext.ops.conv_bn_act.implementations import from_size


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
    with from_size(0 if request.param == "together" else 1 << 40):
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
    net = block(stem)
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
