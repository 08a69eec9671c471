"""The suite "gpu": operators and ResNet-50 on a GPU, against eager PyTorch and torch.compile."""

from __future__ import annotations

import argparse
import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import pooling_ext
from pooling_ext import backends
from pooling_ext.backends import explain, use_backend
from pooling_ext.testing.launches import BACKWARD, CASES, FORWARD, TRAINING, LaunchCase

from . import machine, suite
from .model_training import Trainer
from .report import Grid, milliseconds, ratio
from .suite import DTYPES, LAYOUTS, ROOT
from .timing import Timing, copy_rate, measure

HELP = "operators and ResNet-50 on a GPU, against eager PyTorch, torch.compile and a copy"

EAGER, COMPILED, AUTOTUNED = "eager", "torch.compile", "max-autotune"
PATCHED, FROZEN = "patched", "frozen"
#: Our backends, those of them that take a call.
OURS = ("cuda", "triton")
STEP = "forward + backward"
#: Seconds for each rival of one measurement.
BUDGET, QUICK_BUDGET = 0.4, 0.05
#: Calls run on after they return, so a sample is long enough (seconds) for waiting at its end not to count.
SHORTEST = 5e-3
#: Images on which results are compared with eager's in float64, and the largest error relative to the result.
CHECKED, ALLOWED = 4, {"float32": 1e-4, "bfloat16": 2e-2}
#: The models' largest error relative to eager's own.
SLACK = 5
#: The copy that gives the card's bandwidth reads and writes this many bytes each.
_LARGE_COPY = 2**30


@dataclass(frozen=True)
class Entry:
    """One rival's time.

    Attributes:
        what: the case and phase, or the model and task.
        least: bytes that must be moved; None for models.
        compile_s: seconds of the first call of a rival that compiles itself.
    """

    what: str
    dtype: str
    layout: str
    batch: int
    rival: str
    ms: float
    spread: float
    least: int | None = None
    compile_s: float | None = None


@dataclass
class Run:
    facts: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)

    def groups(self) -> Iterator[dict[str, Entry]]:
        """The rivals of each measurement, by name."""
        found: dict[tuple, dict[str, Entry]] = {}
        for entry in self.entries:
            key = entry.what, entry.dtype, entry.layout, entry.batch
            found.setdefault(key, {})[entry.rival] = entry
        return iter(found.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(error=parser.error)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, and no max-autotune")
    parser.add_argument("--cases", metavar="GLOB", action="append", help="only these operators and models")
    parser.add_argument("--batch", type=int, default=256, help="batch size of operators and training")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["NHWC"])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write; default: benchmarks/results/<GPU>"
    )
    parser.set_defaults(threads=None)


def run(args: argparse.Namespace, device: str = "cuda") -> int:
    """Measure, print, write; 1 if something of ours gave a wrong result, 2 without a GPU."""
    console = suite.make_console()
    named = [_Named(case.name) for case in CASES] + [_Named(name) for name in MODELS]
    chosen = {case.name for case in suite.choose(named, ["*"], args)}
    if args.list:
        for case in named:
            console.print(case.name, highlight=False)
        return 0
    if device == "cuda" and not torch.cuda.is_available():
        console.print("[red]There is no GPU that PyTorch can use, so nothing is measured.[/]")
        return 2
    if device == "cuda":
        torch.backends.cudnn.benchmark = True  # eager at its best
    start = perf_counter()
    with torch.device(device):
        found = Run(_facts(device))
        folder = args.out or ROOT / "benchmarks" / "results" / found.facts["machine"]
        folder.mkdir(parents=True, exist_ok=True)
        for what, part in _parts(found, chosen, args, device):
            _try(found, what, console, part)
            # At once, so that what comes next can end the process and nothing measured is lost.
            found.facts["seconds"] = round(perf_counter() - start)
            _write(found, folder)
    for grid in (_operators(found), _models(found)):
        if grid.rows:
            console.print(grid.rich())
    for label, why in found.wrong.items():
        console.print(f"[red]WRONG, not timed:[/] {label}: {why}", highlight=False)
    console.print(f"wrote {folder}/gpu.json, gpu.md", highlight=False)
    return 1 if found.wrong else 0


