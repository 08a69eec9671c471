"""Builds the native extension; everything else is in pyproject.toml.

The kernels (csrc/cpu/*_kernels.cpp) are compiled once for each instruction set, the rest once.
Without a C++ compiler, or with POOLING_EXT_NO_NATIVE=1, the package is installed without its native part and
runs on PyTorch's operators.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET = (2, 10)  # the oldest PyTorch that the built library loads in
X86 = platform.machine() in ("x86_64", "AMD64")
# Loops over floats may be vectorised: nothing here looks at the floating-point exception flags
# or errno. No contraction, so that every instruction set computes the same bits.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-trapping-math", "-fno-math-errno"]
FLAGS += ["-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
ISAS = {"baseline": []}
if X86:
    ISAS["avx2"] = ["-march=x86-64-v3"]
    ISAS["avx512"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]


def sources():
    """(source, flags of its own, name of its object file) for everything that is compiled."""
    for path in sorted(ROOT.glob("csrc/*.cpp")) + sorted(ROOT.glob("csrc/cpu/*.cpp")):
        if not path.stem.endswith("_kernels"):
            yield path, [], path.stem
            continue
        for isa, flags in ISAS.items():
            yield path, [f"-DPOOLING_EXT_ISA={isa}", *flags], f"{path.stem}_{isa}"


def settings():
    """Compiler flags and linker flags that come from Python, pybind11 and PyTorch."""
    import pybind11
    import torch

    torch_dir = Path(torch.__file__).parent
    major, minor = TORCH_TARGET
    flags = [f"-I{ROOT / 'csrc'}"]
    for folder in (torch_dir / "include", pybind11.get_include(), sysconfig.get_paths()["include"]):
        flags += ["-isystem", str(folder)]
    flags += [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"]
    flags += [
        f'-DPOOLING_EXT_TORCH_TARGET="{major}.{minor}"',
        f'-DPOOLING_EXT_BUILD_TORCH="{torch.__version__}"',
    ]
    if X86:
        flags += ["-DPOOLING_EXT_X86"]
    return flags, [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]


class NinjaBuild(build_ext):
    """Compiles through ninja: in parallel, and only what has changed."""

    def build_extension(self, ext):
        compiler = os.environ.get("CXX") or "g++"
        flags, libraries = settings()
        build = ROOT / "build" / "native"  # pip's own build folder is new every time
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        def quote(words):
            return shlex.join(map(str, words)).replace("$", "$$")

        def escape(path):
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        compile = f"{compiler} -MMD -MF $out.d {quote(FLAGS + flags)} $own -c $in -o $out"
        lines = ["rule compile", f"  command = {compile}"]
        lines += ["  depfile = $out.d", "  deps = gcc", "  description = compile $out"]
        lines += ["rule link", f"  command = {compiler} -shared $in {quote(libraries)} -o $out"]
        objects = []
        for path, own, name in sources():
            lines += [f"build {name}.o: compile {escape(path)}", f"  own = {quote(own)}"]
            objects.append(f"{name}.o")
        lines += [f"build {escape(target)}: link {' '.join(objects)}", f"default {escape(target)}"]
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build)], check=True)


def native_wanted():
    if os.environ.get("POOLING_EXT_NO_NATIVE", "0") not in ("", "0"):
        return False
    if shutil.which((os.environ.get("CXX") or "g++").split()[0]) is None:
        print("pooling_ext: no C++ compiler found; installing without native kernels", file=sys.stderr)
        return False
    return True


setup(
    ext_modules=[Extension("pooling_ext._C", sources=[])] if native_wanted() else [],
    cmdclass={"build_ext": NinjaBuild},
)
