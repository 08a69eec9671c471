"""Every family of torchvision's classifiers, patched against unpatched."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import pooling_ext

from . import model_training, model_zoo, suite
from .model_results import EAGER, FAMILIES, FORWARD, PATCHED, STEP, Entry, Models, Setup
from .model_training import Trainer
from .suite import LAYOUTS
from .timing import measure

#: Seconds to spend on one measurement of both.
BUDGET, QUICK_BUDGET = 2.0, 0.2
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
                    eager, images = model_zoo.make(case.name, batch, layout)
                    patched = copy.deepcopy(eager)
                    pooling_ext.patch(patched)
                    # Inference first: training changes the weights.
                    for task, compare in ((FORWARD, _infer), (STEP, _train)):
                        setup = Setup(FAMILIES, task, case.name, batch, "float32", layout)
                        begin(str(setup))
                        try:
                            errors, rivals = compare(eager, patched, images, exact)
                        except AssertionError as error:
                            models.wrong[f"{setup}, {PATCHED}"] = str(error)
                            continue
                        for rival, timing in measure(rivals, budget).items():
                            entry = Entry(setup, rival, "", timing.ms, timing.spread, errors[rival])
                            models.entries.append(entry)


Rivals = tuple[dict[str, float], dict[str, Callable[[], Any]]]


def _train(eager: nn.Module, patched: nn.Module, images: Tensor, exact: dict[str, Tensor]) -> Rivals:
    """Errors of both models' gradients, and their training steps."""
    eager.train()
    patched.train()
    if STEP not in exact:
        exact[STEP] = model_training.exact_gradients(eager, images)
    errors = model_training.check(eager, patched, images, "float32", exact[STEP])
    return errors, {EAGER: Trainer(eager, images, "float32"), PATCHED: Trainer(patched, images, "float32")}


@torch.no_grad()
def _infer(eager: nn.Module, patched: nn.Module, images: Tensor, exact: dict[str, Tensor]) -> Rivals:
    """Errors of both models' outputs, and their calls without gradients."""
    few = images[: model_training.CHECKED]
    eager.eval()
    patched.eval()
    if FORWARD not in exact:
        exact[FORWARD] = copy.deepcopy(eager).double()(few.double())
    errors: dict[str, float] = {}
    rivals: dict[str, Callable[[], Any]] = {}
    for rival, model in ((EAGER, eager), (PATCHED, patched)):
        # A vision transformer's outputs are all 0 before it is trained.
        errors[rival] = float((model(few) - exact[FORWARD]).norm() / exact[FORWARD].norm().clamp_min(1e-30))
        rivals[rival] = torch.no_grad()(partial(model, images))
    model_training.require(errors, PATCHED, ALLOWED, "outputs")
    return errors, rivals
