"""Calling through captured graphs, with a capture that runs the function again where there is no GPU."""

from __future__ import annotations

import threading

import pytest
import torch

from pooling_ext.freezing import cuda_graphs
from pooling_ext.freezing.cuda_graphs import Graphs


def replaying(function, inputs):
    """Stands for CUDA's capture: replay computes from the inputs' memory into the outputs'."""
    outputs = function(*inputs)

    def replay() -> None:
        for kept, new in zip(outputs, function(*inputs), strict=True):
            kept.copy_(new)

    return replay, outputs


def make(calls, capture=replaying, enter=lambda x: x.float()):
    def function(x):
        calls.append(tuple(x.shape))
        return [x * 2, x.sum()]

    return Graphs(function, enter, capture)


def test_results_are_those_of_the_function_and_belong_to_the_caller():
    run = make([])
    kept = []
    for value in range(6):
        x = torch.full((2, 3), float(value))
        kept.append((x, run(x)))
    for x, (double, total) in kept:
        assert torch.equal(double, x * 2) and total == x.sum()


def test_the_second_call_captures_and_later_ones_replay():
    captures = []

    def capture(function, inputs):
        captures.append(inputs[0].shape)
        return replaying(function, inputs)

    run = make([], capture)
    for size in (2, 2, 2, 3, 2, 3, 3):
        run(torch.zeros(size))
    assert captures == [(2,), (3,)]


def test_inputs_are_cast_as_they_are_copied_in():
    run = make([])
    for value in (1, 2, 3):
        double, _ = run(torch.full((2,), value))
        assert double.dtype == torch.float32 and double.tolist() == [2.0 * value] * 2


def test_no_more_graphs_are_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "LIMIT", 2)
    captures = []

    def capture(function, inputs):
        captures.append(inputs[0].shape[0])
        return replaying(function, inputs)

    run = make([], capture)
    for size in (1, 1, 2, 2, 3, 3, 1, 1, 3):
        run(torch.zeros(size))
    assert captures == [1, 2, 3, 1]


def test_what_cannot_be_captured_is_run():
    tried = []

    def capture(function, inputs):
        tried.append(inputs)
        raise RuntimeError("operation not permitted when stream is capturing")

    run = make([], capture)
    for value in range(4):
        double, _ = run(torch.full((2,), float(value)))
        assert double.tolist() == [2.0 * value] * 2
    assert len(tried) == 1


def test_threads_take_turns():
    run = make([])
    wrong = []

    def work(value: float) -> None:
        for _ in range(50):
            double, _ = run(torch.full((100,), value))
            if not torch.equal(double, torch.full((100,), 2 * value)):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(value),)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class OnGpu(torch.Tensor):
    is_cuda = True


def test_graphs_of_two_shapes_on_two_streams_do_not_overlap(monkeypatch):
    """They share a memory pool. Streams and events note what waits for what."""
    log: list[tuple] = []

    class Event:
        def record(self, stream) -> None:
            log.append(("record", self, stream))

    class Stream(str):
        def wait_event(self, event) -> None:
            log.append(("wait", event, self))

    def capture(function, inputs):
        replay, outputs = replaying(function, inputs)

        def noted() -> None:
            log.append(("replay", inputs[0].shape[0], current))
            replay()

        return noted, outputs

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    run = make([], capture, enter=lambda x: x.as_subclass(torch.Tensor).float())
    current = Stream("first")
    for size in (1, 1, 2, 2):
        run(torch.zeros(size).as_subclass(OnGpu))
    log.clear()
    for size, current in ((1, Stream("first")), (2, Stream("second")), (2, Stream("first"))):  # noqa: B007
        run(torch.zeros(size).as_subclass(OnGpu))
    kinds = [kind for kind, *_ in log]
    assert kinds == ["wait", "replay", "record"] * 3
    for before, after in ((log[2], log[3]), (log[5], log[6])):
        assert before[1] is after[1], "a replay waits for the one before it, whatever its shape"
    assert [entry[2] for entry in log] == ["first"] * 3 + ["second"] * 3 + ["first"] * 3


@pytest.mark.gpu
def test_on_a_gpu():
    model = torch.nn.Conv2d(3, 8, 3).cuda().half()
    run = Graphs(torch.no_grad()(model.forward), lambda x: x.half())
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    for step in range(8):
        x = torch.randn(1 + step % 2, 3, 16, 16, device="cuda")
        with torch.cuda.stream(streams[step % 3 % 2]), torch.no_grad():
            streams[step % 3 % 2].wait_stream(torch.cuda.default_stream())
            torch.testing.assert_close(run(x), model(x.half()))
