"""The GPU's tests are collected where a machine has little more than PyTorch, Triton and pytest."""

from __future__ import annotations

import re

import pytest
from helpers import run_python

#: A process of the tests' own is no worker of theirs.
ALONE = {"PYTEST_XDIST_WORKER": None, "PYTEST_XDIST_WORKER_COUNT": None, "PYTEST_XDIST_TESTRUNUID": None}
#: What tests use, but a machine with a GPU need not have.
ABSENT = ("expecttest", "rich", "hypothesis", "onnx", "onnxruntime", "onnxscript", "openvino", "sklearn")
COLLECT = """
import sys

sys.modules.update(dict.fromkeys({absent}))  # imports of these fail
import pytest

sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "pytest_timeout", "-p", "no:cacheprovider"]))
"""


WARNS = """
import sys
import torch

torch.cuda.is_available = lambda: True
sys.path[:0] = ["tests", "tests/common"]
import pytest

options = ["-q", "-p", "no:cacheprovider", "-p", "conftest", "--rootdir", {folder!r}, "-c", {ini!r}]
sys.exit(pytest.main([*options, {folder!r}]))
"""
STRICT = """
import pytest, torch

@pytest.mark.gpu
def test_on_a_gpu():
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()

def test_on_the_cpu():
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
"""


def test_on_a_gpu_pytorchs_own_operators_may_be_indeterminate(tmp_path):
    """Some of those that results are compared with have no deterministic backward there, and would raise."""
    (tmp_path / "test_strict.py").write_text(STRICT)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = run_python(WARNS.format(folder=str(tmp_path), ini=str(tmp_path / "pytest.ini")), **ALONE)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_without_other_packages_every_gpu_test_is_collected():
    done = run_python(COLLECT.format(absent=ABSENT), CI=None, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", **ALONE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.search(r"^(\d+)/\d+ tests collected", done.stdout, re.MULTILINE)
    assert found and int(found[1]) > 3000
    for file in ("test_gpu.py", "test_conv.py", "test_max_pool.py", "test_batch_norm_act.py"):
        assert f"{file}::" in done.stdout
