"""freeze on ordinary code: types, random numbers, state and contexts are the model's own."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from freezing_cases import assert_close, assert_frozen, conv, images, is_whole, network, norm, seeded
from torch import Tensor, nn

import pooling_ext

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]

# --- types and attributes ----------------------------------------------------------------------------------


@network(conv=conv, bn=norm)
def is_instance(self, x):
    y = self.bn(self.conv(x))
    return y * 2 if isinstance(y, Tensor) and not isinstance(y, (list, nn.Parameter)) else y


@network(conv=conv, bn=norm)
def is_tensor(self, x):
    y = self.bn(self.conv(x))
    return y * 2 if torch.is_tensor(y) and torch.is_tensor(x) else y


@network(conv=conv, bn=norm)
def is_instance_for_scripts(self, x):
    y = self.bn(self.conv(x))
    return y * 2 if torch.jit.isinstance(y, Tensor) else y


@network(conv=conv, bn=norm)
def exact_type(self, x):
    y = self.bn(self.conv(x))
    return y * 2 if type(y) is Tensor else y


@network(conv=conv)
def type_of_self(self, x):
    return self.conv(x) * (2 if type(self).__name__ == "type_of_self" else 1)


@network(conv=conv, bn=norm)
def has_attribute(self, x):
    foreign = hasattr(x, "graph") or hasattr(x, "node") or hasattr(x, "tracer")
    return self.bn(self.conv(x)) * (1 if foreign or not hasattr(x, "shape") else 2)


@network(conv=conv)
def attribute_with_default(self, x):
    y = self.conv(x)
    return y * (2 if getattr(y, "node", None) is None and getattr(y, "mask", None) is None else 3)


@network(conv=conv)
def dtype_and_rank(self, x):
    y = self.conv(x)
    return y.flatten(1) if y.dim() == 4 and y.ndim == 4 and y.dtype == torch.float32 else -y


@network(conv=conv, bn=norm)
def eps_of_a_child(self, x):
    y = self.conv(x)
    return y if float(self.bn.eps) > 0 else x


TYPES = [
    is_instance,
    is_tensor,
    is_instance_for_scripts,
    exact_type,
    type_of_self,
    has_attribute,
    attribute_with_default,
    dtype_and_rank,
    eps_of_a_child,
]


@pytest.mark.parametrize("net", TYPES, ids=lambda c: c.__name__)
def test_types_and_attributes(net):
    assert_frozen(net(), images())


# --- random numbers ----------------------------------------------------------------------------------------


@network(conv=conv, bn=norm)
def noise(self, x):
    return self.bn(self.conv(x)) + torch.rand(1)


@network(conv=conv)
def noise_like(self, x):
    y = self.conv(x)
    return y + torch.rand_like(y) * torch.randn(y.shape)


@network(conv=conv)
def noise_in_place(self, x):
    return self.conv(x) + torch.empty(4, 1, 1).uniform_()


@network(conv=conv)
def dropout_in_evaluation(self, x):
    return TF.dropout(self.conv(x), 0.5, training=True)


@network(conv=conv)
def noise_of_numpy(self, x):
    return self.conv(x) * float(np.random.rand())


@network(conv=conv)
def noise_of_python(self, x):
    return self.conv(x) * random.random()


@network(conv=conv)
def noise_of_a_generator(self, x):
    return self.conv(x) * torch.rand(1, generator=torch.Generator().manual_seed(int(torch.randint(99, (1,)))))


RANDOM = [
    noise,
    noise_like,
    noise_in_place,
    dropout_in_evaluation,
    noise_of_numpy,
    noise_of_python,
    noise_of_a_generator,
]


@pytest.mark.parametrize("net", RANDOM, ids=lambda c: c.__name__)
def test_random_numbers(net):
    """Drawn in each call, in the model's order; freeze itself draws none."""
    model, x = net(), images()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    pooling_ext.freeze(model, x)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    assert torch.equal(states[0], after[0]) and states[1:] == after[1:]
    frozen = assert_frozen(model, x)
    assert not frozen.report.warnings
    assert not torch.equal(frozen(x), frozen(x))


# --- state and constants -----------------------------------------------------------------------------------


