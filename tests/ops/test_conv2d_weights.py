"""The drop-in Conv2d: the transformed weights that it keeps, and the switches that leave Winograd out."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as TF
from conv2d_cases import ERROR, off, taken
from helpers import run_python
from torch import nn

import pooling_ext
from pooling_ext.ops import winograd_weights
from pooling_ext.ops.conv_choice import WINOGRAD

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("convolutions_of_any_size")]


def test_a_trace_has_pytorchs_operator():
    conv, x = module(), torch.randn(1, 32, 12, 12)
    traced = torch.jit.trace(conv, x)
    assert "pooling_ext::" not in str(traced.inlined_graph)
    conv.weight.data.neg_()
    assert off(traced(x), conv(x)) <= ERROR


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
