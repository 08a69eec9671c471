"""An operator of one's own takes files of its own, and no line in a file that is there."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import run_python

ROOT = Path(__file__).parents[2]

#: As pooling_ext/ops/median_pool.py would be; the kernels are Python functions here.
OPERATOR = """
import torch
from pooling_ext import backends
from pooling_ext.ops import _library
from pooling_ext.ops._torch_function import public
from pooling_ext.windows import fixed_windows

SINGLE = frozenset((torch.float32,))
backends.register(
    "median_pool", cpu=SINGLE | {torch.float64}, cuda=SINGLE, triton=SINGLE, triton_module="median_triton"
)
_forward = _library.define(
    "median_pool(Tensor input, {windows})",
    "Tensor",
    lambda input, output_size, *_: _library.empty(input, output_size),
)
calls = []


def medians(name, input, output_size, kernel_size, stride, padding, dilation):
    calls.append(name)
    stride = stride or kernel_size
    patches = input.unfold(2, kernel_size[0], stride[0]).unfold(3, kernel_size[1], stride[1])
    return patches.flatten(4).median(-1).values


_library.library.impl("median_pool", lambda *args: medians("cpu", *args), "CPU")


@public
def median_pool2d(input, kernel_size):
    windows = fixed_windows(2, input.shape, kernel_size, None, 0, 1, False)
    if backends.choose("median_pool", input) is backends.ATEN:
        return medians("aten", input, *windows)
    return _forward(input, *windows)
"""

#: As pooling_ext/triton/pool/median_pool.py would be.
TRITON = """
import median_pool as op


def median_pool(*args):
    return op.medians("triton", *args)
"""

#: As pooling_ext/testing/specs/median_pool.py would be.
SPEC = """
import torch
import median_pool as op
from pooling_ext.testing.opspec import OpSpec, levels

WINDOWS = (1, 1), (2, 2), (2, 2), (0,) * 4, (1, 1)
CALL = "median_pool", torch.ops.pooling_ext.median_pool, (torch.rand(1, 2, 2, 3), *WINDOWS)
SPECS = (
    OpSpec(
        "median_pool2d",
        op.median_pool2d,
        lambda input, kernel_size: op.medians("reference", input, None, (kernel_size,) * 2, (), None, None),
        lambda shape, dtype: {"input": levels(shape, dtype)},
        wide=(2, 37, 5, 38),
        small=(2, 2, 5, 4),
        options={"2": {"kernel_size": 2}, "3": {"kernel_size": 3}},
        dtypes=(torch.float32, torch.float64),
        exact=True,
        keeps_format=False,
        low_level=lambda: [CALL],
    ),
)
"""

USE = """
import sys
import pytest
import torch
import pooling_ext
from pooling_ext import backends
from pooling_ext.testing import checks
from pooling_ext.testing.opspec import LAYOUTS, cases

sys.path.insert(0, FOLDER)
import median_pool as op
from median_spec import SPECS

x = torch.randn(1, 2, 6, 6)
torch.set_grad_enabled(False)  # it has no derivative
for case in cases(SPECS):
    for name in ("cpu", "triton", "aten"):
        op.calls.clear()
        with pooling_ext.use_backend(name):
            assert pooling_ext.explain(op.median_pool2d, x, 3).backend == name
            for layout in LAYOUTS:
                checks.check_values(case, case.tensors(case.spec.wide, torch.float32, layout))
        assert set(op.calls) == {name, "reference"}, op.calls
    small = case.tensors(case.spec.small, torch.float64)
    one_by_one = torch.stack([case.ours(input=x) for x in (small["input"], -small["input"])])
    both = torch.stack([small["input"], -small["input"]])
    assert torch.equal(torch.vmap(lambda x: case.ours(input=x))(both), one_by_one)
    checks.check_compiled(case, [case.spec.small])
    checks.check_fake(case, small)
for call in SPECS[0].low_level():
    checks.check_low_level(call)
assert pooling_ext.explain(op.median_pool2d, x.double(), 3).backend == "cpu"
explained = pooling_ext.explain(op.median_pool2d, x.half(), 3)
assert explained.backend == "aten" and "median_pool has no CPU kernel for torch.float16" in str(explained)
assert torch._C._dispatch_has_kernel_for_dispatch_key("pooling_ext::median_pool", "CUDA")
with pytest.raises(pooling_ext.ArgumentError, match="'median_pool' is registered"):
    backends.register("median_pool")
"""


@pytest.mark.native
def test_an_operator_registers_itself(tmp_path):
    """Beside its definition: then every backend that it names takes it; what falls back has a reason."""
    (tmp_path / "median_pool.py").write_text(OPERATOR)
    (tmp_path / "median_triton.py").write_text(TRITON)
    (tmp_path / "median_spec.py").write_text(SPEC)
    result = run_python(USE.replace("FOLDER", repr(str(tmp_path))), TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


#: As csrc/kernels/cpu/pool/toy.h, toy_kernels.cpp and a launcher would be.
HEADER = """
#include "kernels/cpu/dispatch.h"
namespace pooling_ext {
using ToyKernel = const char* (*)(int times);
POOLING_EXT_KERNELS(toy, ToyKernel(DType))
}
"""
KERNELS = """
#include "toy.h"
#define NAME(isa) #isa
#define NAME_OF(isa) NAME(isa)
namespace pooling_ext::POOLING_EXT_ISA {
ToyKernel toy(DType dtype) {
    return for_float(dtype, [](auto) -> ToyKernel { return [](int) { return NAME_OF(POOLING_EXT_ISA); }; });
}
}
"""
LAUNCHER = """
#include <cstdio>
#include "kernels/cpu/isa.h"
#include "toy.h"
int main() {
    using namespace pooling_ext;
    if (kernels::toy(DType::Int8) != nullptr) return 1;
    std::printf("%s %s", kernels::toy(DType::Float32)(1), chosen_isa().c_str());
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_are_found_for_each_instruction_set(tmp_path):
    """What an operator adds to csrc is files of its own: the linker finds its kernels."""
    for name, text in (("toy.h", HEADER), ("toy_kernels.cpp", KERNELS), ("main.cpp", LAUNCHER)):
        (tmp_path / name).write_text(text)
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = ["-std=c++20", f"-I{ROOT / 'csrc'}", f"-I{tmp_path}", *(["-DPOOLING_EXT_X86"] if x86 else [])]
    objects = []
    for isa in ("baseline", "avx2", "avx512") if x86 else ("baseline",):
        objects.append(str(tmp_path / f"{isa}.o"))
        own = [f"-DPOOLING_EXT_ISA={isa}", "-c", str(tmp_path / "toy_kernels.cpp"), "-o", objects[-1]]
        subprocess.run(["g++", *flags, *own], check=True)
    isa = str(ROOT / "csrc" / "kernels" / "cpu" / "isa.cpp")
    program = str(tmp_path / "program")
    subprocess.run(["g++", *flags, str(tmp_path / "main.cpp"), isa, *objects, "-o", program], check=True)
    for environment in ({}, {"POOLING_EXT_CPU_ISA": "baseline"}):
        done = subprocess.run([program], env=environment, capture_output=True, text=True, check=True)
        found, chosen = done.stdout.split()
        assert found == chosen == environment.get("POOLING_EXT_CPU_ISA", chosen)
