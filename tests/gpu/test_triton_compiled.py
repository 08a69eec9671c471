"""The Triton kernels compiled ahead of time, at ResNet-50's shapes, for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from xdist_locks import WORKER, once

pytest.importorskip("triton")

# A target's first test waits for all that is compiled for it, or for another process that does so.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
#: Bytes of shared memory that one program can have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

#: They read no activations, but a few numbers for each channel.
OF_PARAMETERS = ("_affine_kernel",)


def compile_for(target: str) -> str:
    """What the worker prints, which takes all cores: other processes of this test wait for it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    worker = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_worker.py"), target],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert worker.returncode == 0, worker.stderr[-4000:]
    return worker.stdout


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def compiled(target: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the worker says of each kernel, one entry for each specialization."""
    folder = tmp_path_factory.getbasetemp()
    path = (folder.parent if WORKER else folder) / f"compiled-{target}"
    return [json.loads(line) for line in once(path, lambda: compile_for(target)).splitlines()]


def label(facts: dict[str, Any]) -> str:
    return f"{facts['kernel']} ({facts['case']}, {facts['phase']})"


@pytest.fixture(scope="module")
def working(compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [facts for facts in compiled if "error" not in facts]


def test_every_kernel_compiles(compiled):
    assert compiled
    assert not {label(facts): facts["error"] for facts in compiled if "error" in facts}


def test_no_kernel_spills(working, target, request):
    if target == "gfx942":
        reason = "a scalar register of the stem's forward with offsets in bfloat16"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=False))
    assert not {label(facts): facts["spills"] for facts in working if facts["spills"]}


def test_shared_memory_fits(working, target):
    too_much = {label(facts): facts["shared"] for facts in working if facts["shared"] > SHARED[target]}
    assert not too_much


def test_channels_last_is_read_by_whole_vectors(working):
    """16 bytes at a time, into registers or on their way to shared memory."""
    narrow = {
        label(facts): facts["load_bytes"]
        for facts in working
        if "NHWC" in facts["case"]
        and facts["kernel"] not in OF_PARAMETERS
        and max(facts["load_bytes"], facts.get("copy_bytes", 0)) < 16
    }
    assert not narrow


def test_convolutions_take_the_matrix_instruction(working):
    kernels = [
        facts
        for facts in working
        if facts["kernel"]
        in ("conv_kernel", "matmul_kernel", "conv_input_grad_kernel", "conv_weight_grad_kernel")
        and "bfloat16" in facts["case"]
    ]
    assert len(kernels) >= 12
    assert not [label(facts) for facts in kernels if not facts["matrix"]]
