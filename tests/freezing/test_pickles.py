"""Files that earlier versions wrote: they load, or say why they do not."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import pooling_ext
from pooling_ext.freezing.frozen import FORMAT
from pooling_ext.patching import codegen

DATA = Path(__file__).parent / "data"


def load(name: str, version: int = 0):
    return torch.load(DATA / f"version_{version}_{name}.pickle", weights_only=False)


@pytest.mark.parametrize("version", [0, 1])
def test_a_patched_model_of_an_earlier_version_loads_and_is_fused(version):
    model, values = load("patched", version), load("values")
    with torch.no_grad():
        torch.testing.assert_close(model(values["input"]), values["expected"])
    assert codegen.base_class(type(model)) is nn.Sequential
    assert type(model[3]) is pooling_ext.MaxPool2d


def test_a_frozen_model_of_version_0_is_refused_with_the_reason():
    with pytest.raises(pooling_ext.ArgumentError, match=r"format 0, .* reads 1\); freeze the model again"):
        load("frozen")


def test_a_frozen_model_of_version_1_loads():
    """It was written before layers had a choice of ways, and runs as it did."""
    values = load("values")
    frozen = load("frozen", 1)
    torch.testing.assert_close(frozen(values["input"]), values["expected"], rtol=1e-4, atol=1e-5)


def test_formats_of_the_future_are_refused(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    frozen = pooling_ext.freeze(model, torch.randn(1, 3, 8, 8))
    frozen.format = FORMAT + 1
    with pytest.raises(pooling_ext.ArgumentError, match=f"format {FORMAT + 1}"):
        pickle.loads(pickle.dumps(frozen))
    pooling_ext.patch(model)
    monkeypatch.setattr(codegen, "FORMAT", codegen.FORMAT + 1)
    written = pickle.dumps(model)
    monkeypatch.undo()
    with pytest.raises(pooling_ext.ArgumentError, match="newer version"):
        pickle.loads(written)
