"""Fixtures and settings that hold for the whole suite."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# What was measured on this machine decides nothing in tests.
os.environ["POOLING_EXT_CONV_SPEEDS"] = os.devnull + "/none"

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported
    # The CUDA kernels as a library for the CPU, which `make test` builds.
    if (stand_in := Path(__file__).parents[1] / "build" / "cuda_on_cpu.so").exists():
        os.environ.setdefault("POOLING_EXT_CUDA_ON_CPU", str(stand_in))

with warnings.catch_warnings():
    # Without the native kernels the import warns; test_backends.py checks that it does.
    warnings.simplefilter("ignore")
    from helpers import require_native
    from xdist_locks import WORKER, Sharing

    import pooling_ext
    from pooling_ext.backends import cpu_library, cuda_library, triton_library
    from pooling_ext.ops import conv_choice, conv_speeds
    from pooling_ext.ops.conv_bn_act.implementations import from_size

pytest_plugins = ["quick", "packages", "triton_interpreter"]
# The examples end a process that lacks their packages.
_demo = ("torchvision", "sklearn", "matplotlib", "rich", "PIL")
if not os.environ.get("CI") and any(find_spec(name) is None for name in _demo):
    collect_ignore = ["examples"]

if find_spec("hypothesis") is not None:  # a machine with a GPU may be without; its tests need none
    from hypothesis import HealthCheck, settings

    _slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    settings.register_profile("default", deadline=None, max_examples=60, suppress_health_check=_slow_is_fine)
    settings.register_profile("ci", settings.get_profile("default"), derandomize=True, database=None)
    settings.register_profile("thorough", settings.get_profile("default"), max_examples=2000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "native: needs the compiled kernels; fails without them unless POOLING_EXT_NO_NATIVE is set",
    )
    config.addinivalue_line("markers", "gpu: needs a GPU that torch can use; skipped without")
    config.addinivalue_line(
        "markers", "no_poison: leaves uninitialized memory and torch's determinism settings alone"
    )
    if WORKER:
        config.pluginmanager.register(Sharing(Path(config.option.basetemp).parent))


def pytest_report_header(config: pytest.Config) -> str:
    state = "loaded" if cpu_library.module is not None else f"absent ({cpu_library.why_not})"
    return f"pooling_ext {pooling_ext.__version__}, torch {torch.__version__}, compiled kernels: {state}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("native"):
        require_native()
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fuse_at_any_size() -> Iterator[None]:
    """Patched models leave small inputs to PyTorch; tests' inputs are small."""
    with from_size(0):
        yield


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """Runs the test on the backend that its parameter names (helpers.BACKENDS).

    A GPU's backend has the GPU as torch's default device, so that a test makes its tensors there.
    """
    name, _, device = request.param.partition("-")
    if name == "default":
        yield name
        return
    if name == "cpu":
        require_native()
    if name == "cuda" and cuda_library.why_not() is not None:
        pytest.skip(f"needs the CUDA kernels: {cuda_library.why_not()}")
    if name == "cuda" and cuda_library.on_cpu() == (device == "cuda"):
        pytest.skip("the CUDA kernels are those of a GPU, or stand in for it, in the whole process")
    if name == "triton":
        pytest.importorskip("triton")
    if name == "triton" and triton_library.interpreted() == (device == "cuda"):
        pytest.skip("Triton interprets kernels, or compiles them, in the whole process")
    with torch.device(device or "cpu"), pooling_ext.use_backend(name):
        yield name


@pytest.fixture
def convolutions_of_any_size(monkeypatch):
    """The CPU's kernels of convolutions do what they can, though PyTorch's may be faster."""
    monkeypatch.setattr(conv_speeds, "speedup", lambda *_: (10.0, True))
    monkeypatch.setattr(conv_choice, "LEAST_WORK", 0)
    monkeypatch.setattr(conv_choice, "HAS_AMX", False)


@pytest.fixture
def allow_tf32():
    """Sets whether convolutions may use TF32; they may not."""

    def allow(value: bool) -> None:
        # What the flag's setter calls; some of PyTorch's own testing modules forbid the flag to be set.
        torch._C._set_cudnn_allow_tf32(value)

    before = torch.backends.cudnn.allow_tf32
    allow(False)
    yield allow
    allow(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile knows of no earlier test, and no later one of this."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def one_thread():
    """For thousands of tiny calls: waking threads whose cores other processes use takes longest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest):
    """Fill fresh memory with NaN (the largest value for integers), so that an output nobody wrote shows.

    The same setting makes PyTorch refuse any backward that is not deterministic. On a GPU it only warns,
    since some of PyTorch's own operators, which results are compared with, are not; test_gpu.py is strict.
    """
    if request.node.get_closest_marker("no_poison"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    on_gpu = request.node.get_closest_marker("gpu") is not None
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before, warn_only=warned)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(params=["together", "one by one"])
def any_way(request):
    with from_size(0 if request.param == "together" else 1 << 40):
        yield


@pytest.fixture
def no_eager_norm(monkeypatch):
    """Functions of PyTorch that a forward without us calls fail."""
    for name in ("batch_norm", "relu"):
        monkeypatch.setattr(
            torch.nn.functional, name, lambda *_, name=name, **__: pytest.fail(f"called {name}")
        )
