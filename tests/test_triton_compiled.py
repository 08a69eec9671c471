"""The Triton kernels compiled ahead of time, at ResNet-50's shapes, for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
#: Bytes of shared memory that one program can have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

TARGET = pytest.mark.parametrize("target", TARGETS)


@cache
def compiled(target: str) -> list[dict[str, Any]]:
    """What the worker says of each kernel, one entry for each specialisation."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    worker = Path(__file__).with_name("triton_worker.py")
    result = subprocess.run(
        [sys.executable, worker, target], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def label(facts: dict[str, Any]) -> str:
    return f"{facts['kernel']} ({facts['case']}, {facts['phase']})"


def working(target: str) -> list[dict[str, Any]]:
    return [facts for facts in compiled(target) if "error" not in facts]


@TARGET
def test_every_kernel_compiles(target):
    assert compiled(target)
    assert not {label(facts): facts["error"] for facts in compiled(target) if "error" in facts}


@TARGET
def test_no_kernel_spills(target):
    assert not {label(facts): facts["spills"] for facts in working(target) if facts["spills"]}


@TARGET
def test_shared_memory_fits(target):
    too_much = {
        label(facts): facts["shared"] for facts in working(target) if facts["shared"] > SHARED[target]
    }
    assert not too_much
