"""Which convolutions are ours by what was measured, and `pooling-ext tune`, which measures."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

pytest.importorskip("rich")

import pooling_ext
import pooling_ext.functional as F
from benchmarks.reports import targets
from benchmarks.suites.conv import ConvCase
from pooling_ext import cli, conv_tuning
from pooling_ext.backends import cpu_library
from pooling_ext.ops import conv_choice, conv_kernels, conv_speeds
from pooling_ext.ops.conv_choice import (
    DEPTHWISE,
    FORWARD,
    IMAGE,
    INPUT_GRAD,
    PHASES,
    POINTWISE,
    WHY_NOT,
    WINOGRAD,
    Conv,
    call_why_not,
    phase_why_not,
)
from pooling_ext.testing.conv_shapes import RESNET

pytestmark = pytest.mark.native


def conv(batch=16, channels=64, side=56, **changes) -> Conv:
    pair, sides = (1, 1), (1, 1, 1, 1)
    found = Conv(batch, channels, (side, side), channels, (3, 3), pair, sides, pair, 1, torch.float32, True)
    return found._replace(**changes)


@pytest.fixture
def speeds(monkeypatch, tmp_path):
    """Writes a file of this machine, in which kinds have rows."""
    file = tmp_path / "speeds.json"
    monkeypatch.setenv("POOLING_EXT_CONV_SPEEDS", str(file))

    def write(kinds: dict[str, list[list[float]]]) -> None:
        file.write_text(json.dumps({cpu_library.module.isa: {"speedups": kinds}}))
        conv_speeds.forget()

    yield write
    monkeypatch.undo()
    conv_speeds.forget()


KIND = "Winograd float32 channels_last 3 1"


def test_what_was_measured_decides(speeds):
    speeds({KIND: [[16, 64, 64, 56 * 56, 1.01, 0.5, 2.0]]})
    assert conv_choice.winograd_why_not(conv(), FORWARD) is None
    assert "2.00 times as fast" in conv_choice.winograd_why_not(conv(), INPUT_GRAD)


def test_what_is_near_decides_with_a_margin(speeds):
    speeds({KIND: [[16, 64, 64, 56 * 56, 1.01, 1.1, 2.0], [16, 512, 512, 49, 3.0, 0.5, 0.5]]})
    near = conv(batch=8)
    assert "a convolution like it" in conv_choice.winograd_why_not(near, FORWARD)
    assert conv_choice.winograd_why_not(near, INPUT_GRAD) is None
    assert conv_choice.winograd_why_not(conv(channels=256, features=256, side=7), FORWARD) is None


def test_what_is_far_is_left_to_rules(speeds):
    speeds({KIND: [[16, 64, 64, 56 * 56, 0.5, 0.5, 0.5]]})
    assert conv_choice.winograd_why_not(conv(batch=1, side=28), FORWARD) is None
    assert conv_choice.winograd_why_not(conv(dtype=torch.float64), FORWARD) is None
    assert conv_choice.winograd_why_not(conv(channels_last=False), FORWARD) is None


def test_depthwise_convolutions_by_kernel_and_stride(speeds):
    speeds({"depthwise float32 channels_last 5 2": [[16, 64, 64, 28 * 28, 0.5, 2.0, 2.0]]})
    grouped = conv(groups=64, kernel=(5, 5), padding=(2, 2, 2, 2))
    assert conv_choice.depthwise_why_not(grouped, FORWARD) is None
    assert "PyTorch's forward of it" in conv_choice.depthwise_why_not(
        grouped._replace(stride=(2, 2)), FORWARD
    )


def test_what_the_weight_takes_counts(speeds, monkeypatch):
    """Of few pixels Winograd's kernels save less than its transform takes, or than a look at a kept one."""
    monkeypatch.setattr(conv_speeds, "weights_count", True)
    speeds({KIND: [[16, 512, 512, 7 * 7, 2.0, 2.0, 2.0], [4, 512, 512, 3 * 3, 1.5, 1.5, 1.5]]})
    many, few, tiny = conv(16, 512, 7), conv(4, 512, 3), conv(4, 400, 5, groups=25)
    for phase in PHASES:
        assert phase_why_not(WINOGRAD, many, phase) is None
        # Gradients were measured with the transform.
        reason = phase_why_not(WINOGRAD, few, phase)
        assert (reason is None) == (phase != FORWARD) and (reason is None or "the transform" in reason)
    assert call_why_not(WINOGRAD, many, (FORWARD,)) is None
    assert "a look at its weight" in str(call_why_not(WINOGRAD, tiny, (FORWARD,)))
    assert WHY_NOT[WINOGRAD](tiny, FORWARD) is None  # as for a frozen model, whose weight stays
    assert conv_kernels.plan(WINOGRAD, few).ours == (False, True, True)