def _parts(
    found: Run, chosen: set[str], args: argparse.Namespace, device: str
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What there is to measure: a name for each part and what measures it."""
    for case in CASES:
        for dtype in args.dtypes if case.name in chosen else ():
            for layout in args.layouts:
                yield (
                    f"{case.name} {dtype} {layout}",
                    partial(_operator, found, case, dtype, layout, args, device),
                )
    for name, part in MODELS.items():
        if name in chosen:
            yield name, partial(part, found, name, args, device)


def _write(found: Run, folder: Path) -> None:
    data = {**found.facts, "wrong": found.wrong, "entries": [asdict(entry) for entry in found.entries]}
    (folder / "gpu.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(found))


@dataclass(frozen=True)
class _Named:
    name: str


def _facts(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else machine.slug()
    return {
        "machine": "-".join(re.findall(r"[a-z0-9]+", name.lower())),
        "gpu": name,
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "pooling_ext": pooling_ext.__version__,
        "date": machine.facts()["date"],
        "copy_gb_s": copy_rate(2 * _LARGE_COPY if device == "cuda" else 2**24),
    }


def _try(found: Run, what: str, console: Console, part: Callable[[], None]) -> None:
    """Measure one part; what is wrong, or fails in whatever way, does not end the others."""
    console.print(what, style="dim", highlight=False)
    try:
        part()
    except Exception as error:  # Triton's compiler has errors of its own
        found.wrong[what] = f"{type(error).__name__}: {str(error)[:300]}"


# --- operators -----------------------------------------------------------------------------------


def _theirs(case: LaunchCase) -> Callable[..., Tensor]:
    """What a PyTorch user writes for ``case``: a function of its tensors and ``kwargs_of``."""

    def batch_norm(
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None = None,
        training: bool = False,
    ) -> Tensor:
        output = F.batch_norm(input, running_mean, running_var, weight, bias, training)
        return F.relu_(output if residual is None else output.add_(residual))

    def add_relu_pool(input: Tensor, residual: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(F.relu_(input + residual), 1)

    return {
        "batch_norm_act": batch_norm,
        "batch_norm_relu_max_pool": lambda **kwargs: F.max_pool2d(batch_norm(**kwargs), 3, 2, 1),
        "add_relu_global_avg_pool": add_relu_pool,
        "global_avg_pool2d": lambda input: F.adaptive_avg_pool2d(input, 1),
    }.get(case.op) or getattr(F, case.op)


def _operator(
    found: Run, case: LaunchCase, dtype: str, layout: str, args: argparse.Namespace, device: str
) -> None:
    make = partial(case.tensors, dtype=DTYPES[dtype], format=LAYOUTS[layout], device=device)
    ours = [name for name in OURS if _takes(case, name, make(2))]
    if not ours:
        raise RuntimeError(f"no backend of ours takes {case} in {dtype} on {device}")
    tensors = make(CHECKED)
    for backend in ours:
        with use_backend(backend):
            _check(case, tensors, ALLOWED[dtype])
    _time_operator(found, case, make(args.batch), ours, dtype, layout, args)


def _takes(case: LaunchCase, backend: str, tensors: dict[str, Tensor]) -> bool:
    if backend not in [known.name for known in backends.BACKENDS]:
        return False
    with use_backend(backend):
        found = explain(case.run(FORWARD, tensors))
    return {decision.backend for decision in found.decisions} == {backend}


def _step(call: Callable[..., Tensor], tensors: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, ...]:
    """The output in training and the gradients of what has them."""
    leaves = {
        name: tensor.detach().requires_grad_(not name.startswith("running_"))
        for name, tensor in tensors.items()
    }
    output = call(**leaves, **kwargs)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    return output.detach(), *torch.autograd.grad(output, wanted, torch.ones_like(output))


def _check(case: LaunchCase, tensors: dict[str, Tensor], allowed: float) -> None:
    kwargs = case.kwargs_of(TRAINING)
    ours = _step(case.function, tensors, **kwargs)
    exact = _step(_theirs(case), {name: x.double() for name, x in tensors.items()}, **kwargs)
    for name, mine, right in zip(("output", *tensors), ours, exact, strict=False):
        off = float((mine.double() - right).norm() / right.norm().clamp_min(1e-30))
        if not off <= allowed:
            raise AssertionError(f"{case}: {name} is off by {off:.2g} of its size")


def _time_operator(
    found: Run,
    case: LaunchCase,
    tensors: dict[str, Tensor],
    ours: list[str],
    dtype: str,
    layout: str,
    args: argparse.Namespace,
) -> None:
    kwargs = case.kwargs_of(TRAINING)
    batch = len(tensors["input"])
    rivals: dict[str, Callable[[], Any]] = {EAGER: partial(_step, _theirs(case), tensors, **kwargs)}
    compile_s: dict[str, float] = {}
    if not args.no_compile:
        torch._dynamo.reset()
        compiled = torch.compile(_theirs(case), dynamic=False)
        rivals[COMPILED] = partial(_step, compiled, tensors, **kwargs)
        compile_s[COMPILED] = _first_call(rivals[COMPILED])
    for backend in ours:
        rivals[backend] = partial(_with, backend, partial(_step, case.function, tensors, **kwargs))
    output = case.run(FORWARD, tensors)()
    least = sum(int(case.least(phase, tensors, output)) for phase in (TRAINING, BACKWARD))
    with use_backend(ours[0]):
        timings = measure(rivals, _budget(args) * len(rivals), shortest=SHORTEST)
    for rival, timing in timings.items():
        found.entries.append(
            _entry(f"{case} {STEP}", dtype, layout, batch, rival, timing, least, compile_s.get(rival))
        )


def _with(backend: str, call: Callable[[], Any]) -> Any:
    if backends._forced != backend:  # to force it costs as much as a small operator
        backends._force(backend)
    return call()


def _entry(what: str, dtype: str, layout: str, batch: int, rival: str, timing: Timing, *rest: Any) -> Entry:
    return Entry(what, dtype, layout, batch, rival, timing.ms, timing.spread, *rest)


def _budget(args: argparse.Namespace) -> float:
    return QUICK_BUDGET if args.quick else BUDGET


def _first_call(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return round(perf_counter() - start, 1)


# --- models --------------------------------------------------------------------------------------


def _model(name: str, device: str) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.get_model(name).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _images(batch: int, device: str) -> Tensor:
    return torch.randn(batch, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)


def _training(found: Run, name: str, args: argparse.Namespace, device: str) -> None:
    """One step of SGD: eager, patched and torch.compile, in float32 and under bfloat16 autocast."""
    model = _model(name.split()[0], device).train()
    patched = copy.deepcopy(model)
    pooling_ext.patch(patched)
    few = _images(CHECKED, device)
    for dtype in args.dtypes:
        losses = [float(Trainer(copy.deepcopy(net), few, dtype).loss()) for net in (model, patched)]
        if not abs(losses[1] - losses[0]) <= 2e-2 * abs(losses[0]):
            raise AssertionError(f"{name}: loss {losses[1]} where eager's is {losses[0]}")
        images = _images(args.batch, device)
        rivals: dict[str, Callable[[], Any]] = {
            EAGER: Trainer(model, images, dtype),
            PATCHED: Trainer(patched, images, dtype),
        }
        compile_s = _add_compiled(rivals, lambda net: Trainer(net, images, dtype), model, args)  # noqa: B023
        for rival, timing in measure(rivals, 4 * _budget(args) * len(rivals), shortest=SHORTEST).items():
            entry = _entry(name, dtype, "NHWC", args.batch, rival, timing, None, compile_s.get(rival))
            found.entries.append(entry)


def _inference(found: Run, name: str, args: argparse.Namespace, device: str) -> None:
    """Eager, frozen and torch.compile, at batch 1, 32 and the largest."""
    for dtype in args.dtypes:
        model = _model(name.split()[0], device).eval().to(DTYPES[dtype])
        few = _images(CHECKED, device).to(DTYPES[dtype])
        frozen = pooling_ext.freeze(model, few)
        with torch.inference_mode():
            exact = copy.deepcopy(model).double()(few.double())
            errors = [float((net(few).double() - exact).norm() / exact.norm()) for net in (model, frozen)]
            if not errors[1] <= max(SLACK * errors[0], ALLOWED[dtype]):
                raise AssertionError(f"{name}: off by {errors[1]:.2g}, eager by {errors[0]:.2g}")
            for batch in sorted({1, min(32, args.batch), args.batch}):
                images = _images(batch, device).to(DTYPES[dtype])
                rivals: dict[str, Callable[[], Any]] = {
                    EAGER: partial(model, images),
                    FROZEN: partial(frozen, images),
                }
                compile_s = _add_compiled(rivals, lambda net: partial(net, images), model, args)  # noqa: B023
                for rival, timing in measure(
                    rivals, 2 * _budget(args) * len(rivals), shortest=SHORTEST
                ).items():
                    entry = _entry(name, dtype, "NHWC", batch, rival, timing, None, compile_s.get(rival))
                    found.entries.append(entry)


def _add_compiled(
    rivals: dict[str, Callable[[], Any]],
    wrap: Callable[[nn.Module], Callable[[], Any]],
    model: nn.Module,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Add torch.compile, and where there is time its search for the best kernels; gives their seconds."""
    took: dict[str, float] = {}
    if args.no_compile:
        return took
    modes = {COMPILED: None} | ({} if args.quick else {AUTOTUNED: "max-autotune"})
    torch._dynamo.reset()
    for rival, mode in modes.items():
        call = wrap(torch.compile(copy.deepcopy(model), mode=mode, dynamic=False))  # type: ignore[arg-type]
        took[rival] = _first_call(call)
        rivals[rival] = call
    return took


MODELS: dict[str, Callable[[Run, str, argparse.Namespace, str], None]] = {
    "resnet50 training step": _training,
    "resnet50 inference": _inference,
}


# --- the report ----------------------------------------------------------------------------------


def _operators(found: Run) -> Grid:
    rows = []
    for rivals in found.groups():
        first = rivals[EAGER]
        ours = [rivals[name] for name in OURS if name in rivals]
        if first.least is None or not ours:
            continue
        best = min(ours, key=lambda entry: entry.ms)
        rate = first.least / best.ms / 1e6
        rows.append(
            (
                first.what,
                first.dtype,
                first.layout,
                str(first.batch),
                milliseconds(first.ms),
                _times(rivals, COMPILED),
                *(_times(rivals, name) for name in OURS),
                ratio(first.ms / best.ms),
                ratio(rivals[COMPILED].ms / best.ms) if COMPILED in rivals else "",
                f"{rate / found.facts['copy_gb_s']:.0%}",
            )
        )
    ours_ms = [f"{name}, ms" for name in OURS]
    header = ("operator", "dtype", "layout", "batch", "eager, ms", "torch.compile, ms", *ours_ms,
              "over eager", "over torch.compile", "of a copy's rate")  # fmt: skip
    return Grid("Operators", header, rows, left=3)


def _times(rivals: dict[str, Entry], name: str) -> str:
    return milliseconds(rivals[name].ms) if name in rivals else ""


def _models(found: Run) -> Grid:
    rows = []
    for rivals in found.groups():
        ours = rivals.get(PATCHED) or rivals.get(FROZEN)
        if ours is None:
            continue
        others = [rivals[name].ms for name in (COMPILED, AUTOTUNED) if name in rivals]
        rows.append(
            (
                ours.what,
                ours.dtype,
                str(ours.batch),
                milliseconds(rivals[EAGER].ms),
                _times(rivals, COMPILED),
                _times(rivals, AUTOTUNED),
                milliseconds(ours.ms),
                ratio(rivals[EAGER].ms / ours.ms),
                ratio(min(others) / ours.ms) if others else "",
                f"{ours.batch / ours.ms * 1e3:.0f}",
            )
        )
    header = ("ResNet-50", "dtype", "batch", "eager, ms", "torch.compile, ms", "max-autotune, ms", "ours, ms",
              "over eager", "over the best torch.compile", "images/s")  # fmt: skip
    return Grid("Models", header, rows, left=2)


def markdown(found: Run) -> str:
    facts = found.facts
    setting = (
        f"{facts['gpu']}, torch {facts['torch']}, Triton {facts['triton']}, CUDA {facts['cuda']}, cuDNN "
        f"{facts['cudnn']}, pooling_ext {facts['pooling_ext']}; {facts['date']}. A copy of 1 GB runs at "
        f"{facts['copy_gb_s']:.0f} GB/s, read and written bytes counted."
    )
    method = (
        "All rivals run in one process, in turn, after our results were compared with float64's; times are "
        "medians. The share of a copy's rate counts the bytes that have to be moved, not those that are."
    )
    parts = ["# On a GPU", setting, method]
    parts += [f"Wrong, not timed: {label}: {why}" for label, why in found.wrong.items()]
    parts += [grid.markdown().rstrip("\n") for grid in (_operators(found), _models(found)) if grid.rows]
    return "\n\n".join(parts) + "\n"
