"""Training steps of whole models: eager, patched and torch.compile."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import pooling_ext

from ..harness import suite
from ..harness.memory import peak_bytes, resident
from ..harness.suite import DTYPES
from ..harness.timing import measure
from ..reports.model_results import COMPILED, EAGER, PATCHED, STEP, TRAINING, Entry, Memory, Models, Setup
from . import model_zoo

MOBILE = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0", "convnext_tiny")
MODELS, QUICK_MODELS = ("resnet50", "resnet18", "vgg11_bn", *MOBILE), ("resnet18",)
#: In which these are trained in float32 besides: it is PyTorch's default, where depthwise gradients are slow.
MORE_LAYOUTS: dict[str, tuple[str, ...]] = dict.fromkeys(MOBILE, ("NCHW",))
BATCH = 16
#: Seconds for each rival of one measurement.
BUDGET, QUICK_BUDGET = 5.0, 1.0
#: Images that the results are compared on with float64.
CHECKED = 4
#: Largest error of the gradients, relative to all of them, in float64 and in the dtype that is timed,
#: where SLACK times eager's passes too. The second is loose: a ReLU whose input is all but 0 may pass its
#: gradient on after one rounding and not after another, by which eager's own layouts differ by percents.
ALLOWED_EXACT, ALLOWED = 1e-7, 0.1
SLACK = 5
#: torch.compile takes minutes, so without --all it is timed on these only.
COMPILED_MODELS = ("resnet50",)


class Trainer:
    """A model with its optimizer and a batch; calling it makes one step."""

    def __init__(self, model: nn.Module, images: Tensor, dtype: str) -> None:
        self.model, self.images, self.dtype = model, images, DTYPES[dtype]
        self.labels = torch.arange(len(images), device=images.device) % 10
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def loss(self) -> Tensor:
        bfloat16 = self.dtype == torch.bfloat16
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=bfloat16):
            outputs = self.model(self.images)
            # Inception and GoogLeNet have auxiliary outputs in training.
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            losses = [F.cross_entropy(output, self.labels) for output in outputs]
            return sum(losses[1:], losses[0])

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def gradients(model: nn.Module, images: Tensor, dtype: str) -> Tensor:
    """Of all parameters, one after the other, in float64. The model stays as it was."""
    model = copy.deepcopy(model)
    for module in model.modules():
        # What is random would be so differently in each dtype.
        if "dropout" in type(module).__name__.lower() or "stochastic" in type(module).__name__.lower():
            module.eval()
    Trainer(model, images, dtype).loss().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([grad.flatten().double() for grad in grads])


def exact_gradients(model: nn.Module, images: Tensor) -> Tensor:
    """Of the first few images, computed in float64."""
    return gradients(copy.deepcopy(model).double(), images[:CHECKED].double(), "float32")


def check(
    eager: nn.Module, patched: nn.Module, images: Tensor, dtype: str, exact: Tensor
) -> dict[str, float]:
    """The relative errors of both models' gradients in ``dtype``; ``exact`` are eager's in float64.

    Raises:
        AssertionError: the patched model's are wrong in float64, or off by more than rounding explains.
    """

    def error(found: Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    if not (off := error(exact_gradients(patched, images))) <= ALLOWED_EXACT:
        raise AssertionError(f"gradients in float64 are off by {off:.2g} of their size")
    few = images[:CHECKED]
    errors = {
        rival: error(gradients(model, few, dtype)) for rival, model in ((EAGER, eager), (PATCHED, patched))
    }
    require(errors, PATCHED, ALLOWED, "gradients")
    return errors


def require(errors: dict[str, float], rival: str, allowed: float, what: str) -> None:
    """Require of ``rival`` an error of at most SLACK times eager's, or ``allowed``."""
    if not errors[rival] <= max(SLACK * errors[EAGER], allowed):
        raise AssertionError(
            f"{what} off by {errors[rival]:.2g} of their size, eager's by {errors[EAGER]:.2g}"
        )


