"""cuDNN's graph API, by a package that stands in for nvidia-cudnn-frontend and computes with PyTorch.

Tensors, graphs, handles and plans are noted as the package would get them. What a card makes of them is not
tested here.
"""

from __future__ import annotations

import json
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_cases import channel_stats
from helpers import dtype_id

from pooling_ext.backends import autotune
from pooling_ext.ops import conv_autotune, cudnn_frontend
from pooling_ext.ops.conv_autotune import ConvParams

GEOMETRY = ConvParams((2, 2), (1, 1), (1, 1), 1)
TYPES = types.SimpleNamespace(BFLOAT16=torch.bfloat16, HALF=torch.float16, FLOAT=torch.float32)


class GraphNotSupported(Exception):
    """As cudnnGraphNotSupportedError, which is no RuntimeError."""


class Node:
    """A tensor of a graph: how it is computed from those of a call."""

    def __init__(self, compute, **facts: Any):
        self.compute, self.facts, self.dtype = compute, facts, None

    def set_output(self, value: bool) -> Node:
        assert value
        return self

    def set_data_type(self, dtype: torch.dtype) -> Node:
        self.dtype = dtype
        return self


class Graph:
    """Of the nodes that were marked as outputs the values are written where a call says."""

    built = 0

    def __init__(self, **options: Any):
        assert options["intermediate_data_type"] == options["compute_data_type"] == torch.float32
        self.options, self.is_built = options, False

    def tensor(self, *, name: str, dim: list, stride: list, data_type: torch.dtype) -> Node:
        node = Node(None, name=name, dim=dim, stride=stride, dtype=data_type)
        node.compute = lambda data: data[node].float()
        return node

    def scale(self, x: Node, factor: Node) -> Node:
        return Node(lambda data: x.compute(data) * factor.compute(data).view(1, -1, 1, 1))

    def bias(self, x: Node, addend: Node) -> Node:
        return Node(lambda data: x.compute(data) + addend.compute(data).view(1, -1, 1, 1))

    def add(self, a: Node, b: Node) -> Node:
        return Node(lambda data: a.compute(data) + b.compute(data))

    def relu(self, x: Node) -> Node:
        return Node(lambda data: x.compute(data).relu())

    def conv_fprop(self, x: Node, w: Node, *, padding: list, stride: list, dilation: list) -> Node:
        return Node(lambda data: F.conv2d(x.compute(data), w.compute(data), None, stride, padding, dilation))

    def genstats(self, x: Node) -> tuple[Node, Node]:
        def total(power: int) -> Node:
            return Node(lambda data: (x.compute(data) ** power).sum((0, 2, 3), keepdim=True))

        return total(1), total(2)

    def build(self, modes: list) -> None:
        assert modes == ["A", "FALLBACK"]
        Graph.built += 1
        self.is_built = True

    def get_workspace_size(self) -> int:
        return 256

    def execute(self, pack: dict[Node, torch.Tensor], workspace: torch.Tensor, handle: str) -> None:
        assert self.is_built and workspace.numel() == 256 and handle == "handle"
        for node, data in pack.items():
            if node.facts:  # an input: as it was described
                assert (
                    data.dtype == node.facts["dtype"]
                    and data.numel() == torch.Size(node.facts["dim"]).numel()
                )
                assert data.dim() == 1 or list(data.stride()) == node.facts["stride"]
        values = {node: node.compute(pack) for node in pack if not node.facts}
        for node, value in values.items():
            assert node.dtype == pack[node].dtype
            pack[node].copy_(value.to(node.dtype))


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.fixture
def package(monkeypatch):
    fake = types.SimpleNamespace(
        __version__="1.2.3",
        data_type=TYPES,
        heur_mode=types.SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        pygraph=Graph,
    )
    monkeypatch.setattr(cudnn_frontend, "module", lambda: fake)
    monkeypatch.setattr(cudnn_frontend, "_handle", lambda device: "handle")
    monkeypatch.setattr(cudnn_frontend, "_local", types.SimpleNamespace())
    monkeypatch.setattr(Graph, "built", 0)
    return fake


