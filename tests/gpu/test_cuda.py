"""The CUDA kernels as such: who takes a call, the order of threads, memory traffic and registers.

What they compute is tested with the other backends: helpers.BACKENDS has them as "cuda".
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import cuda_resources
import pytest
import torch
from helpers import dtype_id, run_python
from torch._subclasses.fake_tensor import FakeTensorMode

import pooling_ext
import pooling_ext.functional as F
from pooling_ext import backends, cli
from pooling_ext.backends import REGISTRY, cuda_library, triton_library
from pooling_ext.testing.cuda_counts import counted, thread_order
from pooling_ext.testing.launches import (
    ACTIVATION_CASES,
    BACKWARD,
    CASES,
    FORWARD,
    PHASES,
    TRAINING,
    LaunchCase,
)

ROOT = Path(__file__).parents[2]
#: The operators whose CUDA kernels are called instead of Triton's.
LEFT_TO_TRITON = sorted(
    op.name
    for op in REGISTRY.operators.values()
    if op.kernels.get("cuda") and op.kernels["cuda"] == op.kernels.get("triton")
)
OURS = [
    case
    for case in CASES + ACTIVATION_CASES
    if case.op in {*LEFT_TO_TRITON, "max_pool2d", "avg_pool2d", "global_avg_pool2d"}
]
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
on_cpu = pytest.mark.skipif(
    not cuda_library.on_cpu(), reason="needs the CUDA kernels as a library for the CPU"
)
formats = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
#: How far above the least possible the traffic of a kernel may be.
MOST = 1.15


# --- who takes a call ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ("9.0",), True),
        ((8, 6), ("8.0",), True),
        ((8, 0), ("8.6",), False),
        ((9, 0), ("8.0",), False),
        ((12, 0), ("9.0+PTX",), True),
        ((8, 9), ("9.0+PTX",), False),
        ((7, 5), (), False),
        ((9, 0), ("9.0a",), True),
        ((12, 0), ("9.0a+PTX",), False),
        ((10, 3), ("10.0f",), True),
        ((12, 0), ("10.0f+PTX",), False),
    ],
)
def test_which_gpus_the_kernels_run_on(capability, built, runs):
    assert cuda_library.runs_on(capability, built) == runs


@on_cpu
@pytest.mark.parametrize("op", LEFT_TO_TRITON)
def test_every_operator_has_its_kernels(op):
    for name in REGISTRY.operators[op].kernels["cuda"]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pooling_ext::{name}", "PrivateUse1"), name


@on_cpu
def test_use_backend_puts_them_in_the_cpus_place_and_back():
    x = torch.randn(1, 2, 8, 8)
    with pooling_ext.use_backend("cuda"):
        assert pooling_ext.explain(F.max_pool2d, x, 2).backend == "cuda"
        with counted() as counts:
            F.max_pool2d(x, 2)
        assert [kernel.launches for kernel in counts] == [1]
    assert pooling_ext.explain(F.max_pool2d, x, 2).backend != "cuda"
    with counted() as counts:
        F.max_pool2d(x, 2)
    assert counts == []


@pytest.fixture
def gpus(monkeypatch):
    """Has CUDA start on GPUs of the capabilities given, where there are said to be kernels for 9.0."""

    def start(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(cuda_library, "on_cpu", lambda: False)
        monkeypatch.setattr(cuda_library, "architectures", lambda: ("9.0",))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        REGISTRY.look_at_gpus()

    yield start
    monkeypatch.undo()
    monkeypatch.setattr(REGISTRY, "_gpus_why_not", None)
    REGISTRY.force(REGISTRY.forced)


def on_a_gpu() -> torch.Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(1, 2, 8, 8, device="cuda:0")


def triton_runs_on_gpus(op: str) -> bool:
    """Whether the dispatcher would give ``op`` to Triton; nothing else is registered here."""
    return all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"pooling_ext::{name}", "CUDA")
        for name in REGISTRY.operators[op].kernels["triton"]
    )


@on_cpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own kernels are registered")
@pytest.mark.parametrize("op", LEFT_TO_TRITON)
@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [
        pytest.param(((9, 0),), "cuda", id="new"),
        pytest.param(((9, 0), (9, 0)), "cuda", id="two"),
        pytest.param(((8, 0),), "triton", id="old"),
        pytest.param(((9, 0), (8, 0)), "triton", id="mixed"),
    ],
)
def test_the_dispatcher_runs_what_is_chosen(gpus, capabilities, chosen, op):
    gpus(*capabilities)
    assert backends.choose(op, on_a_gpu()).name == chosen
    assert triton_runs_on_gpus(op) == (chosen == "triton")
    with pooling_ext.use_backend("triton"):
        assert backends.choose(op, on_a_gpu()).name == "triton" and triton_runs_on_gpus(op)
    with pooling_ext.use_backend("cuda"):
        expected = "cuda" if chosen == "cuda" else "aten"
        assert backends.choose(op, on_a_gpu()).name == expected
        assert triton_runs_on_gpus(op) == (chosen == "triton")


@on_cpu
def test_the_reason_names_the_gpu(gpus):
    gpus((9, 0), (8, 6))
    (decision,) = pooling_ext.explain(backends.choose, "max_pool", on_a_gpu()).decisions
    assert decision.declined["cuda"] == (
        "the CUDA kernels are for 9.0, and GPU 1 has 8.6 (build with TORCH_CUDA_ARCH_LIST=8.6)"
    )


def test_what_a_build_left_out_can_be_asked_for(monkeypatch):
    """``explain`` of a tensor on a GPU says how, and so does ``pooling-ext info``."""
    monkeypatch.setattr(cuda_library, "ON_CPU", None)
    monkeypatch.setattr(cuda_library, "_library", None)
    monkeypatch.setattr(cuda_library, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda_library, "_why_not", None)
    cuda_library._load()
    cuda_library.architectures.cache_clear()
    try:
        (decision,) = pooling_ext.explain(backends.choose, "max_pool", on_a_gpu()).decisions
        rows = dict(cli.info())
    finally:
        cuda_library.architectures.cache_clear()
    for said in (decision.declined["cuda"], rows["backend cuda"], rows["CUDA kernels for"]):
        assert "built without CUDA kernels" in said
        assert "POOLING_EXT_CUDA=1" in said and "TORCH_CUDA_ARCH_LIST" in said


@on_cpu
def test_what_is_faster_in_triton_is_cudas_without_triton(gpus, monkeypatch):
    operator = replace(REGISTRY.operators["avg_pool"], triton_first=True)
    monkeypatch.setitem(REGISTRY.operators, "avg_pool", operator)
    gpus((9, 0))
    assert backends.choose("avg_pool", on_a_gpu()).name == "triton" and triton_runs_on_gpus("avg_pool")
    monkeypatch.setattr(triton_library, "why_not", lambda: "triton is not installed")
    gpus((9, 0))
    assert backends.choose("avg_pool", on_a_gpu()).name == "cuda" and not triton_runs_on_gpus("avg_pool")


ON_AN_OLD_GPU = """
import torch
torch.cuda.device_count = torch.cuda.get_device_capability = None  # not to be asked yet
import pooling_ext
from pooling_ext.backends import cuda_library
assert not torch.cuda.is_initialized()
assert cuda_library.why_not() is None, cuda_library.why_not()
(look,) = [call for call, _ in torch.cuda._queued_calls if call.__module__.startswith("pooling_ext")]
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda index: (2, 0)
look()
x = torch.randn(1, 2, 8, 8)
windows = [4, 4], [2, 2], [2, 2], [0, 0, 0, 0], [1, 1]
pooled = torch.ops.pooling_ext.max_pool.default.redispatch(
    torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), x, *windows
)
assert torch.equal(pooled, torch.nn.functional.max_pool2d(x, 2))
"""


@pytest.mark.skipif(find_spec("pooling_ext._cuda") is None, reason="needs the CUDA kernels for GPUs")
@pytest.mark.skipif(
    not triton_library.interpreted(), reason="needs Triton's interpreter, which takes CPU tensors"
)
def test_kernels_that_cannot_run_give_way_when_cuda_starts():
    """Not before: importing the package must leave CUDA alone."""
    result = run_python(ON_AN_OLD_GPU, POOLING_EXT_CUDA_ON_CPU=None)
    assert result.returncode == 0, result.stderr


def test_their_order():
    assert [backend.name for backend in backends.BACKENDS] == ["cpu", "cuda", "triton", "aten"]


# --- the stand-in, and threads in any order ------------------------------------------------------


@on_cpu
def test_the_stand_in_itself(tmp_path):
    folder = ROOT / "tests" / "cuda_on_cpu"
    sources = [folder / "self_test.cu", *sorted(folder.glob("*.cpp"))]
    program = tmp_path / "self_test"
    compile = ["g++", "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", f"-I{folder}", "-x", "c++"]
    subprocess.run([*compile, "-Wno-unknown-pragmas", *map(str, sources), "-o", str(program)], check=True)
    subprocess.run([str(program)], check=True, timeout=60)


def small(case: LaunchCase, channels: int, size: int) -> LaunchCase:
    shape = (min(case.shape[0], channels), min(case.shape[1], size), min(case.shape[2], size))
    return LaunchCase(case.name, case.op, shape, case.minimum, case.residual, case.kwargs)


@on_cpu
@formats
@pytest.mark.parametrize("case", OURS, ids=str)
def test_results_do_not_depend_on_the_order_of_threads(case, format):
    given = small(case, 72, 20).tensors(3, torch.float32, format, "cpu")
    results = []
    for seed in range(3):
        tensors = {name: tensor.clone() for name, tensor in given.items()}  # running statistics move
        with thread_order(seed), pooling_ext.use_backend("cuda"):
            results.append([case.run(phase, tensors)() for phase in PHASES])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=0, atol=0)


# --- traffic -------------------------------------------------------------------------------------


@pytest.fixture
def zeroed_memory() -> Iterator[None]:
    """Tensors are zeros until they are written, whatever tests before left in their memory."""
    M_PERTURB = -6  # <malloc.h>: fill what is allocated with the inverse of a byte
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(M_PERTURB, 0xFF)
    yield
    mallopt(M_PERTURB, 0)


@on_cpu
@pytest.mark.no_poison
@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("case", OURS, ids=str)
def test_traffic_is_near_the_least_possible(case, dtype, format, zeroed_memory):
    # A few blocks of a large batch. What the others would have written, winners among it, stays zero.
    few, elements = 96, 2**25
    batch = max(8, min(256, elements // math.prod(case.shape)))
    shaped = case.tensors(batch, dtype, format, "meta")
    tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in shaped.items()}
    with pooling_ext.use_backend("cuda"):
        pooled = case.run(FORWARD, shaped)()
        for phase in (TRAINING, BACKWARD):
            with counted(few):
                call = case.run(phase, tensors)
            with counted(few) as counts:
                call()
            least = case.least(phase, tensors, pooled)
            assert sum(sum(kernel.moved) for kernel in counts) <= MOST * least, (phase, counts)


# --- registers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resources() -> list[cuda_resources.Resources]:
    if shutil.which("nvcc") is None or not any(cuda_resources.LOGS.glob("*.log")):
        pytest.skip("needs nvcc, and the kernels built with it")
    measured = cuda_resources.measured()
    if not measured:
        pytest.skip("needs the kernels built for sm_90")
    return measured


def test_no_kernel_spills(resources):
    assert [kernel for kernel in resources if kernel.spills] == []


def test_registers_and_shared_memory_are_those_of_the_table(resources):
    lines = cuda_resources.lines(resources)
    cuda_resources.assert_written(cuda_resources.TABLE, lines, "cuda_resources.py")


def test_shared_memory_fits_every_gpu(resources):
    assert max(kernel.shared for kernel in resources) <= 48 << 10
