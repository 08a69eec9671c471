"""``pooling-ext bench MODEL``: which models it finds, and what it prints."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from pooling_ext import ArgumentError, cli
from pooling_ext.accelerating import bench, measure

pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Each way takes as many seconds as its name has letters."""
    monkeypatch.setattr(measure, "MOST_ROUNDS", 3)
    monkeypatch.setattr(measure, "_seconds", lambda way, device: float(len(way.name)))


@pytest.fixture
def timm(monkeypatch):
    """What of timm is asked, with one model."""
    module: Any = types.ModuleType("timm")
    names = ["tinynet", "resnet18"]
    module.is_model = names.__contains__
    module.list_models = lambda: names
    module.get_pretrained_cfg = lambda name: types.SimpleNamespace(input_size=(3, 40, 48))
    module.create_model = lambda name: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    monkeypatch.setitem(sys.modules, "timm", module)
    monkeypatch.setattr(bench, "find_spec", lambda name: True)


@pytest.fixture
def no_timm(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "timm" else True)


@pytest.mark.parametrize(
    ("name", "size", "frames"),
    [
        ("resnet18", (224, 224), False),
        ("torchvision/inception_v3", (299, 299), False),
        ("efficientnet_v2_s", (384, 384), False),
        ("lraspp_mobilenet_v3_large", (520, 520), False),
        ("r3d_18", (112, 112), True),
    ],
)
def test_models_of_torchvision(no_timm, name, size, frames):
    found = bench.find(name)
    assert found.size == size and found.frames == frames
    if name in ("resnet18", "lraspp_mobilenet_v3_large"):
        assert isinstance(found.make(), nn.Module)


def test_models_of_timm(timm):
    assert bench.find("tinynet").size == (40, 48)
    assert isinstance(bench.find("timm/resnet18").make(), nn.Sequential)
    assert not isinstance(bench.find("resnet18").make(), nn.Sequential)  # torchvision's comes first
    with pytest.raises(ArgumentError, match=r"but got tinynets; close ones: .*tinynet"):
        bench.find("tinynets")
    with pytest.raises(ArgumentError, match="torchvision/tinynet"):
        bench.find("torchvision/tinynet")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet19", r"but got resnet19; close ones: resnet1.* \(timm not installed\)"),
        ("fasterrcnn_resnet50_fpn", "MODEL must take images alone, but fasterrcnn_resnet50_fpn takes other"),
        ("timm/resnet18", r"but got timm/resnet18 \(timm not installed\)"),
    ],
)
def test_names_that_are_none(no_timm, capsys, name, said):
    assert cli.main(["bench", name]) == 2
    error = capsys.readouterr().err
    with pytest.raises(ArgumentError, match=said):
        raise ArgumentError(error)


@pytest.mark.parametrize("option", [["--batch", "0"], ["--dtype", "int8"], ["--threads", "many"], []])
def test_options_that_are_none(option, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", *(["resnet18"] if option else []), *option])
    assert (option[0] if option else "MODEL") in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("phase", "kept"), [("training", "patched"), ("inference", "frozen")])
def test_one_phase(timm, capsys, phase, kept, dtype):
    command = ["bench", "tinynet", "--batch", "2", "--only", phase, "--dtype", dtype]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    what = "training step" if phase == "training" else "inference"
    assert lines[0].startswith(f"{what}, float32 (2, 3, 40, 48): medians of 3 rounds")
    assert any(line.startswith(f"* {kept} ") for line in lines)


def test_an_example_that_the_model_does_not_take(timm, capsys):
    assert cli.main(["bench", "tinynet", "--size", "2", "--only", "training"]) == 1
    assert "example must be what model (Sequential) takes" in capsys.readouterr().err


def test_both_phases_in_processes_of_their_own(monkeypatch, capsys):
    ran: list[list[str]] = []

    def fake(command: list[str]) -> Any:
        ran.append(command)
        return types.SimpleNamespace(returncode=len(ran) - 1)

    monkeypatch.setattr(subprocess, "run", fake)
    threads = torch.get_num_threads()
    assert cli.main(["bench", "resnet18", "--batch", "3", "--threads", str(threads)]) == 1
    own = [
        sys.executable,
        "-m",
        "pooling_ext.cli",
        "bench",
        "resnet18",
        "--batch",
        "3",
        "--threads",
        str(threads),
    ]
    assert ran == [[*own, "--only", "training"], [*own, "--only", "inference"]]
    said = capsys.readouterr().out
    assert said.startswith(f"resnet18, float32, {threads} threads, {cli.cpu_model()}, PyTorch ")


def test_suites_of_a_checkout(monkeypatch):
    import benchmarks.__main__ as suites

    given: list[Any] = []
    monkeypatch.setattr(suites, "main", lambda arguments: given.append(list(arguments)) or 0)
    assert cli.main(["bench", "pool", "--list"]) == 0 and given == [["pool", "--list"]]
