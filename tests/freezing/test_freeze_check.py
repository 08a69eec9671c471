"""freeze compares its result with the model: what it finds, what it cannot tell, and what it leaves alone."""

from __future__ import annotations

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from freezing_cases import assert_close, conv, images, is_whole, network, norm, seeded
from torch import nn

import pooling_ext
from pooling_ext import ArgumentError
from pooling_ext.freezing import api, folding
from pooling_ext.freezing.region import Region

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]


@pytest.fixture(autouse=True)
def no_warning(request):
    """A check that cannot decide warns; only tests that say so may see that."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def model_of_two() -> nn.Module:
    first = nn.Sequential(conv(), norm(), nn.ReLU())
    return nn.Sequential(first, conv(), norm(), nn.ReLU()).eval().requires_grad_(False)


# --- faults ------------------------------------------------------------------------------------------------


@pytest.fixture
def wrong_folding(monkeypatch):
    """Batch norms are folded with a bias that is off by a little."""
    right = folding.folded

    def folded(weight, bias, normalizations, *rest):
        weight, bias = right(weight, bias, normalizations, *rest)
        return weight, bias + 0.01 if normalizations else bias

    monkeypatch.setattr(folding, "folded", folded)


@pytest.mark.usefixtures("wrong_folding")
def test_a_wrong_layer_is_named_and_left():
    """Parts that are right are kept; those that are not run as they are."""
    model, x = model_of_two(), images()
    frozen = pooling_ext.freeze(model, x)
    assert not is_whole(frozen)
    assert_close(seeded(frozen, x), seeded(model, x))
    why = {entry.path: entry.why for entry in frozen.report.skipped}
    assert "gives other results when frozen" in why["0"]
    assert "gives other results when it is frozen as a whole: results are off by" in why["(root)"]
    convolutions = [entry.why for entry in frozen.report.replaced if entry.what == "Conv2d"]
    assert convolutions == ["prepacked", "prepacked"]
    assert {entry.path for entry in frozen.report.replaced} == {"0.0", "0.1", "1", "2"}


@pytest.mark.usefixtures("wrong_folding")
def test_without_the_check_a_fault_stays():
    model, x = model_of_two(), images()
    frozen = pooling_ext.freeze(model, x, check=False)
    assert is_whole(frozen) and not frozen.report.skipped
    assert not torch.allclose(frozen(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_is_wrong_in_parts_too_is_refused(monkeypatch):
    """Parts, too, are compared as a whole before they are returned."""

    def frozen_anyway(job, module, args, kwargs, path):
        job.compare = False
        return job._region(module, args, kwargs, path)

    right = Region.forward
    monkeypatch.setattr(Region, "forward", lambda self, *args: right(self, *args) + 1)
    monkeypatch.setattr(api._Job, "_parts", frozen_anyway)
    with pytest.raises(ArgumentError, match=r"model \(Sequential\) cannot be frozen: .*; look at \(root\)"):
        pooling_ext.freeze(model_of_two(), images())


def test_an_error_of_the_frozen_model_is_a_difference(monkeypatch):
    def forward(self, *args, **kwargs):
        raise RuntimeError("lost")

    monkeypatch.setattr(Region, "forward", forward)
    model, x = model_of_two(), images()
    frozen = pooling_ext.freeze(model, x)
    assert not [m for m in frozen.modules() if isinstance(m, Region)]
    assert "the frozen model raises RuntimeError: lost" in str(frozen.report)
    assert_close(seeded(frozen, x), seeded(model, x))


LAST: dict[str, float] = {}


class Notes(nn.Conv2d):
    """A convolution that a graph calls, and that notes down what no trace sees."""

    def forward(self, x):
        LAST["scale"] = float(x.abs().mean())
        return super().forward(x)


@network()
def reads_the_note(self, x):
    return x * LAST["scale"]


@network(conv=lambda: Notes(4, 4, 3), scaled=reads_the_note)
def number_of_the_data(self, x):
    return self.scaled(self.conv(x))


def test_a_number_of_the_example_is_found():
    """The changed copy of the example has another."""
    with pytest.raises(ArgumentError, match=r"results are off by .*also where.*; look at scaled\. freeze"):
        pooling_ext.freeze(number_of_the_data(), images())


@network(conv=conv)
def number_in_a_forward(self, x):
    return self.conv(x) * x.abs().mean().item()


@network(conv=conv, scaled=number_in_a_forward)
def number_in_a_child(self, x):
    return self.scaled(self.conv(x))


@pytest.mark.parametrize("net", [number_in_a_forward, number_in_a_child], ids=lambda c: c.__name__)
def test_numbers_taken_from_values(net):
    model, x = net(), images()
    frozen = pooling_ext.freeze(model, x)
    for given in (x, 3 * x, images(1, 4, 9, 9)):
        assert_close(seeded(frozen, given), seeded(model, given))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rounding_of_a_dtype_is_no_fault(dtype):
    """Even where a difference of large numbers makes it worse than what the dtype gives elsewhere."""

    @network(conv=conv, bn=norm)
    def cancels(self, x):
        y = self.bn(self.conv(x))
        return (y * 3 + 40) - 40

    frozen = pooling_ext.freeze(cancels(), images(), dtype)
    assert is_whole(frozen) and not frozen.report.warnings


# --- what cannot be told -----------------------------------------------------------------------------------


@network(conv=conv)
def own_generator(self, x):
    return self.conv(x) * float(self.generator.random())


@network(conv=lambda: conv(4, 64), bn=lambda: norm(64))
def picks_by_rounding(self, x):
    """The scores are zero but for their rounding."""
    y = self.bn(self.conv(x))
    scores = (y + y.flip(1)) - y.flip(1) - y
    return scores.flatten(1).topk(6).indices


def test_results_that_rounding_decides_are_a_warning():
    with pytest.warns(UserWarning, match="could not check its result: rounding decides"):
        frozen = pooling_ext.freeze(picks_by_rounding(), images())
    (text,) = frozen.report.warnings
    assert "rounding decides" in text and f"warning: {text}" in str(frozen.report)


def test_results_that_are_random_are_a_warning():
    model = own_generator()
    model.generator = np.random.default_rng(0)
    with pytest.warns(UserWarning, match="differ from call to call"):
        frozen = pooling_ext.freeze(model, images())
    assert "differ from call to call" in frozen.report.warnings[0]


def test_top_k_of_clear_scores_is_compared():
    @network(conv=conv, bn=norm)
    def best(self, x):
        return self.bn(self.conv(x)).flatten(1).topk(3)

    frozen = pooling_ext.freeze(best(), images())
    assert is_whole(frozen) and not frozen.report.warnings


# --- cost, and what is left alone --------------------------------------------------------------------------

CALLS: list[str] = []


@network(conv=conv, bn=norm)
def counted(self, x):
    CALLS.append("model")
    return self.bn(self.conv(x))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_number_of_forwards(monkeypatch, dtype):
    """Two of the model and three of what is frozen, where nothing differs."""
    right = Region.forward

    def forward(self, *args, **kwargs):
        CALLS.append("frozen")
        return right(self, *args, **kwargs)

    monkeypatch.setattr(Region, "forward", forward)
    counts = {}
    for check in (False, True):
        CALLS.clear()
        pooling_ext.freeze(counted(), images(), dtype, check=check)
        counts[check] = CALLS.count("model"), CALLS.count("frozen")
    assert counts[False][1] == 0
    assert counts[True][0] - counts[False][0] == 2
    assert counts[True][1] == 3


@network(conv=conv, bn=norm, calls=int)
def stateful(self, x):
    self.calls += 1
    self.steps += 1
    x.mul_(2)
    return self.bn(self.conv(x)) + torch.rand(1) + random.random() + float(np.random.rand()) + self.steps


@pytest.mark.parametrize("check", [True, False])
def test_nothing_changes(check):
    """The model's state and mode, the example, and everybody's random numbers."""
    model, x = stateful(), images()
    model.register_buffer("steps", torch.zeros(1))
    model.train()
    given, state = x.clone(), copy.deepcopy(model.state_dict())
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    frozen = pooling_ext.freeze(model, x, check=check)
    after = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert torch.equal(x, given) and model.calls == 0 and all(m.training for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert frozen.body.calls == 0 and float(frozen.body.steps) == 0
