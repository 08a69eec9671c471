"""freeze on code that works in place, or knows a tensor by two names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from freezing_cases import assert_frozen, conv, images, network, norm
from torch import nn

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]


@network(conv=conv, bn=norm)
def second_name(self, x):
    y = self.bn(self.conv(x))
    z = y
    z += 1
    return y - 2 * z + y * y


@network(layers=lambda: nn.ModuleList(conv() for _ in range(3)))
def running_sum(self, x):
    x, seen = x * 1.0, []
    for layer in self.layers:
        x += layer(x)
        seen.append(x)
    return torch.stack(seen)


@network(conv=conv)
def function_in_place(self, x):
    y = x * 2
    a = self.conv(y)
    y = TF.leaky_relu_(y, 0.1)
    return a + y


@network(bn=norm)
def written_through_a_view(self, x):
    y = x * 1.0
    v = y[:, :2]
    b = self.bn(y)
    v.mul_(2.0)
    return torch.relu(b) + y


@network()
def contiguous_of_a_contiguous(self, x):
    y = x * 1.0
    y.contiguous().relu_()
    return y


@network(conv=conv)
def contiguous_of_a_convolution(self, x):
    y = self.conv(x)
    z = y.contiguous()
    y += 1
    return z + y


@network(conv=conv)
def flat_view(self, x):
    y = self.conv(x)
    y.view(x.size(0), -1).mul_(2)
    return y


@network(conv=conv)
def reshape_before_a_write(self, x):
    y = self.conv(x)
    z = y.reshape(x.size(0), -1)
    y.mul_(2)
    return z


@network(conv=conv, bn=norm)
def out_argument(self, x):
    y = self.conv(x) * 1
    torch.add(y, 1, out=y)
    return self.bn(y) + y


@network(conv=conv, bn=norm)
def items_set(self, x):
    y = self.conv(x)
    y[:, :2] = 0.5
    return torch.relu(self.bn(y))


@network(conv=conv)
def chunks(self, x):
    a, b = self.conv(x).chunk(2, 1)
    a += b
    b.sub_(a)
    return torch.cat([a, b], 1)


@network(conv=conv)
def new_memory(self, x):
    made = torch.zeros(x.shape)
    made[:, 1] += self.conv(x)[:, 0]
    return made


@network(conv=conv)
def data_of_a_value(self, x):
    y = self.conv(x)
    y.data.add_(1)
    return y


@network(conv=conv, bn=norm, relu=lambda: nn.ReLU(inplace=True))
def shared_relu(self, x):
    y = self.conv(x)
    z = self.relu(y)
    w = self.relu(self.bn(y))
    return y + z + w


@network(conv=conv, bn=norm)
def argument_changed(self, x):
    x.relu_()
    return self.bn(self.conv(x))


@network(conv=conv, bn=norm)
def argument_changed_through_a_view(self, x):
    x[:, :2].mul_(3)
    return self.bn(self.conv(x))


@network(conv=conv)
def argument_returned(self, x):
    return x, self.conv(x)


@network(conv=conv, bn=norm)
def normalized_twice(self, x):
    y = self.conv(x)
    return self.bn(y) + self.bn(y + 1)


@network(conv=conv)
def detached_and_written(self, x):
    y = self.conv(x)
    y.detach().clamp_(min=0)
    return y


@network(conv=conv, bn=norm)
def transposed_and_written(self, x):
    y = self.bn(self.conv(x))
    y.transpose(2, 3).add_(torch.arange(4.0).view(4, 1, 1))
    return torch.relu(y)


ALIASES = [
    second_name,
    running_sum,
    function_in_place,
    written_through_a_view,
    contiguous_of_a_contiguous,
    contiguous_of_a_convolution,
    flat_view,
    reshape_before_a_write,
    out_argument,
    items_set,
    chunks,
    new_memory,
    data_of_a_value,
    shared_relu,
    argument_changed,
    argument_changed_through_a_view,
    argument_returned,
    normalized_twice,
    detached_and_written,
    transposed_and_written,
]


@pytest.mark.parametrize("net", ALIASES, ids=lambda c: c.__name__)
def test_aliases(net):
    assert_frozen(net(), images())