def test_a_compiler_takes_the_choice_too(speeds, monkeypatch, fresh_compiler):
    monkeypatch.setattr(conv_speeds, "weights_count", True)
    speeds({KIND: [[2, 64, 64, 28 * 28, 2.0, 2.0, 2.0]]})
    x, weight = torch.randn(2, 64, 28, 28, requires_grad=True), torch.randn(64, 64, 3, 3) / 24
    found = torch.compile(lambda x: F.conv2d(x, weight, padding=1), fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("content", ["", "[]", '{"avx512": {}}', "{"])
def test_files_that_say_nothing(speeds, content, recwarn):
    speeds({})
    conv_speeds.user_file().write_text(content)
    conv_speeds.forget()
    assert conv_choice.winograd_why_not(conv(), FORWARD) is None


def test_what_is_shipped():
    """It has measurements of every kind, and no kernel of the ResNets is left to PyTorch."""
    for kind, rows in conv_speeds.read(conv_speeds.SHIPPED)["avx512"]["speedups"].items():
        assert kind.split()[0] in WHY_NOT and rows
        assert all(len(row) == 7 and min(row) > 0 for row in rows)
    for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
        for phase in PHASES:
            assert (
                conv_choice.winograd_why_not(conv(channels=channels, features=channels, side=side), phase)
                is None
            )


def test_tune(monkeypatch, tmp_path, capsys):
    """The command writes what is read here, beside what other instruction sets have."""
    file = tmp_path / "cache" / "speeds.json"
    monkeypatch.setenv("POOLING_EXT_CONV_SPEEDS", str(file))
    file.parent.mkdir()
    file.write_text('{"other": {"speedups": {}}}')
    monkeypatch.setattr(conv_tuning, "BUDGET", 0.0)
    small = [
        (WINOGRAD, conv(1, 16, 8)),
        (DEPTHWISE, conv(1, 8, 6, groups=8, stride=(2, 2), channels_last=False)),
        (POINTWISE, conv(1, 8, 6, kernel=(1, 1), padding=(0, 0, 0, 0), channels_last=False)),
        (IMAGE, conv(1, 3, 6, features=5, stride=(2, 2))),
    ]
    monkeypatch.setattr(
        conv_tuning, "problems", lambda dtype, quick: [(k, c._replace(dtype=dtype)) for k, c in small]
    )
    assert cli.main(["tune", "--dtype", "float32", "--quick"]) == 0
    written = json.loads(file.read_text())
    assert set(written) == {"other", cpu_library.module.isa}
    others = (
        "depthwise float32 contiguous 3 2",
        "pointwise float32 contiguous 1 1",
        "image float32 channels_last 3 2",
    )
    kinds = {KIND, *others}
    assert set(written[cpu_library.module.isa]["speedups"]) == kinds
    written[cpu_library.module.isa]["speedups"][KIND] = [[1, 2, 3, 4, 5.0, 6.0, 7.0]]
    file.write_text(json.dumps(written))
    assert cli.main(["tune", "--dtype", "float32", "--kernels", "pointwise"]) == 0
    again = json.loads(file.read_text())[cpu_library.module.isa]["speedups"]
    assert set(again) == kinds and again[KIND] == [[1, 2, 3, 4, 5.0, 6.0, 7.0]]
    file.write_text(json.dumps({cpu_library.module.isa: {"speedups": {}}}))
    assert cli.main(["tune", "--dtype", "float32"]) == 0
    assert "forward" in capsys.readouterr().out
    found = conv_speeds.speedup(*small[0], 0)
    assert found is not None and found[1]
    monkeypatch.undo()
    conv_speeds.forget()


def test_every_kind_is_measured():
    kinds = {
        (kernels, c.kernel[-1], c.stride[0], c.channels_last)
        for kernels, c in conv_tuning.problems(torch.float32, False)
    }
    assert kinds == {
        *((WINOGRAD, k, s, last) for k, s in ((3, 1), (3, 2), (5, 1), (7, 1)) for last in (True, False)),
        (POINTWISE, 1, 1, True),
        (POINTWISE, 1, 1, False),
        *(
            (IMAGE, k, s, last)
            for k, s in ((3, 1), (3, 2), (4, 4), (5, 1), (7, 2), (11, 4), (16, 16))
            for last in (True, False)
        ),
        *(
            (DEPTHWISE, k, s, last)
            for k, s in ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1))
            for last in (True, False)
        ),
    }


def test_patched_layers_heed_it(speeds):
    speeds({KIND: [[2, 32, 32, 400, 0.5, 0.5, 0.5]]})
    model, x = (
        nn.Conv2d(32, 32, 3, padding=1),
        torch.randn(2, 32, 20, 20).to(memory_format=torch.channels_last),
    )
    pooling_ext.patch(model)
    names = [decision.backend for decision in pooling_ext.explain(model, x).decisions]
    assert WINOGRAD not in names


@pytest.mark.timing
@pytest.mark.no_poison
@pytest.mark.parametrize("shape", RESNET, ids=lambda shape: shape.name)
def test_the_layers_of_resnets_stay_fast(shape):
    """Not below two thirds of what the benchmarks set out to reach, on processors that these are for.

    Below half at 14x14, whose transformed weights do not fit the second-level cache: these layers were
    measured to be a third slower in some processes than in others, on the same machine.
    """
    if cpu_library.module.isa != "avx512":
        pytest.skip(f"the goals are for AVX-512, and this is {cpu_library.module.isa}")
    rivals, _ = ConvCase(shape, 4).rivals(torch.float32)
    goals = {target.what: target.goal for target in targets.CONV}
    small = shape.output_side < 14
    wanted = {
        "forward": goals[
            "3x3 forward, 7x7 planes" if small else "3x3 forward, batch 16, float32, slowest layer"
        ],
        "input gradient": goals["3x3 input gradient, slowest layer"],
        "weight gradient": goals["3x3 weight gradient, slowest layer"],
    }
    for phase, goal in wanted.items():
        allowed = goal * (0.4 if small else 0.5 if shape.output_side == 14 else 0.66)
        ratios = []
        for _ in range(5):  # a busy machine does not decide
            ratios.append(conv_tuning.ratio(*rivals[phase].values()))
            if ratios[-1] >= allowed:
                break
        assert max(ratios) >= allowed, f"{phase}: {ratios}"
