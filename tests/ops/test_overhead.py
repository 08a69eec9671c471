"""What a call costs beside its work: Python, dispatch, allocation."""

from __future__ import annotations

import copy
import gc
import statistics
import time

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.freezing.layers import PackedConv
from pooling_ext.ops import conv_speeds
from pooling_ext.ops.conv_bn_act.call import INFERENCE
from pooling_ext.ops.conv_bn_act.implementations import from_size


def seconds(function, x, calls: int = 300) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function(x)
    return (time.perf_counter() - start) / calls


# PyTorch's own averages have the shortest call of all (2 us); a boxed operator with our arguments takes
# twice that before Python has done anything.
beyond_reach = pytest.mark.xfail(reason="measured 3.5 x", strict=False)

# PyTorch's own maxima are quicker on some processors and in some versions; see the reason.
borderline = pytest.mark.xfail(reason="measured 2.7 to 3.3 x", strict=False)


def least_ratio(ours, theirs, x, enough: float) -> float:
    """Interleaved medians, the best of several rounds, so that a busy machine does not decide."""
    ratios = []
    gc.collect()
    seconds(ours, x), seconds(theirs, x)
    for _ in range(6):
        rounds = [(seconds(ours, x), seconds(theirs, x)) for _ in range(7)]
        mine, reference = (statistics.median(times) for times in zip(*rounds, strict=True))
        ratios.append(mine / reference)
        if ratios[-1] < enough:
            break
    return min(ratios)


@pytest.mark.timing
@pytest.mark.native
@pytest.mark.no_poison
@pytest.mark.parametrize(
    "ours, theirs",
    [
        pytest.param(lambda x: F.max_pool2d(x, 2), lambda x: TF.max_pool2d(x, 2), id="max", marks=borderline),
        pytest.param(
            lambda x: F.avg_pool2d(x, 2), lambda x: TF.avg_pool2d(x, 2), id="avg", marks=beyond_reach
        ),
        pytest.param(lambda x: F.lp_pool2d(x, 2, 2), lambda x: TF.lp_pool2d(x, 2, 2), id="lp"),
        pytest.param(
            lambda x: F.adaptive_avg_pool2d(x, 2),
            lambda x: TF.adaptive_avg_pool2d(x, 2),
            id="adaptive-avg",
            marks=beyond_reach,
        ),
        pytest.param(
            lambda x: F.adaptive_max_pool2d(x, 2),
            lambda x: TF.adaptive_max_pool2d(x, 2),
            id="adaptive-max",
            marks=borderline,
        ),
    ],
)
def test_a_tiny_call_costs_at_most_three_of_pytorchs(ours, theirs):
    x = torch.randn(1, 1, 4, 4)
    with torch.no_grad():
        ratio = least_ratio(ours, theirs, x, 2.5)
    assert ratio <= 3, f"ratio {ratio:.2f}"


class Block(nn.Module):
    """Two convolutions with what follows them, and a residual."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, kernel, padding=kernel // 2, bias=False)
        self.conv2 = nn.Conv2d(8, 8, kernel, padding=kernel // 2, bias=False)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + x)


#: Of eager's time, with some room beyond what was measured on one thread of an AMD EPYC (Zen 4): 0.87 to 0.97
#: and 0.87 to 0.91 for the function in evaluation and training, 0.77 to 0.85 and 0.88 to 0.92 for a block.
CONVOLUTIONS = {"function": 1.1, "block": 1.0}


@pytest.mark.timing
@pytest.mark.native
@pytest.mark.no_poison
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("what", CONVOLUTIONS)
def test_a_tiny_convolution_costs_no_more_than_eager(what, kernel, training):
    """What is around it: which implementation does a call is asked at every call."""
    block, x = Block(kernel).train(training), torch.randn(1, 8, 4, 4)
    patched = copy.deepcopy(block)
    pooling_ext.patch(patched)
    calls = {
        "block": (patched, block),
        "function": (
            lambda x: F.conv_bn_act(block.conv1, block.bn1, x),
            lambda x: torch.relu_(block.bn1(block.conv1(x))),
        ),
    }
    with from_size(1 << 14, keep=(INFERENCE,)), torch.set_grad_enabled(training):
        ratio = least_ratio(*calls[what], x, 0.9)
    assert ratio <= CONVOLUTIONS[what], f"ratio {ratio:.2f}"


@pytest.mark.timing
@pytest.mark.native
@pytest.mark.no_poison
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("way", ["Winograd", "depthwise", "prepacked"])
def test_a_frozen_layer_costs_little_beside_its_operator(way, monkeypatch):
    """Winograd's and the depthwise operators have little to set up, oneDNN's has more."""
    groups = 16 if way == "depthwise" else 1
    conv = nn.Conv2d(16, 16, 5 if way == "prepacked" else 3, padding=1, groups=groups).eval()
    x = torch.randn(1, 16, 4, 4).to(memory_format=torch.channels_last)
    monkeypatch.setattr(conv_speeds, "speedup", lambda *_: None)
    frozen = pooling_ext.freeze(nn.Sequential(conv), x)
    layer = next(module for module in frozen.modules() if isinstance(module, PackedConv))
    assert layer.way == way
    with torch.no_grad():
        ratio = least_ratio(layer.function, conv, x, 2.0)
    assert ratio <= (4.0 if way == "prepacked" else 2.0), f"ratio {ratio:.2f}"
