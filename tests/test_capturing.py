"""capture_step, with an API of CUDA that captures by running and undoing, and replays by running again."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pooling_ext
from pooling_ext import capturing
from pooling_ext.capturing import CapturedStep, capture_step


class Replays:
    """Stands for CUDA: a capture runs nothing, and a replay does the same to the same memory."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.log = model, optimizer, []

    def aside(self, function):
        self.log.append("run")
        return function()

    def capture(self, function):
        self.log.append("capture")
        held = [*self.model.parameters(), *self.model.buffers()]
        for state in self.optimizer.state.values() if self.optimizer is not None else ():
            held += [value for value in state.values() if isinstance(value, torch.Tensor)]
        before = [tensor.detach().clone() for tensor in held]
        loss, grads = function()
        with torch.no_grad():
            for tensor, value in zip(held, before, strict=True):
                tensor.copy_(value)

        def replay():
            self.log.append("replay")
            new_loss, new_grads = function()
            loss.copy_(new_loss)
            for grad, new in zip(grads, new_grads, strict=True):
                if grad is not None:
                    grad.copy_(new)

        return replay, (loss, grads)


def make(optimizer=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(1, 3, 6, 6))
    pooling_ext.patch(model)
    made = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9) if optimizer else None
    return model, made


def loss_of(model):
    return lambda images, labels: F.cross_entropy(model(images), labels)


def batches(count, size=4):
    torch.manual_seed(1)
    return [(torch.randn(size, 3, 6, 6), torch.arange(size) % 4) for _ in range(count)]


def train(step, data):
    return [float(step(*batch)) for batch in data]


