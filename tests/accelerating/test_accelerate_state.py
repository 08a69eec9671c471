"""accelerate: a model's state stays as it was, and examples and outputs may be nested."""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate_cases import Clock, Net, X, install, net, state_of
from helpers import run_python
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pooling_ext import ArgumentError, accelerate
from pooling_ext.accelerating import measure
from pooling_ext.accelerating.steps import training_step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return install(monkeypatch)


# --- what is left as it was ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen batch norm"])
def test_state_is_left_as_it_was(clock, training, mode):
    model = net(clock).train(mode != "eval")
    if mode == "frozen batch norm":
        model.block.bn1.eval()
    model(X).sum().backward()
    model.conv.weight.grad = None
    model.block.conv1.requires_grad_(False)
    seen: list[Any] = []
    model.block.conv2.weight.register_hook(seen.append)
    model.block.conv2.bias = nn.Parameter(torch.zeros(4))
    model.block.conv2.bias.register_post_accumulate_grad_hook(seen.append)
    hook = model.relu.register_forward_hook(lambda *_: None)
    x = X.clone().requires_grad_()
    before = state_of(model)
    report = accelerate(model, x, training=training).accelerate_report
    assert report.chosen == "as it was" and clock.calls > 9
    assert state_of(model) == before and not seen and x.grad is None and torch.equal(x, X)
    if training:
        model(X).sum().backward()
        assert len(seen) == 2  # the hooks are there
    hook.remove()


def test_state_is_left_as_it_was_where_the_model_is_patched(clock):
    model = net(clock)
    model(X).sum().backward()
    clock.cost = lambda patched, channels_last, **_: 10.0 - 5 * patched - channels_last
    expected = state_of(model)
    accelerate(model, X)
    found = state_of(model)
    for name, before in expected.items():
        if name.startswith("module "):
            assert found[name][1:] == before[1:]
        elif isinstance(before, tuple) and len(before) == 5:
            assert found[name][:2] == before[:2] and found[name][4] == before[4]
        else:
            assert found[name] == before


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_child_is_left_as_it_was(clock):
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model = nn.Sequential(net(clock), scripted)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    accelerate(model, X, training=False)
    assert [module.training for module in model.modules()] == modes and all(modes)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_reentrant_checkpointing(clock):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.net, x, use_reentrant=True)

    model = Checkpointed()
    clock.model = model.net
    x = X.clone().requires_grad_()
    before = state_of(model)
    assert not accelerate(model, x).accelerate_report.notes
    assert state_of(model) == before and x.grad is None


