"""Modules that have moved are still found under their earlier names."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        ("_native", "backends.cpu_library"),
        ("cuda", "backends.cuda_library"),
        ("fusing", "patching.codegen"),
        ("ops.deferred_norm", "ops.prologue_norm"),
        ("ops.tuned_conv", "ops.conv_autotune"),
        ("tuning", "backends.autotune"),
    ],
)
def test_a_module_is_found_under_its_earlier_name(earlier, now):
    assert importlib.import_module(f"pooling_ext.{earlier}") is importlib.import_module(f"pooling_ext.{now}")
