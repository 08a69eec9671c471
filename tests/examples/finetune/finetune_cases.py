"""A model, runs and errors of examples/finetune.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[3] / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune  # noqa: E402
import finetune_training  # noqa: E402

QUICK = ("--no-pretrained", "--timing", "0", "--workers", "0", "--batch-size", "8")


class Tiny(nn.Module):
    """Has what resuming has to get right: BatchNorm's buffers, dropout, and pooling to patch."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8 * 7 * 7, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.dropout(self.features(x).flatten(1)))


def train(model: str, digits: Path, output: Path, epochs: int, *more: str) -> dict[str, Any]:
    options = (*QUICK, "--model", model, "--limit", "4", "--epochs-head", "1", "--epochs-all", str(epochs))
    status = finetune.main(
        ["--data", str(digits), "--no-flip", "--image-size", "32", *options, "--output", str(output), *more]
    )
    assert status == 0
    return finetune_training.load(output / "last.pt")


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(actual["model"][name], value), name
    for ours, theirs in zip(actual["history"], expected["history"], strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}


def script(*options: str, processes: int = 1) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*launcher, str(EXAMPLES / "finetune.py"), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fails(capsys: pytest.CaptureFixture[str], *options: str | Path) -> str:
    """The one line that ``options`` end with."""
    assert finetune.main([*QUICK, "--image-size", "32", *map(str, options)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error