def test_a_forward_that_changes_parameters(clock):
    class Renorm(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            self.weight.data.mul_(0.5)
            with torch.no_grad():
                self.bias.add_(1)  # type: ignore[union-attr]
            return super().forward(input)

    model = clock.model = nn.Sequential(Renorm(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    before = state_of(model)
    accelerate(model, X)
    assert state_of(model) == before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [1, 5, 14])
def test_interrupted(clock, training, error, at):
    """Nothing is left behind, at whatever call it happens."""

    def cost(**_):
        if clock.calls >= at:
            raise error
        return 5.0

    model = net(clock)
    before, clock.cost = state_of(model), cost
    with pytest.raises((error, ArgumentError)):  # the latter of the first call
        accelerate(model, X, training=training)
    assert not clock.reused and not hasattr(model, "accelerate_report")
    assert state_of(model) == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_under_other_gradient_modes(clock, context, training):
    model = net(clock)
    with context():
        x = X.clone()
        report = accelerate(model, x, training=training).accelerate_report
        assert torch.is_grad_enabled() == (context is torch.enable_grad)
    assert not report.notes
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())


# --- examples and outputs --------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Output:
    loss: Tensor
    maps: dict[str, Any]
    count: int = 3


class Nested(nn.Module):
    """Takes a list, and gives tensors in everything that holds some."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 2, 1) for _ in range(6))
        self.given: list[Any] = []

    def forward(self, images: list[Tensor], targets: Any = None, scale: float = 1.0) -> Output:
        a, b, c, d, e, f = (layer(images[0]) * scale for layer in self.layers)
        nested = {"list": [a, (b,)], "pair": Pair(c, [d, "text", None]), "detached": e.detach(), "e": e}
        return Output(f.sum(), nested)


def gradients_seen(model: nn.Module) -> set[str]:
    """Adds hooks on the outputs of all layers; the names of those that a gradient reached."""
    seen: set[str] = set()

    def add_hook(name: str, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: seen.add(name))

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda module, args, output, name=name: add_hook(name, output))
    return seen


@pytest.mark.parametrize(
    "example",
    [([X],), ([X, X], [{"boxes": X, "name": "a"}]), [X], {"images": [X], "scale": 2.0}],
    ids=["tuple", "detection", "list", "keywords"],
)
def test_nested_examples_and_outputs(clock, example):
    model = clock.model = Nested()
    seen = gradients_seen(model)
    report = accelerate(model, example).accelerate_report
    assert len(seen) == 6 and not report.notes
    assert report.measured.startswith("training step, float32 (2, 3, 8, 8)")


def test_gradients_are_those_of_the_sum():
    model, other = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)
    other.load_state_dict(model.state_dict())
    assert training_step(lambda x: [model(x), {"twice": 2 * model(x)}], ((X,), {}), X.device, None)
    (3 * other(X).sum()).backward()
    torch.testing.assert_close(model.weight.grad, other.weight.grad)


def test_every_step_begins_without_gradients(clock):
    model, seen = net(clock), []
    model(X).sum().backward()
    model.conv.register_forward_hook(lambda module, args, output: seen.append(module.weight.grad))
    accelerate(model, X)
    assert len(seen) > 9 and set(seen) == {None}


def test_outputs_without_gradients(clock):
    report = accelerate(net(clock).requires_grad_(False), X).accelerate_report
    assert report.notes == ["no output needs gradients, so a step is a forward alone"]


def test_a_model_that_changes_its_input(clock):
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert float(x.max()) < 10
            return x.add_(6)

    model = nn.Sequential(InPlace(), nn.Conv2d(3, 4, 3))
    clock.model = model
    x = X.clone()
    accelerate(model, x)
    assert torch.equal(x, X)


def test_three_dimensions(clock):
    model: Any = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU())
    clock.model = nn.Conv2d(1, 1, 1)
    model.register_forward_hook(lambda *_: setattr(clock, "now", clock.now + (1 if last() else 2)))
    last = lambda: model[0].weight.is_contiguous(memory_format=torch.channels_last_3d)  # noqa: E731
    assert accelerate(model, torch.randn(1, 3, 4, 5, 6)).accelerate_report.chosen.endswith("channels_last")
    assert last()


# --- autocast --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "ambient", "expected"),
    [
        (None, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (None, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float16),
    ],
)
def test_training_is_measured_under_autocast(clock, dtype, ambient, expected):
    model = net(clock)
    seen = set()
    model.conv.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    with torch.autocast("cpu", ambient, enabled=ambient is not None):
        accelerate(model, X, dtype=dtype)
        seen_inside = set(seen)
        assert torch.is_autocast_enabled("cpu") == (ambient is not None)
    assert seen_inside == {expected} and model.conv.weight.dtype == torch.float32


def test_casts_follow_the_memory_format(clock):
    """Autocast keeps casts of weights until it ends, which here is after all ways have run."""
    model, seen = net(clock), set()

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.add((module.weight.stride(1) == 1, output.stride(1) == 1))

    model.conv.register_forward_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        accelerate(model, X)
    assert seen == {(False, False), (True, True)}


REAL = """
import json, sys, torch, pooling_ext
from pooling_ext import memory
from pooling_ext.accelerating import measure
from training_cases import ResNet, batch

torch.set_num_threads(1)
measure.SECONDS = 0.2
found = []
for training in (True, False):
    memory.stop_reusing_cpu_memory()
    model = ResNet(32)
    weights = [p.detach().clone() for p in model.parameters()]
    made = pooling_ext.accelerate(model, batch()[0], training=training)
    report = made.accelerate_report
    kept = made is not model if report.chosen == "frozen" else made is model
    kept &= memory.is_cpu_memory_reused() == (report.chosen != "as it was")
    kept &= all(map(torch.equal, weights, model.parameters()))
    found.append([report.chosen, report.milliseconds, report.rounds, kept])
print(json.dumps(found))
"""


def test_by_real_time_and_memory():
    result = run_python(REAL)
    assert result.returncode == 0, result.stderr
    for (chosen, milliseconds, rounds, kept), way in zip(
        json.loads(result.stdout.splitlines()[-1]), ("patched", "frozen"), strict=True
    ):
        assert kept and rounds >= measure.FEWEST_ROUNDS
        assert {"as it was", way, chosen} <= milliseconds.keys()
        assert 0 < milliseconds[chosen] <= milliseconds["as it was"]