def eager(model, optimizer, data, change=None):
    losses = []
    for number, batch in enumerate(data):
        if change is not None:
            change(number, optimizer)
        optimizer.zero_grad()
        loss = loss_of(model)(*batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def same(one, other):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_it_trains_as_the_loop_does():
    """And the last batch, which is smaller, warms up a graph of its own."""
    model, optimizer = make()
    other, others = make()
    data = batches(8) + batches(1, 2) + batches(1)
    api = Replays(model, optimizer)
    step = CapturedStep(loss_of(model), model, optimizer, api)
    assert train(step, data) == pytest.approx(eager(other, others, data), rel=1e-4)
    same(model, other)
    assert api.log == ["run"] * 3 + ["capture"] + ["replay"] * 5 + ["run", "replay"]
    assert step.why_not is None


def test_without_an_optimizer_the_caller_steps():
    model, _ = make(optimizer=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    other, others = make()
    data = batches(7)
    step = CapturedStep(loss_of(model), model, None, Replays(model, None))
    losses = []
    for batch in data:
        losses.append(float(step(*batch)))
        optimizer.step()
        optimizer.zero_grad()  # the graph's own gradients are back after the next call
    assert losses == pytest.approx(eager(other, others, data), rel=1e-4)


def test_a_change_of_a_constant_is_captured_anew():
    model, optimizer = make()
    other, others = make()
    api = Replays(model, optimizer)
    step = CapturedStep(loss_of(model), model, optimizer, api)

    def change(number, optimizer):
        if number == 5:
            optimizer.param_groups[0]["lr"] = 0.01

    losses = []
    data = batches(10)
    for number, batch in enumerate(data):
        change(number, optimizer)
        losses.append(float(step(*batch)))
    assert losses == pytest.approx(eager(other, others, data, change), rel=1e-4)
    assert (
        api.log == ["run"] * 3 + ["capture", "replay", "replay"] + ["run"] * 3 + ["capture"] + ["replay"] * 2
    )
    for alter in (lambda: model[1].eval(), lambda: model[0].requires_grad_(False), lambda: model.double()):
        alter()
        api.log.clear()
        images, labels = data[0]
        step(images.to(model[4].weight.dtype), labels)
        assert api.log == ["run"]


def test_no_more_graphs_are_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(capturing, "LIMIT", 2)
    monkeypatch.setattr(capturing, "WARM_UP", 0)
    model, optimizer = make()
    api = Replays(model, optimizer)
    step = CapturedStep(loss_of(model), model, optimizer, api)
    step(*batches(1)[0])  # makes the optimizer's state, which the capture above cannot
    api.log.clear()
    for size in (2, 3, 2, 4, 3):
        step(*batches(1, size)[0])
    assert api.log.count("capture") == 4


def test_what_cannot_be_captured_is_run():
    model, optimizer = make()
    other, others = make()
    api = Replays(model, optimizer)

    def capture(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    api.capture = capture
    step = CapturedStep(loss_of(model), model, optimizer, api)
    data = batches(7)
    with pytest.warns(UserWarning, match="cannot be captured: operation not permitted"):
        losses = train(step, data)
    assert losses == pytest.approx(eager(other, others, data), rel=1e-4)
    same(model, other)
    assert "not permitted" in step.why_not


def test_the_result_is_the_callers():
    model, optimizer = make()
    step = CapturedStep(loss_of(model), model, optimizer, Replays(model, optimizer))
    losses = [step(*batch) for batch in batches(6)]
    assert len({float(loss) for loss in losses}) == 6 and not losses[0].requires_grad


def test_errors():
    model, optimizer = make()
    loss = loss_of(model)
    with pytest.raises(pooling_ext.ArgumentError, match=r"model must be on a GPU, but 0\.weight is on cpu"):
        capture_step(loss, model, optimizer)
    with pytest.raises(TypeError, match="loss must be a function, but got int"):
        capture_step(3, model)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, but got function"):
        capture_step(loss, loss)
    with pytest.raises(TypeError, match=r"optimizer must be .* or None, but got Sequential"):
        capture_step(loss, model, model)
    with pytest.raises(pooling_ext.ArgumentError, match="model must have parameters"):
        capture_step(loss, nn.ReLU())
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(
        pooling_ext.ArgumentError, match="optimizer must be made with capturable=True, but group 0"
    ):
        capturing._check(loss, model, adam, device="cpu")
    capturing._check(loss, model, optimizer, device="cpu")
    step = CapturedStep(lambda images, labels: model(images), model, None, Replays(model, None))
    with pytest.raises(pooling_ext.ArgumentError, match=r"loss must return a scalar, .* shape \(4, 4\)"):
        step(*batches(1)[0])


def test_the_calls_of_cuda(monkeypatch):
    """Warming up and capturing are on one stream, in turn with the current one; graphs share a pool."""
    log: list = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append((self.name, "waits for", other.name))

    class Graph:
        def pool(self):
            return "pool"

        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def graph(made, pool=None, stream=None):
        log.append(("capture", pool, stream.name))
        yield

    fakes = {
        "Stream": Stream,
        "current_stream": lambda: Stream("current"),
        "CUDAGraph": Graph,
        "graph": graph,
    }
    fakes["stream"] = lambda stream: contextlib.nullcontext(log.append(("on", stream.name)))
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda x, stream: log.append(("kept for", stream.name))
    )
    cuda = capturing._Cuda()
    outputs = torch.zeros(()), [torch.zeros(2), None]
    assert cuda.aside(lambda: outputs) is outputs
    kept = [("kept for", "current")] * 2
    assert log == [("side", "waits for", "current"), ("on", "side"), ("current", "waits for", "side"), *kept]
    log.clear()
    for _ in range(2):
        replay, _ = cuda.capture(lambda: outputs)
        replay()
    assert log == [("capture", None, "side"), "replay", ("capture", "pool", "side"), "replay"]


@pytest.mark.gpu
def test_on_a_gpu():
    (model, optimizer), (other, others) = make(), make()
    for net in (model, other):
        net.cuda()
    data = [(images.cuda(), labels.cuda()) for images, labels in batches(8)]
    step = capture_step(loss_of(model), model, optimizer)
    assert train(step, data) == pytest.approx(eager(other, others, data), rel=1e-3)
    assert step.why_not is None
