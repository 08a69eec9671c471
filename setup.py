"""Builds the native libraries; everything else is in pyproject.toml.

_C has the CPU's kernels (csrc/kernels/cpu/*/*_kernels.cpp, compiled once for each instruction set). Without a
C++ compiler, or with POOLING_EXT_NO_NATIVE=1, the package is installed without it and runs on PyTorch's
operators.

_cuda has the GPU's (csrc/kernels/cuda). It takes nvcc (CUDACXX, CUDA_HOME or PATH) and a PyTorch for CUDA,
and is built for the GPUs that are visible. Where none is, POOLING_EXT_CUDA=1 builds it for ARCHITECTURES, and
makes it an error that it cannot be built; TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") builds it for what it names;
POOLING_EXT_CUDA=0 leaves it out.

CXX names the C++ compiler, POOLING_EXT_CXXFLAGS more flags for it.

`python setup.py cuda_on_cpu [--sanitize]` makes the same sources into a library that runs on the CPU, for
tests.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET = (2, 11)  # the oldest PyTorch that the built library loads in
X86 = platform.machine() in ("x86_64", "AMD64")
# Loops over floats may be vectorized: nothing here looks at the floating-point exception flags
# or errno. No contraction, so that every instruction set computes the same bits; convolutions alone,
# which live on fused multiply-add, are compiled with it and promise the same bits for any number of
# threads, but not on every instruction set.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-trapping-math", "-fno-math-errno"]
# Left out of the warnings: pragmas of other compilers, and that vectors are passed in another way where there
# are wider registers, which no function does that more than one file calls.
FLAGS += ["-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
FLAGS += ["-DPOOLING_EXT_X86"] * X86
# Convolution's kernels are bound by multiplications: a fused one takes the time of either part.
CONTRACTED = ("-ffp-contract=fast",)
# 177: a function of a header that this file does not call.
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-diag-suppress=177"]
#: What POOLING_EXT_CUDA=1 compiles for without a GPU, as far as nvcc knows them; the newest as PTX too, for
#: what comes after it. No older ones have the instructions.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
ISAS = {"baseline": []}
if X86:
    ISAS["avx2"] = ["-march=x86-64-v3"]
    ISAS["avx512"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]


class Object(NamedTuple):
    """Something to compile: the source, its object file's name, the compiler, and flags of its own."""

    source: Path
    name: str
    rule: str = "cxx"
    flags: tuple[str, ...] = ()


def glob(*patterns):
    return [path for pattern in patterns for path in sorted(ROOT.glob(f"csrc/{pattern}"))]


@cache
def quicker():
    """Flags for what only processors without AVX2 run, which halve the time; loops still become vectors."""
    said = subprocess.run([*shlex.split(cxx()), "--version"], capture_output=True, text=True).stdout
    return ["-O2"] if "clang" in said else ["-O2", "-fvect-cost-model=dynamic"]


def cpu_objects():
    """The kernels, which see neither Python nor PyTorch, so that another of those rebuilds only the rest.

    They take the longest by far, so they begin.
    """
    paths = glob(
        "*.cpp", "launchers/*.cpp", "launchers/cpu/*.cpp", "kernels/cpu/*.cpp", "kernels/cpu/*/*.cpp"
    )
    for path in (path for path in paths if path.stem.endswith("_kernels")):
        contract = CONTRACTED if path.parent.name == "conv" else ()
        for isa, flags in ISAS.items():
            if X86 and isa == "baseline":
                flags = quicker()
            own = (f"-DPOOLING_EXT_ISA={isa}", *flags, *contract)
            yield Object(path, f"{path.stem}_{isa}", "kernels", own)
    for path in (path for path in paths if not path.stem.endswith("_kernels")):
        yield Object(path, path.stem)


def cuda_objects(rule="nvcc", define=("-DPOOLING_EXT_CUDA", "-DUSE_CUDA")):
    """The launchers, by the C++ compiler, and the kernels."""
    for path in glob("launchers/*.cpp", "launchers/cuda/*.cpp"):
        yield Object(path, f"cuda_{path.stem}", flags=define)
    for path in glob("kernels/cuda/*/*.cu"):
        yield Object(path, f"cuda_{path.stem}_kernels", rule)


# --- compilers -----------------------------------------------------------------------------------


def cxx():
    return os.environ.get("CXX") or "g++"


def more_flags():
    return shlex.split(os.environ.get("POOLING_EXT_CXXFLAGS", ""))


def asked(name):
    """What the environment says of an option: True, False, or None for nothing."""
    value = os.environ.get(name, "")
    return None if value == "" else value != "0"


def torch_folder():
    return Path(importlib.util.find_spec("torch").origin).parent


