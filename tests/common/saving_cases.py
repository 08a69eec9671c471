"""What tests of saved frozen models share."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from freezing_cases import ways
from helpers import strides
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pooling_ext


def saved(frozen: pooling_ext.Frozen) -> pooling_ext.Frozen:
    file = io.BytesIO()
    frozen.save(file)
    return pooling_ext.load(io.BytesIO(file.getvalue()))


def assert_same(one: Any, other: Any) -> None:
    """Nests of the same types, with tensors of the same bits and strides."""
    (ours, spec), (theirs, known) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    assert spec == known and len(ours) > 0
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, Tensor):
            assert a.dtype == b.dtype and strides(a) == strides(b) and torch.equal(a, b)
        else:
            assert type(a) is type(b) and a == b


def assert_saves(model: nn.Module, *args: Any, **options: Any) -> pooling_ext.Frozen:
    """What is loaded does as the frozen model does, and says the same of itself; returns it."""
    frozen = pooling_ext.freeze(model.eval(), args if len(args) > 1 else args[0], **options)
    twin = saved(frozen)
    assert_same(twin(*copy.deepcopy(args)), frozen(*copy.deepcopy(args)))
    assert twin.report == frozen.report and repr(twin) == repr(frozen) and ways(twin) == ways(frozen)
    assert twin.dtype == frozen.dtype and twin.name == frozen.name and not twin.training
    assert not list(twin.parameters()) or list(frozen.parameters())
    return twin