def measure_part(models: Models, args: argparse.Namespace, console: Console) -> None:
    """Add the training steps that ``args`` ask for to ``models``."""
    cases = suite.choose(model_zoo.known(), QUICK_MODELS if args.quick else MODELS, args)
    setups = [
        Setup(TRAINING, STEP, case.name, batch, dtype, layout)
        for case in cases
        for batch in args.batch or [BATCH]
        for dtype in args.dtypes
        for layout in ("NHWC", *(MORE_LAYOUTS.get(case.name, ()) if dtype == "float32" else ()))
    ]
    with suite.steps(console, len(setups)) as begin:
        for setup in setups:
            begin(str(setup))
            try:
                _measure(models, setup, args, begin)
            except AssertionError as error:
                models.wrong[f"{setup}, {PATCHED}"] = str(error)


def _measure(models: Models, setup: Setup, args: argparse.Namespace, begin: Any) -> None:
    eager, images = model_zoo.make(setup.model, setup.batch, setup.layout)
    eager.train()
    patched = copy.deepcopy(eager)
    pooling_ext.patch(patched)
    errors = check(eager, patched, images, setup.dtype, exact_gradients(eager, images))
    rivals: dict[str, Callable[[], Any]] = {
        EAGER: Trainer(eager, images, setup.dtype),
        PATCHED: Trainer(patched, images, setup.dtype),
    }
    compiling: tuple[float | None, bool | None] = None, None
    compared = args.all or setup.model in COMPILED_MODELS
    if compared and not args.quick and not args.no_peers:
        try:
            rivals[COMPILED], compiling = _compiled(copy.deepcopy(eager), images, setup.dtype)
        except Exception as error:  # whatever the compiler cannot do is not ours to end the run for
            models.absent[f"{COMPILED}, {setup}"] = f"{type(error).__name__}: {str(error)[:200]}"
    timings = measure(rivals, (QUICK_BUDGET if args.quick else BUDGET) * len(rivals))
    for rival, timing in timings.items():
        more = compiling if rival == COMPILED else (None, None)
        error = errors.get(rival)
        models.entries.append(Entry(setup, rival, "", timing.ms, timing.spread, error, *more))
    if not args.quick and setup.layout == "NHWC":
        models.memory += [_memory(setup, rival) for rival in (EAGER, PATCHED)]


def _compiled(model: nn.Module, images: Tensor, dtype: str) -> tuple[Trainer, tuple[float, bool]]:
    """A compiled model's step, the seconds of its first call, and whether earlier work was found on disk."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    step = Trainer(torch.compile(model), images, dtype)  # type: ignore[arg-type]
    start = perf_counter()
    step()
    took = perf_counter() - start
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    return step, (took, hits > 0)


# --- memory, in a process of its own ---------------------------------------------------------------


def _memory(setup: Setup, rival: str) -> Memory:
    """What ``rival`` takes; in a process of its own, since peaks cannot be reset."""
    options = [setup.model, str(setup.batch), setup.dtype, setup.layout, rival, str(torch.get_num_threads())]
    command = [sys.executable, "-m", __name__, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=suite.ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return Memory(setup.model, setup.batch, setup.dtype, rival, **json.loads(done.stdout.splitlines()[-1]))


def _main(name: str, batch: str, dtype: str, layout: str, rival: str, threads: str) -> None:
    pooling_ext.reuse_cpu_memory()
    torch.set_num_threads(int(threads))
    model, images = model_zoo.make(name, int(batch), layout)
    model.train()
    if rival == PATCHED:
        pooling_ext.patch(model)
    step = Trainer(model, images, dtype)
    before = resident()
    step()
    step()
    rss = None if before is None else resident(peak=True) - before  # type: ignore[operator]
    print(json.dumps({"rss": rss, "live": peak_bytes(step)}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