def cxx_flags():
    """Flags that come from Python, pybind11 and PyTorch."""
    import pybind11
    import torch

    major, minor = TORCH_TARGET
    flags = []
    # pybind11 first: PyTorch 2.11 has one of its own among its headers, which refuses TORCH_TARGET_VERSION.
    for folder in (pybind11.get_include(), sysconfig.get_paths()["include"], torch_folder() / "include"):
        flags += ["-isystem", str(folder)]
    flags += [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"]
    flags += [
        f'-DPOOLING_EXT_TORCH_TARGET="{major}.{minor}"',
        f'-DPOOLING_EXT_BUILD_TORCH="{torch.__version__}"',
    ]
    return FLAGS + flags + more_flags()


def torch_libraries(*names):
    return [f"-L{torch_folder() / 'lib'}", *(f"-l{name}" for name in ("torch_cpu", *names, "c10"))]


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("CUDACXX"), home and str(Path(home) / "bin" / "nvcc"), "nvcc"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


class Toolkit:
    """The CUDA toolkit of an nvcc, which may be a script elsewhere and lack what PyTorch's packages have."""

    def __init__(self, nvcc):
        self.nvcc = nvcc
        said = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
        )
        tops = re.findall(r"^#\$ TOP=(.*)$", said.stderr, re.MULTILINE)
        top = Path(tops[0].strip()) if tops else Path(nvcc).resolve().parents[1]
        packages = sorted(torch_folder().parent.glob("nvidia/cu*"))
        self.roots = [top, *top.glob("targets/*"), *packages]

    def include_flags(self):
        if any((root / "include" / "cuda_bf16.h").exists() for root in self.roots[:2]):
            return []
        return [
            f"-I{root / 'include'}" for root in self.roots if (root / "include" / "cuda_bf16.h").exists()
        ][:1]

    def runtime(self):
        """What links the CUDA runtime: its own copy, so that PyTorch's need not be the same."""
        for root in self.roots:
            for folder in ("lib64", "lib"):
                if (root / folder / "libcudart_static.a").exists():
                    return [str(root / folder / "libcudart_static.a"), "-ldl", "-lrt", "-lpthread"]
        raise SystemExit(
            f"pooling_ext: libcudart_static.a is in none of {[str(root) for root in self.roots]}"
        )

    def architectures(self):
        """The architectures to compile for, as (number, whether as PTX too)."""
        if named := architectures_named():
            return [(name.removesuffix("+PTX").replace(".", ""), name.endswith("+PTX")) for name in named]
        listed = subprocess.run([self.nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        known = [name.replace(".", "") for name in ARCHITECTURES if f"sm_{name.replace('.', '')}" in listed]
        if not (gpus := visible_gpus()):
            return [(number, number == known[-1]) for number in known]
        own = [f"{major}{minor}" for major, minor in gpus]
        # PTX for one that nvcc does not know yet.
        return list(dict.fromkeys((n, False) if f"sm_{n}" in listed else (known[-1], True) for n in own))

    def flags(self):
        # Architectures are compiled side by side: a file of many kernels would keep the rest waiting.
        flags = [*CUDA_FLAGS, "--threads=4", f"-ccbin={cxx()}", *self.include_flags()]
        for number, ptx in self.architectures():
            flags += [f"-gencode=arch=compute_{number},code=sm_{number}"]
            flags += [f"-gencode=arch=compute_{number},code=compute_{number}"] if ptx else []
        return flags

    def describe(self):
        # "90a" is 9.0a.
        names = [re.sub(r"(\d\D?)$", r".\1", number) + "+PTX" * ptx for number, ptx in self.architectures()]
        return [f'-DPOOLING_EXT_CUDA_ARCHITECTURES="{";".join(names)}"']


def architectures_named():
    return re.findall(r"[^;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))


@cache
def visible_gpus():
    """Compute capabilities of the GPUs that this process may use and that the kernels run on.

    PyTorch tells them, or nvidia-smi where that is one for another driver, as in pip's isolated build.
    """
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    else:
        ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible in ("", "-1") or shutil.which(ask[0]) is None:
            return []
        said = subprocess.run(
            [*ask, *([f"--id={visible}"] if visible else [])], capture_output=True, text=True
        )
        found = [tuple(map(int, pair)) for pair in re.findall(r"^(\d+)\.(\d+)$", said.stdout, re.MULTILINE)]
    least = tuple(map(int, ARCHITECTURES[0].split(".")))
    return sorted({capability for capability in found if capability >= least})


# --- ninja ---------------------------------------------------------------------------------------


def run_ninja(folder, target, objects, rules, libraries):
    """Compile ``objects`` by the commands in ``rules`` and link them; only what has changed."""

    def quote(words):
        return shlex.join(map(str, words)).replace("$", "$$")

    def escape(path):
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    # Relative paths: a copy of the tree, objects and all, has nothing to compile again.
    csrc = os.path.relpath(ROOT / "csrc", folder)
    for rule, command in rules.items():
        compile = f"{quote(command)} -I{csrc} -MD -MF $out.d $own -c $in -o $out"
        if rule == "nvcc":
            compile += " > $out.log 2>&1 || { cat $out.log; false; }"
        lines += [f"rule {rule}", f"  command = {compile}"]
        lines += ["  depfile = $out.d", "  deps = gcc", "  description = compile $out"]
    lines += ["rule link", f"  command = {cxx()} -shared $in {quote(libraries)} -o $out"]
    for source, name, rule, flags in objects:
        lines += [
            f"build {name}.o: {rule} {escape(os.path.relpath(source, folder))}",
            f"  own = {quote(flags)}",
        ]
    linked = " ".join(f"{name}.o" for _, name, _, _ in objects)
    lines += [f"build {escape(target)}: link {linked}", f"default {escape(target)}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)


class NinjaBuild(build_ext):
    """Builds both libraries in build/, which outlives pip's own build folder."""

    def run(self):
        why_not = cuda_why_not()
        if why_not and asked("POOLING_EXT_CUDA"):
            raise SystemExit(f"pooling_ext: POOLING_EXT_CUDA=1, but {why_not}")
        if why_not:
            if asked("POOLING_EXT_CUDA") is None:
                print(
                    f"pooling_ext: built without CUDA kernels, since {why_not}. To have them, set "
                    "POOLING_EXT_CUDA=1, or TORCH_CUDA_ARCH_LIST=9.0 for one architecture"
                )
            self.extensions = [ext for ext in self.extensions if not ext.name.endswith("_cuda")]
            # Of an earlier build, which this one would not match.
            Path(self.get_ext_fullpath("pooling_ext._cuda")).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        if not ext.name.endswith("_cuda"):
            rules = {"kernels": [cxx(), *FLAGS, *more_flags()], "cxx": [cxx(), *cxx_flags()]}
            return run_ninja(ROOT / "build/native", target, list(cpu_objects()), rules, torch_libraries())
        toolkit = Toolkit(find_nvcc())
        rules = {
            "cxx": [cxx(), *cxx_flags(), *toolkit.describe()],
            # Registers and spills of each kernel go to a log beside the object file, for a test to read.
            "nvcc": [toolkit.nvcc, *toolkit.flags(), "-Xptxas=-v"],
        }
        libraries = [*torch_libraries("torch_cuda"), *toolkit.runtime()]
        try:
            run_ninja(ROOT / "build/cuda", target, list(cuda_objects()), rules, libraries)
        except subprocess.CalledProcessError:
            if asked("POOLING_EXT_CUDA"):
                raise
            print("pooling_ext: the CUDA kernels could not be compiled; going on without", file=sys.stderr)


class CudaOnCpu(Command):
    """Builds build/cuda_on_cpu.so, or with --sanitize build/cuda_on_cpu_sanitized.so."""

    user_options = [("sanitize", None, "with AddressSanitizer and UndefinedBehaviorSanitizer")]
    boolean_options = ["sanitize"]

    def initialize_options(self):
        self.sanitize = False

    def finalize_options(self):
        pass

    def run(self):
        stand_in = ROOT / "tests" / "cuda_on_cpu"
        define = ("-DPOOLING_EXT_CUDA", "-DPOOLING_EXT_CUDA_ON_CPU")
        objects = list(cuda_objects("cxx", define))
        objects = [o._replace(flags=define if o.source.suffix == ".cpp" else ("-x", "c++")) for o in objects]
        objects += [Object(path, path.stem) for path in sorted(stand_in.glob("*.cpp"))]
        flags = [flag for flag in cxx_flags() if flag != "-O3"] + ["-O1", f"-I{stand_in}"]
        # Not optimized: then the compiler takes longer than the kernels on their few small cases.
        checks = [
            "-O0",
            "-g1",
            "-fsanitize=address,undefined",
            "-fno-sanitize=null,object-size,vptr",
            "-fno-sanitize-recover=all",
        ]
        sanitizers = checks if self.sanitize else []
        name = "cuda_on_cpu_sanitized" if self.sanitize else "cuda_on_cpu"
        rules = {"cxx": [cxx(), *flags, *sanitizers]}
        target = ROOT / "build" / f"{name}.so"
        run_ninja(ROOT / "build" / name, target, objects, rules, [*torch_libraries(), *sanitizers])


# --- what there is to build ----------------------------------------------------------------------


def extensions():
    if asked("POOLING_EXT_NO_NATIVE"):
        return []
    if shutil.which(cxx().split()[0]) is None:
        print("pooling_ext: no C++ compiler found; installing without native kernels", file=sys.stderr)
        return []
    # What is not to be built after all is left out when it would be.
    return [
        Extension("pooling_ext._C", sources=[]),
        Extension("pooling_ext._cuda", sources=[], optional=True),
    ]


def cuda_why_not():
    """Why the CUDA kernels are not built, or None where they are."""
    if asked("POOLING_EXT_CUDA") is False:
        return "POOLING_EXT_CUDA=0"
    if find_nvcc() is None:
        return "there is no nvcc"
    if not (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "PyTorch was built without CUDA"
    if not asked("POOLING_EXT_CUDA") and not architectures_named() and not visible_gpus():
        return f"no GPU of compute capability {ARCHITECTURES[0]} or newer is visible"
    return None


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild, "cuda_on_cpu": CudaOnCpu})
