"""The suite "gpu" on the CPU: what it measures, what it holds results to, and how it times."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json

import pytest
import torch

pytest.importorskip("rich")

from benchmarks.harness import gpu_timing
from benchmarks.suites import gpu, gpu_operators
from pooling_ext.backends import cuda_library
from pooling_ext.testing.launches import CASES as traffic_cases


def test_gpu_suite_on_the_interpreter(monkeypatch, tmp_path):
    """What it measures on a GPU, on tensors that the interpreter takes; without one it measures nothing."""
    pytest.importorskip("triton")
    small = [
        dataclasses.replace(case, shape=(4, 6, 6))
        for case in traffic_cases
        if case.name in ("max-3x3-s2", "bn-add-relu-256-56", "stem", "tail", "global-avg")
    ]
    monkeypatch.setattr(gpu, "CASES", tuple(small))
    monkeypatch.setattr(gpu, "MODELS", {})
    monkeypatch.setattr(gpu, "QUICK_BUDGET", 0.001)
    monkeypatch.setattr(gpu_timing, "SHORTEST", 1e-6)
    args = argparse.Namespace(quick=True, cases=None, batch=2, dtypes=["float32", "bfloat16"],
                              layouts=["NHWC"], no_compile=True, list=False, out=tmp_path,
                              threads=None)  # fmt: skip
    assert gpu.run(args, device="cpu") == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    rivals = {"eager", "triton"} | ({"cuda"} if cuda_library.on_cpu() else set())
    assert {entry["rival"] for entry in found["entries"]} == rivals
    assert len(found["entries"]) == 2 * len(rivals) * len(small) and not found["wrong"]
    assert "of a copy's rate" in (tmp_path / "gpu.md").read_text()

    class CompilationError(Exception):
        """One that is neither a RuntimeError nor an AssertionError, as Triton's are."""

    def fails(*args, **kwargs):
        so_far.append(json.loads((tmp_path / "gpu.json").read_text())["entries"])
        raise CompilationError("at 1:0")

    so_far: list[list] = []
    monkeypatch.setattr(gpu, "CASES", tuple(small[:1]))
    monkeypatch.setattr(gpu, "MODELS", {"fails": fails, "fails too": fails})
    assert gpu.run(args, device="cpu") == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["wrong"] == {name: "CompilationError: at 1:0" for name in ("fails", "fails too")}
    assert [len(entries) for entries in so_far] == [2 * len(rivals)] * 2, "not written as it came"
    if not torch.cuda.is_available():
        assert gpu.run(args) == 2


def test_a_gpus_results_are_held_to_eagers_own_error(monkeypatch):
    """In bfloat16 a rounding changes which elements win: PyTorch's own stem is beyond what is let pass."""
    case = dataclasses.replace(next(c for c in traffic_cases if c.name == "stem"), shape=(16, 56, 56))
    tensors = case.tensors(4, torch.bfloat16, torch.channels_last, "cpu")
    theirs = gpu_operators.theirs_of(case)
    allowed = gpu_operators.ALLOWED["bfloat16"]
    assert gpu_operators.errors(case, tensors, theirs)["input"] > allowed

    class Stem(type(case)):
        factor = 1.0

        @property
        def function(self):
            return lambda **kwargs: theirs(**kwargs) * self.factor

    stem = Stem(**{field.name: getattr(case, field.name) for field in dataclasses.fields(case)})
    gpu_operators.check(stem, tensors, allowed)
    monkeypatch.setattr(Stem, "factor", 1.1)
    with pytest.raises(AssertionError, match=r"stem: output is off by 0\.1"):
        gpu_operators.check(stem, tensors, allowed)


def test_small_calls_are_captured_and_their_gradient_is_made_before(monkeypatch):
    """With an API of CUDA that only notes what is asked of it."""
    case = dataclasses.replace(traffic_cases[0], shape=(4, 6, 6))
    log: list[str] = []

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    class Captured:
        def __init__(self, graph) -> None:
            pass

        def __enter__(self) -> None:
            log.append("begin")

        def __exit__(self, *_: object) -> None:
            log.append("end")

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def elapsed_time(self, end) -> float:
            return 2.0

    class Stream:
        def wait_stream(self, other) -> None: ...

    fakes = {"CUDAGraph": Graph, "graph": Captured, "Event": Event, "Stream": Stream}
    fakes |= {"current_stream": Stream, "stream": lambda _: contextlib.nullcontext()}
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    times = gpu_timing.measure({"a": lambda: log.append("call")}, 0.001, "cuda", capture=True)
    assert times["a"][1] and times["a"][0].ms > 0
    assert log[:6] == ["call"] * 3 + ["begin", "call", "end"] and set(log[6:]) == {"replay"}

    tensors = case.tensors(2, torch.float32, torch.channels_last, "cpu")
    grad = torch.randn(2, 4, 3, 3)
    made: list[torch.Tensor] = []
    monkeypatch.setattr(torch, "ones_like", lambda *args, **kwargs: made.append(args))
    _, input_grad = gpu_operators.step(case.function, tensors, grad, **case.kwargs_of("training forward"))
    assert not made and input_grad.sum() == pytest.approx(float(grad.sum()), abs=1e-4)
