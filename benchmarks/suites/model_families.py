"""Every family of torchvision's classifiers, patched against unpatched."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import pooling_ext
from pooling_ext.ops.conv_bn_act.implementations import from_size

from ..harness import suite
from ..harness.suite import LAYOUTS
from ..harness.timing import measure, ratio_is_settled
from ..reports.model_results import EAGER, FAMILIES, FORWARD, PATCHED, STEP, Entry, Models, Setup
from . import model_training, model_zoo
from .model_training import Trainer

#: Seconds to spend on one measurement of both, at most.
BUDGET, QUICK_BUDGET = 1.5, 0.2
#: What looks slower is measured anew for this long, which then counts: so few turns may differ by a tenth.
LONG_BUDGET = 8.0
#: It ends sooner when the ratio of their times is known to this fraction, or to be no loss for certain.
WITHIN, NO_LOSS = 0.01, 1.02
#: A small model is called several times in turn (seconds), as in use: what both rivals run would otherwise
#: always be in the caches, and what only one of them runs never.
SHORTEST_SAMPLE = 0.04
#: Images that the results are compared on with float64.
CHECKED = 2
#: The largest error of an output, relative to all of them, that passes in any case; else some times eager's.
ALLOWED = 1e-5


def measure_part(models: Models, args: argparse.Namespace, console: Console) -> None:
    """Add float32 training steps and inference of the families to ``models``, in both layouts."""
    globs = args.cases or ["*"]
    cases = [case for case in model_zoo.FAMILIES if any(fnmatchcase(case.name, glob) for glob in globs)]
    budget = QUICK_BUDGET if args.quick else BUDGET
    with suite.steps(console, 2 * len(LAYOUTS) * len(cases)) as begin:
        for case in cases:
            exact: dict[str, Tensor] = {}
            for layout in LAYOUTS:
                for batch in args.batch or [case.batch]:
                    eager, images = model_zoo.make(case.name, batch, layout, case.size)
                    patched = copy.deepcopy(eager)
                    pooling_ext.patch(patched)
                    # Inference first: training changes the weights.
                    for task, compare in ((FORWARD, _infer), (STEP, _train)):
                        setup = Setup(FAMILIES, task, case.name, batch, "float32", layout)
                        begin(str(setup))
                        try:
                            with from_size(0):  # so that all of them are checked
                                errors = compare(eager, patched, images[:CHECKED], exact)
                        except AssertionError as error:
                            models.wrong[f"{setup}, {PATCHED}"] = str(error)
                            continue
                        rivals = {EAGER: _call(eager, images, task), PATCHED: _call(patched, images, task)}
                        timings = measure(rivals, budget, _settled, SHORTEST_SAMPLE)
                        if timings[PATCHED].ms > timings[EAGER].ms and not args.quick:
                            timings = measure(rivals, LONG_BUDGET, _settled, SHORTEST_SAMPLE)
                        for rival, timing in timings.items():
                            entry = Entry(setup, rival, "", timing.ms, timing.spread, errors[rival])
                            models.entries.append(entry)


def _settled(samples: Mapping[str, list[float]]) -> bool:
    return ratio_is_settled(samples[EAGER], samples[PATCHED], WITHIN, NO_LOSS)


def _call(model: nn.Module, images: Tensor, task: str) -> Callable[[], Any]:
    return Trainer(model, images, "float32") if task == STEP else torch.no_grad()(partial(model, images))


def _train(eager: nn.Module, patched: nn.Module, few: Tensor, exact: dict[str, Tensor]) -> dict[str, float]:
    """Errors of both models' gradients."""
    eager.train()
    patched.train()
    if STEP not in exact:
        exact[STEP] = model_training.exact_gradients(eager, few)
    return model_training.check(eager, patched, few, "float32", exact[STEP])


@torch.no_grad()
def _infer(eager: nn.Module, patched: nn.Module, few: Tensor, exact: dict[str, Tensor]) -> dict[str, float]:
    """Errors of both models' outputs."""
    eager.eval()
    patched.eval()
    if FORWARD not in exact:
        exact[FORWARD] = copy.deepcopy(eager).double()(few.double())
    size = exact[FORWARD].norm().clamp_min(1e-30)  # a vision transformer's are all 0 before it is trained
    errors = {
        rival: float((model(few) - exact[FORWARD]).norm() / size)
        for rival, model in ((EAGER, eager), (PATCHED, patched))
    }
    model_training.require(errors, PATCHED, ALLOWED, "outputs")
    return errors
