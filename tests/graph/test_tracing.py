"""What patch cannot trace, what a trace must not change, and that tracing leaves no mark."""

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
from fusing_cases import assert_equal, batch, block, flags, residual_block
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pooling_ext

Pair = namedtuple("Pair", "left right")


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
    with_no_grad: r"torch.utils._contextlib.* \(test_tracing.py:\d+\)",
    with_checkpoint: "torch._compile",
    with_branch: "control flow",
    with_random: "random",
    with_torch_random: r"\(test_tracing.py:\d+\)",
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
    calls = [node for node in graph.graph.nodes if node.op.startswith("call")]
    # torch.fx looks into classes that are not torch.nn's, and so into a convolution of ours.
    assert calls[0].target is TF.conv2d
    assert [(node.op, node.target) for node in calls[1:3]] == [
        ("call_module", "bn1"),
        ("call_module", "inplace"),
    ]
    torch.testing.assert_close(graph(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, x)
    torch.testing.assert_close(traced(x), expected)
    assert "batch_norm" in str(traced.inlined_graph) and "pooling_ext::" not in str(traced.inlined_graph)
