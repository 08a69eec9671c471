"""Inference of whole models: eager, frozen, and other engines."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import pooling_ext

from ..harness import suite
from ..harness.baselines import BASELINES, Case
from ..harness.suite import DTYPES
from ..harness.timing import measure
from ..reports.model_results import EAGER, FORWARD, FROZEN, INFERENCE, Entry, Models, Setup
from . import model_zoo

MODELS, QUICK_MODELS = ("resnet50", "resnet18", "vgg16"), ("resnet18",)
#: Other engines take minutes to compile, so without --all they are timed on these only.
COMPARED_MODELS = MODELS
#: With ``--all`` these too.
MORE_MODELS = ("mobilenet_v3_large", "efficientnet_b0", "densenet121")
BATCHES, QUICK_BATCHES = (1, 16), (1,)
#: Models whose large batch is another.
LARGE_BATCH = {"vgg16": 8}
#: Seconds for each rival of one measurement.
BUDGET, QUICK_BUDGET = 3.0, 1.0
#: Errors, over the largest output, that pass in any case; else twice eager's in the same dtype.
ALLOWED = {"float32": 1e-5, "bfloat16": 1e-2}


def measure_part(models: Models, args: argparse.Namespace, console: Console) -> None:
    """Add the inference that ``args`` ask for to ``models``."""
    names = QUICK_MODELS if args.quick else MODELS + (MORE_MODELS if args.all else ())
    setups = [
        Setup(INFERENCE, FORWARD, case.name, batch, dtype, "NHWC")
        for case in suite.choose(model_zoo.known(), names, args)
        for batch in args.batch or (QUICK_BATCHES if args.quick else _batches(case.name))
        for dtype in args.dtypes
    ]
    with suite.steps(console, len(setups)) as begin:
        for setup in setups:
            begin(str(setup))
            _measure(models, setup, args)


def _batches(name: str) -> tuple[int, ...]:
    return *BATCHES[:-1], LARGE_BATCH.get(name, BATCHES[-1])


def _measure(models: Models, setup: Setup, args: argparse.Namespace) -> None:
    model, x = model_zoo.make(setup.model, setup.batch, setup.layout)
    model.eval().requires_grad_(False)
    exact = model.double()(x.double())
    model.float()
    case = Case(model, x, DTYPES[setup.dtype], torch.get_num_threads(), args.autotune)
    rivals: dict[tuple[str, str], Callable[[], Any]] = {
        (EAGER, "channels_last" if setup.dtype == "float32" else "channels_last, autocast"): partial(
            _eager, case
        ),
        (FROZEN, ""): partial(pooling_ext.freeze(model, x, case.dtype), x),
    }
    compared = (args.all or setup.model in COMPARED_MODELS) and not (args.no_peers or args.quick)
    for baseline in BASELINES if compared else ():
        if baseline.missing:
            models.absent[baseline.name] = f"not installed: {', '.join(baseline.missing)}"
            continue
        try:
            rivals |= {(baseline.name, setting): call for setting, call in baseline.settings(case).items()}
        except Exception as error:  # whatever a baseline cannot do is not ours to end the run for
            models.absent[f"{baseline.name}, {setup}"] = f"{type(error).__name__}: {str(error)[:200]}"
    errors = {rival: _error(call(), exact) for rival, call in rivals.items()}
    eager = next(error for rival, error in errors.items() if rival[0] == EAGER)
    for rival, error in errors.items():
        # Baselines are held only to be computing the same thing.
        allowed = max(2 * eager, ALLOWED[setup.dtype]) * (1 if rival[0] == FROZEN else 5)
        if not error <= allowed:
            why = f"off by {error:.2g} of the largest output, eager by {eager:.2g}"
            models.wrong[f"{setup}, {rival[0]}"] = why
            del rivals[rival]
    timings = measure(
        {" | ".join(rival): call for rival, call in rivals.items()}, _budget(args) * len(rivals)
    )
    for rival in rivals:
        timing = timings[" | ".join(rival)]
        models.entries.append(Entry(setup, *rival, timing.ms, timing.spread, errors[rival]))


def _budget(args: argparse.Namespace) -> float:
    return QUICK_BUDGET if args.quick else BUDGET


def _eager(case: Case) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", case.dtype, enabled=case.dtype != torch.float32):
        return case.model(case.x)


def _error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()