@network(conv=conv, bn=norm, calls=int)
def counter(self, x):
    self.calls += 1
    return self.bn(self.conv(x)) + self.calls


@network(conv=conv, seen=list)
def growing_list(self, x):
    self.seen.append(1)
    return self.conv(x) + len(self.seen)


@network(conv=conv, bn=norm)
def changing_buffer(self, x):
    self.steps += 1
    return self.bn(self.conv(x)) + self.steps


@network(conv=conv)
def changing_tensor(self, x):
    self.steps.add_(1)
    return self.conv(x) * self.steps


@network(conv=conv)
def cached_constant(self, x):
    if getattr(self, "cache", None) is None:
        self.cache = torch.ones(1) * 3
    return self.conv(x) * self.cache


@network(conv=conv, caches=dict)
def cache_by_size(self, x):
    key = x.shape[-1]
    if key not in self.caches:
        self.caches[key] = torch.arange(key).float()
    return self.conv(x) * self.caches[key]


@network(conv=conv, bn=norm)
def set_and_read(self, x):
    self.last = self.conv(x)
    return self.bn(self.last)


@network(conv=conv)
def fresh_sum(self, x):
    return torch.zeros(1).add_(x.mean()) + self.conv(x)


@network(conv=conv)
def fresh_items(self, x):
    weights = torch.ones(4, 1, 1)
    weights[1:3] = 2.0
    weights[0].add_(x.mean())
    return self.conv(x) * weights


@network(conv=conv)
def number_of_a_buffer(self, x):
    return self.conv(x) * float(self.scale)


def with_state(net: type[nn.Module]) -> nn.Module:
    model = net()
    if net is changing_tensor:
        model.steps = torch.zeros(1)
    model.register_buffer("steps" if net is changing_buffer else "scale", torch.tensor([2.0]))
    return model


STATE = [
    counter,
    growing_list,
    changing_buffer,
    changing_tensor,
    cached_constant,
    cache_by_size,
    set_and_read,
    fresh_sum,
    fresh_items,
    number_of_a_buffer,
]


@pytest.mark.parametrize("net", STATE, ids=lambda c: c.__name__)
def test_state(net):
    model = with_state(net)
    before = {name: repr(value) for name, value in vars(model).items() if not name.startswith("_")}
    pooling_ext.freeze(model, images())
    assert before == {name: repr(value) for name, value in vars(model).items() if not name.startswith("_")}
    frozen = assert_frozen(model, images())
    assert is_whole(frozen) == (
        net in (cached_constant, set_and_read, fresh_sum, fresh_items, number_of_a_buffer)
    )


SHARED = torch.ones(4, 1, 1) * 2


@network(conv=conv)
def constant_of_the_module(self, x):
    return TF.relu(self.conv(x) * SHARED + 1)


def test_a_constant_that_is_no_attribute():
    assert is_whole(assert_frozen(constant_of_the_module(), images()))


# --- contexts ----------------------------------------------------------------------------------------------


@network(conv=conv, bn=norm)
def without_gradients(self, x):
    with torch.no_grad():
        y = self.bn(self.conv(x))
    return y


@network(conv=conv, bn=norm)
def autocast_off(self, x):
    with torch.autocast("cpu", enabled=False):
        y = self.bn(self.conv(x))
    return y


@network(conv=conv, bn=norm, matrix=lambda: nn.Linear(8, 8))
def autocast_on(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = self.matrix(x)
        y = torch.matmul(y, y)
    return self.bn(self.conv(y.float()))


@network(conv=conv)
def caught_error(self, x):
    try:
        return self.conv(x).view(3, -1, 7)
    except RuntimeError:
        return self.conv(x)


@pytest.mark.parametrize("net", [without_gradients, autocast_off, caught_error], ids=lambda c: c.__name__)
def test_contexts(net):
    assert_frozen(net(), images())


def test_autocast_inside_a_forward():
    """Its rounding is the model's, or better, which the check cannot tell from a fault."""
    model, x = autocast_on(), images()
    with pytest.warns(UserWarning, match="could not check its result"):
        frozen = pooling_ext.freeze(model, x)
    assert not is_whole(frozen) and "autocast" in frozen.report.skipped[0].why
    assert_close(seeded(frozen, x), seeded(model, x), tolerance=2e-2)
