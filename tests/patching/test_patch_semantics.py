"""patch on ordinary code: arguments that are numbers, questions, compiled models, and writes afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as TF
from freezing_cases import images, network, norm
from fusing_cases import assert_equal, batch, block
from torch import nn

import pooling_ext

# --- arguments that are numbers ----------------------------------------------------------------------------


@network(linear=lambda: nn.Linear(4, 4))
def zeros_of_a_size(self, n):
    return self.linear(torch.zeros(n, 4) + 1)


@network(linear=lambda: nn.Linear(4, 4), bn=lambda: norm(4, nn.BatchNorm1d))
def range_to_a_number(self, n):
    return torch.relu(self.bn(self.linear(torch.arange(n).float() * torch.ones(3, n))))


@network(linear=lambda: nn.Linear(4, 4))
def full_of_a_number(self, n):
    return self.linear(torch.full((n,), 1.0)) + self.linear(torch.full((4,), n).float())


@network(linear=lambda: nn.Linear(4, 4))
def tensor_of_numbers(self, n):
    return self.linear(torch.tensor([n, n, n, n]).float())


@network(bn=norm)
def noise_of_a_size(self, n):
    return torch.relu(self.bn(torch.ones(2, n, 3, 3) + 0 * torch.empty(2, n, 3, 3).fill_(n)))


@network(bn=norm)
def two_kinds_of_arguments(self, x, n):
    return torch.relu(self.bn(x)) + torch.eye(n)


NUMBERS = [zeros_of_a_size, range_to_a_number, full_of_a_number, tensor_of_numbers, noise_of_a_size]


@pytest.mark.parametrize("net", NUMBERS, ids=lambda c: c.__name__)
def test_arguments_that_are_numbers(net):
    """A value of a trace is no tensor and no number to PyTorch's C code, which says so."""
    model = net()
    twin = copy.deepcopy(model)
    pooling_ext.patch(model)
    torch.testing.assert_close(model(4), twin(4))
    torch.testing.assert_close(model(n=4), twin(n=4))


def test_a_number_beside_a_tensor():
    model, x = two_kinds_of_arguments(), images(2, 4, 5, 5)
    twin = copy.deepcopy(model)
    pooling_ext.patch(model)
    torch.testing.assert_close(model(x, 5), twin(x, 5))


# --- questions about values --------------------------------------------------------------------------------


def asks_for_node(self, x):
    y = self.act(self.bn1(x))
    return y * 3 if hasattr(y, "node") or hasattr(x, "graph") else y * 2


def asks_for_shape(self, x):
    y = self.act(self.bn1(x))
    return y * 3 if hasattr(y, "shape") else y * 2


def asks_for_a_default(self, x):
    y = self.act(self.bn1(x))
    return y * 3 if getattr(y, "node", None) is None else y * 2


def asks_torch(self, x):
    y = self.act(self.bn1(x))
    return y * 3 if torch.is_tensor(y) else y * 2


@pytest.mark.parametrize(
    "forward", [asks_for_node, asks_for_shape, asks_for_a_default, asks_torch], ids=lambda f: f.__name__
)
def test_questions_about_values(forward):
    net = block(forward)
    twin = copy.deepcopy(net)
    pooling_ext.patch(net)
    for mode in (True, False):
        assert_equal(net.train(mode), twin.train(mode), batch())


# --- compiled models and GraphModules ----------------------------------------------------------------------


def residual(self, x):
    return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + x)


def stem_and_mean(self, x):
    y = self.pool(self.act(self.bn1(self.conv1(x))))
    return self.act(y + y.flip(1)).mean((2, 3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("forward", [residual, stem_and_mean], ids=lambda f: f.__name__)
def test_compiled_without_graph_breaks(forward, training):
    torch._dynamo.reset()
    net = block(forward).train(training)
    twin = copy.deepcopy(net)
    assert pooling_ext.patch(net).replaced
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = batch()
    for _ in range(2):
        torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(list(net.buffers()), list(twin.buffers()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("forward", [residual, stem_and_mean], ids=lambda f: f.__name__)
def test_graph_modules(forward, training):
    """Their pooling modules become ours; their own forward is left alone, with the reason."""
    net = torch.fx.symbolic_trace(block(forward).train(training))
    twin = copy.deepcopy(net)
    report = pooling_ext.patch(net)
    assert any("GraphModule" in entry.why for entry in report.skipped)
    x = batch()
    for one, other in ((net, twin), (copy.deepcopy(net), copy.deepcopy(twin))):
        assert_equal(one, other, x)


# --- writes after a chain ----------------------------------------------------------------------------------


def operand_written_after_the_mean(self, x):
    a, b = self.conv1(x), x * 2
    mean = torch.relu(a + b).mean((2, 3))
    a.mul_(2)
    return mean, a


def other_operand_written_after_the_mean(self, x):
    a, b = self.conv1(x), x * 2
    mean = TF.adaptive_avg_pool2d(self.act(a + b), 1)
    b[:, :2] = 0.5
    return mean, b


def operand_written_through_a_view(self, x):
    a, b = self.conv1(x), x * 2
    view = a.transpose(1, 2)
    mean = self.gap(self.act(a + b))
    view += 1
    return mean, a


def pooled_output_written(self, x):
    y = self.pool(self.act(self.bn1(self.conv1(x))))
    y.mul_(2)
    return y


def pooled_output_written_by_an_operator(self, x):
    y = self.pool(self.act(self.bn1(self.conv1(x))))
    y += 1
    return self.conv2(y) + y


def pooled_output_written_through_a_view(self, x):
    y = TF.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
    y[:, 0].add_(1)
    return y


def activation_written(self, x):
    y = self.act(self.bn1(self.conv1(x)))
    y = y * 1
    y.mul_(3)
    return y


WRITES = [
    operand_written_after_the_mean,
    other_operand_written_after_the_mean,
    operand_written_through_a_view,
    pooled_output_written,
    pooled_output_written_by_an_operator,
    pooled_output_written_through_a_view,
    activation_written,
]


@pytest.mark.parametrize("forward", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_writes_after_a_chain(forward, training):
    """Backward finds what it saved: gradients are those of the model, and no error about a changed tensor."""
    net = block(forward).train(training)
    twin = copy.deepcopy(net)
    pooling_ext.patch(net)
    assert_equal(net, twin, batch())


# --- batch norms that are called twice ---------------------------------------------------------------------


class TwiceBetween(nn.Module):
    """The second call of the batch norm is between the first and what would be taken together with it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.inner = nn.Sequential(self.bn)

    def forward(self, x):
        y = self.bn(self.conv(x))
        z = torch.sigmoid(self.inner(x))
        return torch.relu(y), torch.relu(y + z), z


class TwiceInTurn(nn.Module):
    """PyTorch's operator, as something is added that has another shape, and ours."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.rand(1))

    def forward(self, x):
        return self.bn(self.scale + self.bn(self.conv(x)))


@pytest.mark.parametrize("cls", [TwiceBetween, TwiceInTurn])
def test_a_batch_norm_is_called_twice(cls):
    """Its running statistics move in the order of the calls, and backward takes both."""
    model = cls().double().train()
    patched = copy.deepcopy(model)
    assert pooling_ext.patch(patched).replaced
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    results = []
    for net in (model, patched):
        outputs = net(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(output.square().sum() for output in outputs).backward()
        results.append([*outputs, *net.buffers(), *(p.grad for p in net.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
