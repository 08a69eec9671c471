"""The GPU's tests are collected where a machine has little more than PyTorch, Triton and pytest."""

from __future__ import annotations

import re

import pytest
from helpers import run_python

#: What tests use, but a machine with a GPU need not have.
ABSENT = ("expecttest", "hypothesis", "onnx", "onnxruntime", "onnxscript", "openvino", "sklearn")
COLLECT = """
import sys

sys.modules.update(dict.fromkeys({absent}))  # imports of these fail
import pytest

sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "pytest_timeout", "-p", "no:cacheprovider"]))
"""


@pytest.mark.slow
def test_without_other_packages_every_gpu_test_is_collected():
    done = run_python(COLLECT.format(absent=ABSENT), CI=None, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.search(r"^(\d+)/\d+ tests collected", done.stdout, re.MULTILINE)
    assert found and int(found[1]) > 3000
    for file in ("test_gpu.py", "test_conv.py", "test_max_pool.py", "test_batch_norm_act.py"):
        assert f"{file}::" in done.stdout
