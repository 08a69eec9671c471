"""The steps of both runs, in the order of what is most worth knowing. Nothing here imports PyTorch."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from .runner import Step, python

#: Seconds that each run may take, its processes' starts included.
FIRST, SECOND = 330.0, 270.0
#: Processes that compile, or test, at a time.
PROCESSES = 14

FORMATS = ("NHWC", "NCHW")
OPERATORS = (
    "max-3x3-s2", "stem", "bn-relu-64-112", "bn-add-relu-256-56", "max-2x2-s2", "max-3x3-s1", "avg-3x3-s2",
    "avg-2x2-s2", "global-avg", "tail", "bn-relu-64-56", "bn-relu-128-28", "bn-relu-256-14", "bn-relu-512-7",
    "bn-add-relu-512-28", "bn-add-relu-1024-14", "bn-add-relu-2048-7",
)  # fmt: skip
ACTIVATIONS = ("bn-silu-256-14", "bn-gelu-256-14", "bn-add-hardswish-512-28", "bn-add-leaky_relu-512-28")
CONVOLUTIONS = (
    "conv-1x1-64-256-56", "conv-1x1-256-64-56", "conv-1x1-1024-512-14", "conv-1x1-256-512-56-s2",
    "conv-3x3-64-56", "conv-3x3-128-56-s2", "conv-3x3-512-7",
)  # fmt: skip
#: Those of a dry run, which Triton's interpreter takes a while for.
TINY = ("max-3x3-s2", "tail")
#: What a profiler watches.
WATCHED = ("max-3x3-s2", "stem", "bn-relu-64-112")
#: ResNet-50's: channels, features, side of the window, stride and of the input.
RESNET50 = (
    "3 64 7 2 224", "64 64 1 1 56", "64 64 3 1 56", "64 256 1 1 56", "256 64 1 1 56", "256 128 1 1 56",
    "128 128 3 2 56", "128 512 1 1 28", "256 512 1 2 56", "512 128 1 1 28", "128 128 3 1 28",
    "512 256 1 1 28", "256 256 3 2 28", "256 1024 1 1 14", "512 1024 1 2 28", "1024 256 1 1 14",
    "256 256 3 1 14", "1024 512 1 1 14", "512 512 3 2 14", "512 2048 1 1 7", "1024 2048 1 2 14",
    "2048 512 1 1 7", "512 512 3 1 7",
)  # fmt: skip
MODELS = (
    "training 256", "training 32", "inference 256", "inference 32", "training 256 untuned",
    "training 32 untuned",
    "training 256 compiled", "inference 256 compiled", "training 32 compiled", "inference 32 compiled",
)  # fmt: skip


def worker(part: str, device: str, tiny: bool) -> tuple[str, ...]:
    options = ("--device", device, *(["--tiny"] if tiny else []))
    return python("-m", "benchmarks.gpu_run.worker", *options, part)


def build(seconds: float, keep: Path | None, libraries: Path | None, device: str) -> Step:
    options = ["--libraries", str(libraries)] if libraries else []
    options += ["--keep", str(keep)] if keep else []
    options += ["--as-it-is"] if device == "cpu" else []
    command = python("-m", "benchmarks.gpu_run.build", *options)
    # Without it the build would go on without the kernels that are to be seen.
    return Step("build", seconds, command, environment={"POOLING_EXT_CUDA": "1"})


def tests(name: str, seconds: float, folder: Path, chosen: str, device: str) -> Step:
    """pytest, of what is marked ``gpu``; a dry run takes a few tests of the stand-in."""
    options = ["-m", "gpu and not large", "-n", str(PROCESSES), "--dist", "worksteal", "tests"]
    if device == "cpu":
        chosen = chosen.replace("triton-cuda", "triton")
        options = ["-n", "0", "--quick", "tests/ops/test_global_pool.py"]
    command = python(
        "-m", "pytest", "-q", "-p", "benchmarks.gpu_run.pytest_lines", "-p", "no:cacheprovider", "-k", chosen,
        "--timeout", "60", "--maxfail", "400", "-o", "junit_logging=no",
        f"--junitxml={folder / f'junit-{name}.xml'}", *options,
    )  # fmt: skip
    return Step(f"tests-{name}", seconds, command)


def first(
    folder: Path, device: str = "cuda", tiny: bool = False, libraries: Path | None = None
) -> list[Step]:
    """Does it build, run and give right results, and how fast are the operators?"""
    formats = FORMATS[:1] if tiny else FORMATS
    operators, dtypes = (TINY, ("bfloat16",)) if tiny else (OPERATORS + ACTIVATIONS, ("bfloat16", "float32"))
    smoke = [f"{name} {dtype} {layout}" for name, dtype, layout in
             product(operators, dtypes, formats)]  # fmt: skip
    smoke += [f"{name} bfloat16" for name in CONVOLUTIONS[: 1 if tiny else None]]
    timed = tuple(
        f"{name} bfloat16 {layout}" for layout, name in product(formats, TINY if tiny else OPERATORS)
    )

    def part(name: str, seconds: float, what: str, items: tuple[str, ...], lanes: int = 1) -> Step:
        return Step(name, seconds, worker(what, device, tiny), items, item_seconds=25, lanes=lanes)

    lanes = 2 if tiny else PROCESSES
    return [
        build(112, folder, libraries, device),
        part("facts", 10, "facts", ("machine",)),
        part("smoke-cuda", 28, "smoke:cuda", tuple(smoke)),
        part("operators-cuda", 40, "operators:cuda", timed),
        part("smoke-triton", 40, "smoke:triton", tuple(smoke), lanes),
        tests("cuda", 60, folder, "not triton-cuda", device),
        part("operators-triton", 35, "operators:triton", timed),
        # With what is left.
        tests("triton", 0, folder, "triton-cuda", device),
    ]


def second(
    folder: Path, device: str = "cuda", tiny: bool = False, libraries: Path | None = None
) -> list[Step]:
    """How fast is ResNet-50, and what do the kernels do with the card?"""
    few = 1 if tiny else None
    remembered = {"POOLING_EXT_TUNING_FILE": str(folder.resolve() / "tuning.json")}
    profiled = [f"{name} bfloat16 NHWC" for name in WATCHED[:few]]
    kernels = (*worker("kernels:cuda", device, tiny), *profiled)
    models = (MODELS[0], MODELS[2], MODELS[4]) if tiny else MODELS

    def part(name: str, seconds: float, what: str, items: tuple[str, ...], lanes: int = 1) -> Step:
        return Step(name, seconds, worker(what, device, tiny), items, 60, lanes, environment=remembered)

    smoke = python("tests/gpu/gpu_smoke.py", *(["--on-cpu"] if device == "cpu" else ["--backends", "cuda"]))
    return [
        build(75, None, libraries, device),
        part("facts", 8, "facts", ("machine",)),
        # Triton keeps what it compiled, so that tuning has only to measure.
        part("compile", 35, "compile", RESNET50[:few], lanes=1 if tiny else PROCESSES),
        part("models", 88, "models", models),
        part("convolutions", 16, "convolutions", CONVOLUTIONS[:few]),
        part("frontend", 8, "frontend", ("bfloat16", "float16")),
        Step(
            "ncu",
            18,
            ("ncu", "--clock-control", "none", "--set", "basic", "--csv", "--log-file",
             str(folder / "ncu.csv"), *kernels),
            program="ncu",
        ),
        Step(
            "memcheck",
            16,
            ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *smoke),
            program="compute-sanitizer",
            # Else an access into another tensor of PyTorch's cached memory looks right.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
    ]  # fmt: skip


RUNS = {"first": (FIRST, first), "second": (SECOND, second)}
