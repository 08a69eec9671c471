"""The tiles that the convolutions in Triton may work in: that there are some, and that all give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_cases import (
    ALL_DTYPES,
    CONVS,
    TRITON,
    Conv,
    call,
    expected_of,
)

from pooling_ext.testing.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("allow_tf32")

OPERATORS = ("conv_bias_act", "conv_stats", "conv_input_grad", "conv_weight_grad")


def functions() -> dict[str, Any]:
    """The operators' functions, which take a configuration."""
    pytest.importorskip("triton")
    from pooling_ext.triton.conv.conv import conv_bias_act, conv_stats
    from pooling_ext.triton.conv.conv_input_grad import conv_input_grad
    from pooling_ext.triton.conv.conv_weight_grad import conv_weight_grad

    every = (conv_bias_act, conv_stats, conv_input_grad, conv_weight_grad)
    return {function.__name__: function for function in every}


@TRITON
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["1x1", "3x3 stride"])
def test_configurations(backend, name, operator):
    """Every one that is said to suit gives what the others give; statistics differ in the last digits."""
    from pooling_ext.triton.conv.conv_configs import configs_of

    arguments = call(operator, CONVS[name], torch.bfloat16)
    configs = configs_of(operator, *arguments)
    assert len(set(configs)) == len(configs) > 1
    expected = getattr(torch.ops.pooling_ext, operator)(*arguments)
    for config in (configs[0], configs[-1]._replace(group=3)):
        actual = functions()[operator](*arguments, config=config)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton-cuda"], indirect=True)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kernel_size, stride", [(1, 1), (3, 1), (3, 2)])
@ALL_DTYPES
def test_every_configuration(backend, operator, kernel_size, stride, dtype):
    """Each is compiled differently, so that all are run where they are."""
    from pooling_ext.triton.conv.conv_configs import configs_of

    padding = kernel_size // 2
    conv = Conv((2, 256, 16, 17), 256, (kernel_size,) * 2, (stride,) * 2, (padding,) * 2)
    arguments = call(operator, conv, dtype)
    outputs = {
        config: functions()[operator](*arguments, config=config)
        for config in configs_of(operator, *arguments)
    }
    expected, sums = expected_of(operator, conv, arguments)
    for config, actual in outputs.items():
        if isinstance(actual, torch.Tensor):
            actual = (actual, None)
        assert_close(actual[0], expected, exact=True, what=str(config))
        if sums is not None:
            torch.testing.assert_close(actual[1], sums, rtol=1e-5, atol=1e-3)


@TRITON
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_wide_tiles(backend, operator, kernel_size):
    """An epilogue takes a tile's columns in parts, the last of which may be past the end."""
    run = functions()[operator]
    from pooling_ext.triton.conv.conv_configs import Config

    channels, features = (200, 16) if operator.endswith("_grad") else (16, 200)
    conv = Conv((1, channels, 5, 4), features, (kernel_size,) * 2, padding=(kernel_size // 2,) * 2)
    arguments = call(operator, conv, torch.float32)
    expected = run(*arguments, config=Config(16, 64, 16, 4, 2))
    actual = run(*arguments, config=Config(32, 256, 16, 4, 2))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # statistics are of other tiles


@pytest.mark.parametrize("operator", OPERATORS)
@ALL_DTYPES
@pytest.mark.parametrize("tf32", [False, True])
def test_configurations_of_large_problems(operator, dtype, tf32, allow_tf32):
    """At ResNet-50's sizes, where nothing is run: there is a choice, and all of it fits any card."""
    run = functions()[operator]
    from pooling_ext.triton import launching
    from pooling_ext.triton.conv import conv_configs

    allow_tf32(tf32)
    for conv in (
        Conv((256, 64, 56, 56), 256),
        Conv((256, 256, 14, 14), 256, (3, 3), (1, 1), (1, 1)),
        Conv((256, 512, 14, 14), 512, (3, 3), (2, 2), (1, 1)),
    ):
        arguments = call(operator, conv, dtype, "meta")
        configs = conv_configs.configs_of(operator, *arguments)
        assert len(configs) > 3
        launches: list[launching.Launch] = []
        with launching.watched(lambda launch, seen=launches: seen.append(launch) or True):
            run(*arguments)
        (made,) = (one for one in launches if "BLOCK_M" in one.arguments)
        m, n, k = (made.arguments[f"BLOCK_{axis}"] for axis in "MNK")
        assert any((m, n, k) == config[:3] for config in configs)
        assert made.arguments["PRECISION"] == ("tf32" if tf32 and dtype == torch.float32 else "ieee")
        assert (
            made.options["num_stages"] * (m + n) * k * dtype.itemsize <= conv_configs.ANY_CARD.shared_memory
        )
        assert made.grid[0] >= conv_configs.ANY_CARD.processors
