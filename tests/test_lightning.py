"""The Lightning callback: with Lightning where it is installed, and with a stand-in for what it documents."""

from __future__ import annotations

import copy
import importlib
import sys
import types
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training_cases import Block

from pooling_ext import ArgumentError
from pooling_ext.accelerating import measure

NAMES = ("lightning", "lightning.pytorch", "pytorch_lightning")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu, self.block = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Block(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.relu(self.bn(self.conv(x))))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Measures for a moment, and finds that what is patched takes half the time."""
    clock = types.SimpleNamespace(now=0.0)

    def seconds(way: measure.Way, device: torch.device) -> float:
        way.prepare()()
        clock.now += 10
        return 5.0 if way.name == "patched" else 10.0

    monkeypatch.setattr(measure, "_seconds", seconds)
    monkeypatch.setattr(measure, "clock", lambda: clock.now)


# --- by the documented interface ---------------------------------------------------------------------------


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def stand_in(request, monkeypatch):
    """The callback over a stand-in for Lightning, under either of its names."""
    for name in (*NAMES, "pooling_ext.lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "pooling_ext.lightning")
    module: Any = types.ModuleType(request.param)
    module.Callback = type("Callback", (), {})
    if request.param == "lightning.pytorch":
        monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, request.param, module)
    made = importlib.import_module("pooling_ext.lightning")
    assert issubclass(made.Accelerate, module.Callback)
    return made


class Precision:
    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def convert_input(self, data: Any) -> Any:
        return data

    @contextmanager
    def forward_context(self):
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            yield


def trainer(dtype: torch.dtype | None = None) -> Any:
    strategy = types.SimpleNamespace(batch_to_device=lambda batch: batch)
    return types.SimpleNamespace(strategy=strategy, precision_plugin=Precision(dtype))


def test_patches_without_an_example(stand_in):
    module = nn.ModuleDict({"model": Network()})
    callback = stand_in.Accelerate()
    assert callback.report is None
    callback.on_fit_start(trainer(), module)
    assert callback.report.chosen == "patched" and not callback.report.milliseconds
    assert type(module["model"]) is not Network and type(module["model"].block) is not Block


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_measures_on_an_example(stand_in, dtype):
    module, dtypes = nn.ModuleDict({"model": Network()}), set()
    module["model"].conv.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    callback = stand_in.Accelerate((X,), network="model")
    callback.on_fit_start(trainer(dtype), module)
    report = callback.report
    assert report is module["model"].accelerate_report and report.chosen == "patched" and report.speedup == 2
    assert dtypes == {dtype or torch.float32}
    callback.on_fit_start(trainer(dtype), module)
    assert callback.report is report


def test_errors(stand_in):
    module = nn.ModuleDict({"model": Network()})
    with pytest.raises(AttributeError, match="backbone"):
        stand_in.Accelerate(X, network="backbone").on_fit_start(trainer(), module)
    with pytest.raises(ArgumentError, match="example must be what model"):
        stand_in.Accelerate(X[0, 0, 0], network="model").on_fit_start(trainer(), module)
    assert type(module["model"]) is Network


def test_without_lightning(monkeypatch):
    for name in (*NAMES, "pooling_ext.lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "pooling_ext.lightning")
    with pytest.raises(ModuleNotFoundError, match="lightning"):
        importlib.import_module("pooling_ext.lightning")


# --- by Lightning itself -----------------------------------------------------------------------------------

INSTALLED = [name for name in ("lightning.pytorch", "pytorch_lightning") if find_spec(name.partition(".")[0])]


@pytest.mark.skipif(not INSTALLED, reason="Lightning is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("network", "example"), [("", None), ("model", X), ("", (X,))])
def test_fit(tmp_path, network, example, precision):
    pl: Any = importlib.import_module(INSTALLED[0])
    sys.modules.pop("pooling_ext.lightning", None)
    accelerate = importlib.import_module("pooling_ext.lightning").Accelerate

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Network()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def training_step(self, batch: Any) -> Tensor:
            return self(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def fitted(module: Any, callbacks: list[Any], **kwargs: Any) -> Any:
        options: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "max_epochs": 1,
            **kwargs,
        }
        options |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
        pl_trainer = pl.Trainer(callbacks=callbacks, precision=precision, **options)
        pl_trainer.fit(module, DataLoader(TensorDataset(X.repeat(4, 1, 1, 1)), batch_size=2))
        return pl_trainer

    module = Module()
    eager, callback = copy.deepcopy(module), accelerate(example, network)
    done = fitted(module, [callback])
    assert callback.report.chosen == "patched" and bool(callback.report.milliseconds) == (example is not None)
    assert type(module.model) is not Network
    fitted(eager, [])
    for name, expected in eager.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], expected, rtol=0.05, atol=0.05)
    done.save_checkpoint(tmp_path / "model.ckpt")
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert list(saved) == list(eager.state_dict())
    copy.deepcopy(module)(X)
