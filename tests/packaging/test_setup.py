"""For which GPUs setup.py compiles, and when it leaves the CUDA kernels out."""

from __future__ import annotations

import importlib.util
import stat
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
H200, AMPERE, FUTURE, OLD = (9, 0), (8, 6), (14, 0), (7, 5)

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the checkout")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """setup.py as a module, on a machine with an nvcc, PyTorch for CUDA and the GPUs given."""
    spec = importlib.util.spec_from_file_location("pooling_ext_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    nvcc = executable(tmp_path / "nvcc", "echo sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_103")
    torch = tmp_path / "torch"
    (torch / "lib").mkdir(parents=True)
    (torch / "lib" / "libtorch_cuda.so").touch()
    for name in ("POOLING_EXT_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setattr(setup, "torch_folder", lambda: torch)

    def make(*gpus: tuple[int, int], **environment: str) -> ModuleType:
        # As PyTorch does not see them in pip's isolated build; nvidia-smi does.
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        capabilities = [f"echo {major}.{minor}" for major, minor in gpus]
        executable(tmp_path / "nvidia-smi", "\n".join(capabilities or [":"]))
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return setup

    return make


def executable(path: Path, command: str) -> Path:
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def architectures(setup: ModuleType) -> list[tuple[str, bool]]:
    return setup.Toolkit(setup.find_nvcc()).architectures()


@pytest.mark.parametrize(
    ("gpus", "environment", "built"),
    [
        pytest.param([H200], {}, [("90", False)], id="visible"),
        pytest.param([H200, AMPERE, H200], {}, [("86", False), ("90", False)], id="two-kinds"),
        pytest.param([OLD, H200], {}, [("90", False)], id="one-too-old"),
        pytest.param([FUTURE], {}, [("100", True)], id="newer-than-nvcc"),
        pytest.param([H200], {"POOLING_EXT_CUDA": "1"}, [("90", False)], id="visible-and-asked"),
        pytest.param(
            [H200], {"TORCH_CUDA_ARCH_LIST": "8.0;8.6+PTX"}, [("80", False), ("86", True)], id="named"
        ),
        pytest.param([], {"TORCH_CUDA_ARCH_LIST": "9.0a"}, [("90a", False)], id="named-without-a-gpu"),
        pytest.param(
            [],
            {"POOLING_EXT_CUDA": "1"},
            [("80", False), ("86", False), ("89", False), ("90", False), ("100", True)],
            id="all",
        ),
    ],
)
def test_compiled_for(machine, gpus, environment, built):
    setup = machine(*gpus, **environment)
    assert setup.cuda_why_not() is None
    assert architectures(setup) == built


@pytest.mark.parametrize(
    ("gpus", "environment", "reason"),
    [
        pytest.param([], {}, "no GPU of compute capability 8.0 or newer is visible", id="no-gpu"),
        pytest.param([OLD], {}, "no GPU of compute capability 8.0 or newer is visible", id="too-old"),
        pytest.param([H200], {"CUDA_VISIBLE_DEVICES": ""}, "no GPU of compute capability", id="hidden"),
        pytest.param([H200], {"POOLING_EXT_CUDA": "0"}, "POOLING_EXT_CUDA=0", id="not-wanted"),
    ],
)
def test_left_out(machine, gpus, environment, reason):
    assert machine(*gpus, **environment).cuda_why_not().startswith(reason)


def test_without_nvcc(machine, monkeypatch):
    setup = machine(H200)
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    assert setup.cuda_why_not() == "there is no nvcc"


def test_the_minimum_is_one():
    """What setup.py builds for is what pip asks for."""
    found = (ROOT / "setup.py").read_text(), (ROOT / "pyproject.toml").read_text()
    major, minor = (int(n) for n in found[0].split("TORCH_TARGET = (")[1].split(")")[0].split(","))
    assert found[1].count(f'"torch>={major}.{minor}"') == 2
    assert f"OLDEST_TORCH ?= {major}.{minor}." in (ROOT / "Makefile").read_text()