def tensors(dtype=torch.bfloat16):
    x = torch.randn(2, 16, 9, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(24, 16, 3, 3) / 8).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, weight, torch.randn(24).to(dtype), torch.randn(2, 24, 5, 4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_inference(package, with_residual, with_bias, relu, dtype):
    x, weight, bias, residual = tensors(dtype)
    args = x, weight, bias if with_bias else None, residual if with_residual else None, GEOMETRY, relu
    expected = F.conv2d(x.float(), weight.float(), bias.float() if with_bias else None, *GEOMETRY)
    expected = expected + residual.float() if with_residual else expected
    expected = (expected.relu() if relu else expected).to(dtype)
    for _ in range(2):
        found = cudnn_frontend.conv_bias_act(*args)
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)
    assert Graph.built == 1
    cudnn_frontend.conv_bias_act(x[:1], *args[1:3], residual[:1] if with_residual else None, *args[4:])
    assert Graph.built == 2


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_training_behind_a_batch_norm(package, affine, relu):
    """The zeros that a convolution pads with are added behind the batch norm."""
    x, weight, *_ = tensors()
    stats = torch.stack((torch.randn(16, dtype=torch.float64), torch.rand(16, dtype=torch.float64) + 0.5))
    bn_weight, bn_bias = (torch.randn(16), torch.randn(16)) if affine else (None, None)
    output, found = cudnn_frontend.conv_stats(
        x, weight, None, GEOMETRY, stats, bn_weight, bn_bias, 1e-3, relu
    )
    normal = F.batch_norm(x.double(), *stats, *(p if p is None else p.double() for p in (bn_weight, bn_bias)),
                          eps=1e-3)  # fmt: skip
    expected = F.conv2d(normal.relu() if relu else normal, weight.double(), None, *GEOMETRY)
    torch.testing.assert_close(output.double(), expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(found, channel_stats(expected.float()), rtol=1e-4, atol=1e-4)
    assert found.dtype == torch.float64


def test_training_with_a_bias(package):
    x, weight, bias, _ = tensors()
    output, stats = cudnn_frontend.conv_stats(x, weight, bias, GEOMETRY)
    expected = F.conv2d(x.float(), weight.float(), bias.float(), *GEOMETRY)
    torch.testing.assert_close(output.float(), expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(stats, channel_stats(expected), rtol=1e-4, atol=1e-4)


def labels(x, weight, groups=1):
    geometry = GEOMETRY._replace(groups=groups)
    one = conv_autotune._bias_act_candidates(x, weight, None, None, geometry, True)
    two = conv_autotune._stats_candidates(x, weight, None, geometry)
    return [label for ways in (one, two) for label in ways if label == "cudnn graph"]


def test_without_the_package_nothing_is_offered(monkeypatch):
    x, weight, *_ = tensors()
    monkeypatch.setattr(cudnn_frontend, "module", lambda: None)
    assert labels(x.as_subclass(OnGpu), weight) == []
    assert "not installed" in cudnn_frontend.probe(torch.bfloat16, torch.device("cpu"))["frontend"]
    monkeypatch.undo()
    monkeypatch.setattr(cudnn_frontend.importlib, "import_module", lambda name: 1 / 0)
    cudnn_frontend.module.cache_clear()
    assert cudnn_frontend.module() is None
    cudnn_frontend.module.cache_clear()


def test_what_it_is_offered_for(package):
    x, weight, *_ = tensors()
    on_gpu = x.as_subclass(OnGpu)
    assert len(labels(on_gpu, weight)) == 2
    assert labels(x, weight) == [] == labels(on_gpu, weight[:, :8], groups=2)
    assert labels(on_gpu.contiguous(), weight) == [] == labels(on_gpu.float(), weight.float())
    norm = torch.ones(2, 16, dtype=torch.float64), None, None, 1e-5, True
    # Without measuring the first is taken: behind a batch norm one of our own, where there is one.
    assert list(conv_autotune._stats_candidates(on_gpu, weight, None, GEOMETRY, *norm))[-1] == "cudnn graph"


@pytest.mark.parametrize("supported", [True, False])
def test_the_tuner_tries_it_like_any_other_way(package, supported, monkeypatch, tmp_path):
    """Where it is the fastest it is taken and remembered; where the card has no kernel it is passed over."""
    monkeypatch.setenv("POOLING_EXT_TUNING_FILE", str(tmp_path / "tuning.json"))
    monkeypatch.delenv("POOLING_EXT_TUNE", raising=False)
    monkeypatch.setattr(autotune, "card_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(conv_autotune, "_chosen", {})
    autotune.forget()

    def milliseconds(way, device) -> float:
        way()
        return 1.0 if way.func is cudnn_frontend.conv_stats else 2.0

    def build(self, modes) -> None:
        raise GraphNotSupported("no engine")

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    real = Graph.build
    monkeypatch.setattr(Graph, "build", real if supported else build)
    x, weight, *_ = tensors()
    output, _ = conv_autotune.conv_stats(x.as_subclass(OnGpu), weight, None, GEOMETRY)
    expected = F.conv2d(x.float(), weight.float(), None, *GEOMETRY)
    torch.testing.assert_close(output.as_subclass(torch.Tensor).float(), expected, rtol=0.01, atol=0.01)
    (entry,) = json.loads((tmp_path / "tuning.json").read_text())["a card"].values()
    assert entry["fastest"] == ("cudnn graph" if supported else "cudnn, then statistics")
    assert ("cudnn graph" in entry["milliseconds"]) == supported
    autotune.forget()


def test_the_probe_says_what_is_supported(package, monkeypatch):
    found = cudnn_frontend.probe(torch.bfloat16, torch.device("cpu"))
    assert found == {"frontend": "1.2.3", "dtype": "torch.bfloat16"} | dict.fromkeys(
        ("conv_bias_act", "conv_stats", "norm_conv_stats"), "ok"
    )

    def genstats(self, x):
        raise GraphNotSupported("no statistics here")

    monkeypatch.setattr(Graph, "genstats", genstats)
    monkeypatch.setattr(cudnn_frontend, "_local", types.SimpleNamespace())
    found = cudnn_frontend.probe(torch.bfloat16, torch.device("cpu"))
    assert found["conv_bias_act"] == "ok"
    assert found["conv_stats"] == found["norm_conv_stats"] == "GraphNotSupported: no statistics here"


def test_a_handle_follows_pytorchs_stream(monkeypatch):
    """One for each device and thread, on the stream that is current at the call."""
    log: list[Any] = []
    fake = types.SimpleNamespace(
        create_handle=lambda: log.append("create") or f"handle {log.count('create')}",
        set_stream=lambda *, handle, stream: log.append((handle, stream)),
    )
    monkeypatch.setattr(cudnn_frontend, "module", lambda: fake)
    monkeypatch.setattr(cudnn_frontend, "_local", types.SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    for number, device in ((7, "cuda:0"), (8, "cuda:0"), (9, "cuda:1")):
        monkeypatch.setattr(
            torch.cuda,
            "current_stream",
            lambda device, number=number: types.SimpleNamespace(cuda_stream=number),
        )
        cudnn_frontend._handle(torch.device(device))
    assert log == ["create", ("handle 1", 7), ("handle 1", 8), "create", ("handle 2", 9)]
