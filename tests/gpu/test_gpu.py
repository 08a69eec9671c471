"""What only a GPU can show: streams, graphs, several devices, and the same bits every time."""

from __future__ import annotations

import pytest
import torch
from helpers import on_gpus
from torch import Tensor

from pooling_ext.testing.launches import ACTIVATION_CASES, CASES, FORWARD, PHASES, LaunchCase

pytestmark = [pytest.mark.gpu, on_gpus()]
cases = pytest.mark.parametrize("case", CASES + ACTIVATION_CASES, ids=str)


def tensors_of(case: LaunchCase, device: str = "cuda") -> dict[str, Tensor]:
    return case.tensors(2, torch.bfloat16, torch.channels_last, device)


@cases
def test_the_same_bits_every_time(backend, case):
    """Under the setting that refuses whatever is not deterministic; elsewhere on a GPU it only warns."""
    torch.use_deterministic_algorithms(True)
    tensors = tensors_of(case)
    first, second = ([case.run(phase, tensors)() for phase in PHASES] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@cases
def test_on_the_current_stream(backend, case):
    """The input is there only after a while; another stream would read it too early."""
    tensors = tensors_of(case)
    expected = case.run(FORWARD, tensors)()
    late = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, tensor in late.items():
            tensor.copy_(tensors[name])
        output = case.run(FORWARD, late)()
    stream.synchronize()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@cases
def test_in_a_cuda_graph(backend, case):
    tensors = tensors_of(case)
    call = case.run(FORWARD, tensors)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles, if need be
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    for tensor in tensors.values():
        if tensor.dim() == 4:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    torch.testing.assert_close(output, case.run(FORWARD, tensors)(), rtol=0, atol=0)


@cases
def test_on_another_gpu_than_the_current_one(backend, case):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        there = {name: tensor.to("cuda:1") for name, tensor in tensors_of(case, "cuda:0").items()}
        for phase in PHASES:
            result = case.run(phase, there)()
            assert (result[0] if isinstance(result, tuple) else result).device.index == 1
        assert torch.cuda.current_device() == 0
