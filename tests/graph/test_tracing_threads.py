"""Other threads run, trace and build modules while patch and freeze trace."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from freezing_cases import conv, images, network, norm
from torch import nn

import pooling_ext

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]


def relu_block() -> nn.Sequential:
    return nn.Sequential(conv(), norm(), nn.ReLU()).eval().requires_grad_(False)


@network(block=relu_block, head=conv)
def asks_and_writes(self, x):
    y = self.block(x)
    y += self.head(x) if isinstance(y, torch.Tensor) else 1
    return torch.relu_(y)


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Repeat ``work`` in another thread while the body runs; what it raises is raised here."""
    errors: list[BaseException] = []
    stop, rounds = threading.Event(), 0

    def repeat() -> None:
        nonlocal rounds
        while not (stop.is_set() and rounds > 1):
            try:
                work()
            except BaseException as error:
                errors.append(error)
                return
            rounds += 1

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()
    if errors:
        raise errors[0]
    assert rounds > 1


def trace_again_and_again() -> None:
    for _ in range(6):
        model = asks_and_writes()
        pooling_ext.freeze(model, images())
        pooling_ext.patch(model)
        model(images())


def test_modules_run_in_other_threads():
    model, x = asks_and_writes(), images()
    expected = model(x)

    def work() -> None:
        torch.testing.assert_close(model(x), expected)
        assert hasattr(x, "shape") and isinstance(model.block[0], nn.Conv2d)

    with meanwhile(work):
        trace_again_and_again()


def test_the_model_that_is_traced_runs_in_other_threads():
    """Tracing works on copies, so the model's own calls are as ever."""
    model, x = asks_and_writes(), images()
    expected = model(x)
    with meanwhile(lambda: torch.testing.assert_close(model(x), expected)):
        for _ in range(6):
            pooling_ext.freeze(model, x)


def test_torch_fx_traces_in_another_thread():
    """torch.fx disturbs modules that run meanwhile, whosoever they are; tracing alone is not disturbed."""
    x = images()

    def work() -> None:
        model = nn.Sequential(relu_block(), nn.MaxPool2d(2))
        graph = torch.fx.symbolic_trace(model)
        assert [node.op for node in graph.graph.nodes].count("call_module") == 4
        torch.testing.assert_close(graph(x), model(x))

    with meanwhile(work):
        for _ in range(30):
            assert pooling_ext.patch(nn.Sequential(relu_block(), nn.MaxPool2d(2))).replaced


def test_two_threads_patch_and_freeze():
    """One waits for the other where it has to."""
    with meanwhile(trace_again_and_again):
        trace_again_and_again()


def test_training_goes_on_in_another_thread():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    optimizer = torch.optim.SGD(net.parameters(), 0.01)

    def work() -> None:
        optimizer.zero_grad()
        net(torch.ones(2, 4, 8, 8)).square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()

    with meanwhile(work):
        trace_again_and_again()
