"""Fixtures of the tests of operators."""

from __future__ import annotations

import pytest

from pooling_ext.ops import conv_choice, conv_speeds


@pytest.fixture
def convolutions_of_any_size(monkeypatch):
    """The CPU's kernels of convolutions do what they can, though PyTorch's may be faster."""
    monkeypatch.setattr(conv_speeds, "speedup", lambda *_: (10.0, True))
    monkeypatch.setattr(conv_choice, "LEAST_WORK", 0)
    monkeypatch.setattr(conv_choice, "HAS_AMX", False)
