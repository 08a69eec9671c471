"""Inference of whole models: eager, frozen, and other engines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn

import pooling_ext

from . import machine
from .model import DTYPES
from .peers import PEERS, Case
from .report import Grid, milliseconds, ratio
from .timing import measure

MODELS = ("resnet50", "resnet18", "mobilenet_v3_large", "efficientnet_b0", "densenet121")
QUICK_MODELS = ("resnet18",)
BATCHES, QUICK_BATCHES = (1, 16), (1,)
#: Seconds for each rival of one measurement.
BUDGET, QUICK_BUDGET = 4.0, 1.0
EAGER, FROZEN = "eager", "frozen"
#: Errors, over the largest output, that pass in any case; else twice eager's in the same dtype.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Entry:
    """One rival on one model, batch size and dtype.

    Attributes:
        setting: what the rival was told, "" where there is only one way.
        ms: median time of a call.
        spread: interquartile range over the median.
        error: largest deviation from the model in float64, over the largest output.
    """

    model: str
    batch: int
    dtype: str
    rival: str
    setting: str
    ms: float
    spread: float
    error: float


@dataclass
class Sweep:
    facts: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def best(self, model: str, batch: int, dtype: str) -> dict[str, Entry]:
        """Each rival's fastest setting."""
        found: dict[str, Entry] = {}
        for entry in self.entries:
            same = (entry.model, entry.batch, entry.dtype) == (model, batch, dtype)
            if same and (entry.rival not in found or entry.ms < found[entry.rival].ms):
                found[entry.rival] = entry
        return found

    def cases(self) -> list[tuple[str, int, str]]:
        return list(dict.fromkeys((entry.model, entry.batch, entry.dtype) for entry in self.entries))


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, write; 1 if the frozen model gave a wrong result, 2 for bad arguments."""
    models = args.models or (QUICK_MODELS if args.quick else MODELS)
    batches = args.batch or (QUICK_BATCHES if args.quick else BATCHES)
    known = torchvision.models.list_models(module=torchvision.models)
    if unknown := sorted(set(models) - set(known)):
        console.print(f"[red]torchvision has no classification model {', '.join(unknown)}[/]")
        return 2
    memory = pooling_ext.reuse_cpu_memory()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    others = machine.OtherLoad()
    sweep = Sweep(machine.facts() | {"memory_reused": memory.reason})
    budget = QUICK_BUDGET if args.quick else BUDGET
    for name in models:
        for batch in batches:
            for dtype in args.dtypes:
                with console.status(f"{name}, batch {batch}, {dtype}"):
                    _measure(sweep, name, batch, dtype, budget, args)
    sweep.facts["cores_busy_with_others"] = others.cores()
    _show(sweep, console)
    whole = not args.quick and not args.models and not args.batch and len(args.dtypes) == len(DTYPES)
    if args.out is not None or whole:
        folder = args.out or ROOT / "benchmarks" / "results" / str(sweep.facts["machine"])
        console.print(f"wrote {', '.join(map(str, _write(sweep, folder)))}", highlight=False)
    return 1 if any(label.endswith(FROZEN) for label in sweep.wrong) else 0


def _model(name: str) -> tuple[nn.Module, int]:
    """A model with random weights in eval mode, and the image size it is made for."""
    torch.manual_seed(0)
    extra = {"init_weights": True} if name in ("inception_v3", "googlenet") else {}
    model = torchvision.models.get_model(name, **extra).eval().requires_grad_(False)
    return model.to(memory_format=torch.channels_last), 299 if name == "inception_v3" else 224  # type: ignore


def _measure(
    sweep: Sweep, name: str, batch: int, dtype_name: str, budget: float, args: argparse.Namespace
) -> None:
    model, size = _model(name)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    exact = model.double()(x.double())
    model.float()
    case = Case(model, x, DTYPES[dtype_name], torch.get_num_threads(), args.autotune)
    label = f"{name}, batch {batch}, {dtype_name}"
    rivals: dict[tuple[str, str], Callable[[], Any]] = {
        (EAGER, "channels_last" if dtype_name == "float32" else "channels_last, autocast"): partial(
            _eager, case
        ),
        (FROZEN, ""): partial(pooling_ext.freeze(model, x, case.dtype), x),
    }
    for peer in () if args.no_peers else PEERS:
        if peer.missing:
            sweep.absent[peer.name] = f"not installed: {', '.join(peer.missing)}"
            continue
        try:
            rivals |= {(peer.name, setting): call for setting, call in peer.settings(case).items()}
        except Exception as error:  # whatever a peer cannot do is not ours to end the run for
            sweep.absent[f"{peer.name}, {label}"] = f"{type(error).__name__}: {str(error)[:200]}"
    errors = {rival: _error(call(), exact) for rival, call in rivals.items()}
    eager = next(error for rival, error in errors.items() if rival[0] == EAGER)
    for rival, error in errors.items():
        # Peers are held only to be computing the same thing.
        allowed = max(2 * eager, ALLOWED[case.dtype]) * (1 if rival[0] == FROZEN else 5)
        if not error <= allowed:
            sweep.wrong[f"{label}, {rival[0]}"] = (
                f"off by {error:.2g} of the largest output, eager by {eager:.2g}"
            )
            del rivals[rival]
    timings = measure({" | ".join(rival): call for rival, call in rivals.items()}, budget * len(rivals))
    for rival in rivals:
        timing = timings[" | ".join(rival)]
        sweep.entries.append(Entry(name, batch, dtype_name, *rival, timing.ms, timing.spread, errors[rival]))


def _eager(case: Case) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", case.dtype, enabled=case.dtype != torch.float32):
        return case.model(case.x)


def _error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


# --- report --------------------------------------------------------------------------------------


def _grid(sweep: Sweep) -> Grid:
    peers = [peer.name for peer in PEERS if any(entry.rival == peer.name for entry in sweep.entries)]
    header = ["model", "batch", "dtype", "eager, ms", "frozen, ms", "speed-up"]
    header += [f"{name}, ms" for name in peers] + (["over the best peer"] if peers else [])
    rows = []
    for model, batch, dtype in sweep.cases():
        best = sweep.best(model, batch, dtype)
        eager, frozen = best.get(EAGER), best.get(FROZEN)
        cells = [model, str(batch), dtype]
        cells += [milliseconds(entry.ms) if entry else "" for entry in (eager, frozen)]
        cells.append(ratio(eager.ms / frozen.ms) if eager and frozen else "")
        cells += [milliseconds(best[name].ms) if name in best else "" for name in peers]
        times = [best[name].ms for name in peers if name in best]
        if peers:
            cells.append(ratio(min(times) / frozen.ms) if times and frozen else "")
        rows.append(cells)
    return Grid("Inference", header, rows, left=3)


def _setting(sweep: Sweep) -> str:
    facts = sweep.facts
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}, "
        f"{facts['date']}; medians, in turn in one process, memory reused; eager is channels_last, and "
        "under autocast in bfloat16."
    )


def _notes(sweep: Sweep) -> list[str]:
    others = sweep.facts["cores_busy_with_others"]
    notes = (
        [f"Other processes kept {others:.1f} cores busy meanwhile: noisy."] if (others or 0) >= 0.1 else []
    )
    notes += [f"Left out: {name}: {why}" for name, why in sweep.absent.items()]
    return notes + [f"Wrong result, not timed: {label}: {why}" for label, why in sweep.wrong.items()]


def _show(sweep: Sweep, console: Console) -> None:
    console.print(_grid(sweep).rich())
    console.print(_setting(sweep), highlight=False, style="dim")
    for note in _notes(sweep):
        console.print(note, highlight=False, style="yellow", markup=False)


def _write(sweep: Sweep, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "model_inference.json", folder / "model_inference.md"]
    tables = {
        "entries": [asdict(entry) for entry in sweep.entries],
        "wrong": sweep.wrong,
        "absent": sweep.absent,
    }
    paths[0].write_text(json.dumps(sweep.facts | tables, indent=1) + "\n")
    parts = ["# Inference of whole models", _setting(sweep), *_notes(sweep), _grid(sweep).markdown()]
    paths[1].write_text("\n\n".join(parts))
    return paths
