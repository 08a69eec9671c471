"""The tables of the suite "model"."""

from __future__ import annotations

from collections.abc import Iterable

from ..suites import model_inference, model_training, model_zoo
from . import report
from .model_results import (
    COMPILED,
    EAGER,
    FAMILIES,
    FORWARD,
    FROZEN,
    INFERENCE,
    PATCHED,
    STEP,
    TRAINING,
    Entry,
    Models,
)
from .report import Document, Grid, milliseconds, ratio, size
from .targets import MODEL

#: What each part runs unless told otherwise.
PLANS = {
    TRAINING: model_training.MODELS,
    INFERENCE: model_inference.MODELS,
    FAMILIES: tuple(case.name for case in model_zoo.FAMILIES),
}

_METHOD = (
    "All rivals run in one process, in turn, after the gradients or outputs were compared with float64's; "
    "times are medians. A training step is forward, cross entropy, backward and SGD with momentum; bfloat16 "
    "is under autocast; models and images are channels_last in training and inference, and memory is reused "
    "(`pooling_ext.reuse_cpu_memory()`). torch.compile is inductor's default in training, and freezes in "
    "inference; its compile time, that of the first step, is in no other time. Memory is measured in a "
    "process for each rival: live bytes are the most that torch's allocator has given out beyond model, "
    "optimizer and batch, as its profiler sees it; the process's are the most it held beyond what it held "
    "before its first step."
)


def document(models: Models) -> Document:
    grids = [
        report.targets(MODEL, models),
        training(models),
        memory(models),
        inference(models),
        families(models),
    ]
    absent = [f"Left out: {name}: {why}" for name, why in models.absent.items()]
    return Document(
        "Whole models on the CPU", models.facts, _METHOD, headline(models), grids, (), absent, models.wrong
    )


def headline(models: Models) -> str:
    """The run in a sentence."""
    parts = []
    for part, rival in ((TRAINING, PATCHED), (INFERENCE, FROZEN), (FAMILIES, PATCHED)):
        speedups = models.speedups(rival, EAGER, part=part)
        if speedups:
            slowest = min(speedups, key=lambda setup: speedups[setup])
            parts.append(
                f"{part}: {ratio(min(speedups.values()))} to {ratio(max(speedups.values()))} over eager with "
                f"the {rival} model, the least on {slowest}"
            )
    return "; ".join(parts) + "." if parts else "Nothing was measured."


def _ms(entry: Entry | None) -> str:
    return milliseconds(entry.ms) if entry else ""


def _over(entry: Entry | None, others: Iterable[Entry | None]) -> str:
    """How much faster ``entry`` is than the fastest of ``others``."""
    times = [other.ms for other in others if other]
    return ratio(min(times) / entry.ms) if entry and times else ""


def training(models: Models) -> Grid:
    header = ("model", "batch", "dtype", "layout", "eager, ms", "patched, ms", "over eager")
    header += ("torch.compile, ms", "over torch.compile", "compile, s", "images/s")
    rows = []
    for setup, rivals in models.best(part=TRAINING).items():
        eager, patched, compiled = (rivals.get(name) for name in (EAGER, PATCHED, COMPILED))
        took = compiled.compile_s if compiled else None
        rows.append(
            (
                setup.model,
                str(setup.batch),
                setup.dtype,
                setup.layout,
                _ms(eager),
                _ms(patched),
                _over(patched, [eager]),
                _ms(compiled),
                _over(patched, [compiled]),
                "" if took is None else f"{took:.0f}{' cached' if compiled and compiled.cached else ''}",
                f"{setup.batch / patched.ms * 1e3:.1f}" if patched else "",
            )
        )
    return Grid("Training step", header, rows, left=4)


def memory(models: Models) -> Grid:
    header = ("model", "batch", "dtype", "live bytes, eager", "patched", "share")
    header += ("process, eager", "patched", "share")
    rows = []
    for eager, patched in models.memory_pairs():
        cells = [eager.model, str(eager.batch), eager.dtype]
        for theirs, ours in ((eager.live, patched.live), (eager.rss, patched.rss)):
            cells += [size(theirs), size(ours), f"{ours / theirs:.0%}" if ours and theirs else ""]
        rows.append(cells)
    return Grid("Memory of a training step", header, rows, left=3)


def inference(models: Models) -> Grid:
    found = models.best(part=INFERENCE)
    peers = list(dict.fromkeys(name for rivals in found.values() for name in rivals))
    peers = [name for name in peers if name not in (EAGER, FROZEN)]
    header = ["model", "batch", "dtype", "eager, ms", "frozen, ms", "over eager"]
    header += [f"{name}, ms" for name in peers] + (["over the best other"] if peers else [])
    rows = []
    for setup, rivals in found.items():
        eager, frozen, others = rivals.get(EAGER), rivals.get(FROZEN), [rivals.get(name) for name in peers]
        cells = [setup.model, str(setup.batch), setup.dtype, _ms(eager), _ms(frozen), _over(frozen, [eager])]
        cells += map(_ms, others)
        rows.append(cells + ([_over(frozen, others)] if peers else []))
    return Grid("Inference", header, rows, left=3)


def families(models: Models) -> Grid:
    """A model in a row: eager and patched in both tasks and layouts."""
    found = models.best(part=FAMILIES)
    columns = [(task, layout) for task in (STEP, FORWARD) for layout in ("NHWC", "NCHW")]
    header = ["patched over eager", "batch"]
    for task, layout in columns:
        header += [f"{task} {layout}, ms", ""]
    rows: dict[tuple[str, int], list[str]] = {}
    for model, batch in dict.fromkeys((setup.model, setup.batch) for setup in found):
        cells = [model, str(batch)]
        for task, layout in columns:
            wanted = {"model": model, "batch": batch, "task": task, "layout": layout}
            (rivals,) = models.best(part=FAMILIES, **wanted).values() or ({},)
            eager, patched = rivals.get(EAGER), rivals.get(PATCHED)
            cells += [f"{_ms(eager)} → {_ms(patched)}" if eager else "", _over(patched, [eager])]
        rows[model, batch] = cells
    return Grid("Families, float32, eager → patched", header, list(rows.values()))
