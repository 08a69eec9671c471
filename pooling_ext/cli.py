"""The command ``pooling-ext``: what is installed here, and how fast it is."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from . import backends, conv_tuning
from .accelerating import bench
from .backends import cpu_library, cuda_library, triton_library

Rows = list[tuple[str, str]]


def cpu_model() -> str:
    """The CPU's model name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown CPU"


def info() -> Rows:
    """Names and values of what decides how this installation runs."""
    from . import __version__

    native = cpu_library.module
    rows = [
        ("pooling_ext", __version__),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("torch", torch.__version__),
    ]
    if native is None:
        rows.append(("native kernels", f"missing: {cpu_library.why_not}"))
    else:
        built = [f"for torch {getattr(native, 'torch_target', '?')} and later"]
        if hasattr(native, "build_torch"):
            built.append(f"with the headers of {native.build_torch}")
        rows += [
            ("native kernels", str(native.__file__)),
            ("built", ", ".join(built)),
            ("compiler", getattr(native, "compiler", "unknown")),
            ("ISAs compiled", ", ".join(getattr(native, "isas", ())) or "unknown"),
            ("ISA in use", _isa(getattr(native, "isa", "unknown"))),
        ]
    rows += [(f"backend {backend.name}", _availability(backend)) for backend in backends.BACKENDS]
    rows += [
        ("CPU", cpu_model()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
        (
            "CUDA kernels for",
            ", ".join(cuda_library.architectures()) or f"no architecture: {cuda_library.why_not()}",
        ),
        ("CUDA", torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU that torch can use"),
    ]
    return rows


def _isa(name: str) -> str:
    asked = os.environ.get("POOLING_EXT_CPU_ISA")
    return f"{name} (POOLING_EXT_CPU_ISA={asked})" if asked else name


def _availability(backend: backends.Backend) -> str:
    """Whether ``backend`` takes an ordinary call, and if not, why."""
    for_gpus = backend in (backends.CUDA, backends.TRITON)
    device = torch.device("cpu")
    if for_gpus and torch.cuda.is_available():
        torch.cuda.init()  # what GPUs there are is not known before
        device = torch.device("cuda", 0)
    call = backends.Call("max_pool", device, torch.float32, torch.strided, torch.Tensor)
    missing = {backends.CUDA: cuda_library.why_not, backends.TRITON: triton_library.why_not}.get(
        backend, lambda: None
    )()
    reason = missing or backend.why_not(call)
    if for_gpus and reason is not None and reason != missing and device.type == "cpu":
        reason = "there is no GPU that torch can use"
    forced = os.environ.get("POOLING_EXT_BACKEND")
    if reason is None and forced and backend.name not in (forced, "aten"):
        reason = f"POOLING_EXT_BACKEND={forced}"
    return "available" if reason is None else f"not available: {reason}"


def _print_table(title: str, rows: Rows) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"{name:<{width}}  {value}")
        return
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        bad = value.startswith(("missing", "not available"))
        table.add_row(name, Text(value, style="yellow" if bad else ""))
    Console().print(table)


def _suites() -> tuple[str, ...]:
    """Names of the benchmark suites, which only a checkout of the repository has."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        return ()
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from benchmarks.registry import SUITES

    return tuple(SUITES)


def _bench(arguments: Sequence[str]) -> int:
    suites = _suites()
    if arguments and arguments[0] in suites:
        from benchmarks.__main__ import main as benchmarks_main

        return benchmarks_main(arguments)
    parser = argparse.ArgumentParser(
        prog="pooling-ext bench",
        description="Measure a model as it is and accelerated, in training and inference.",
        epilog=f"A suite in MODEL's place is python -m benchmarks SUITE: {', '.join(suites)}."
        if suites
        else None,
    )
    bench.add_arguments(parser)
    return bench.run(arguments, parser.parse_args(arguments), cpu_model())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="pooling-ext", description="Faster pooling for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="versions, compiler, instruction sets, and the backends with reasons")
    commands.add_parser(
        "bench",
        add_help=False,
        help="measure a model of torchvision or timm, or (in a checkout) a suite of python -m benchmarks",
    )
    tune = commands.add_parser("tune", help="measure which convolutions this library should do on this CPU")
    conv_tuning.add_arguments(tune)
    args, rest = parser.parse_known_args(argv)
    if args.command == "bench":
        return _bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "tune":
        return conv_tuning.run(args, cpu_model())
    _print_table("pooling_ext", info())
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
