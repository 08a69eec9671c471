"""Run a torchvision ResNet on photographs: as it is, patched for training, and frozen for inference.

    python examples/accelerate_resnet.py [--images DIR] [--model resnet50] [--out demo.png]

Prints what patch and freeze did, what the model takes the photographs for, the time of a training step and of
inference before and after, how far the outputs are apart, and what the stem and the pooling layers gain
by themselves. Draws the photographs, the stem's feature map, what the kinds of pooling make of it, and
the times.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pooling_ext
import pooling_ext.functional as F

try:
    import torchvision
    from PIL import Image, ImageOps
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from sklearn.datasets import load_sample_images
    from torchvision.transforms import v2

    from accelerate_measure import (
        EAGER,
        FROZEN,
        PATCHED,
        LayerResult,
        ModelResult,
        capture,
        layer_results,
        logits_of,
        model_results,
        native_dtypes,
        pooling_kinds,
    )
    from accelerate_picture import Chart, draw
    from pretrained import categories, load_pretrained
    from style import speedup
    from timing import in_turn
except ImportError as error:
    sys.exit(f"This example needs more packages ({error}): pip install 'pooling_ext[demo]'")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Photo = tuple[str, Image.Image]

console = Console()


class DemoError(Exception):
    """Something the user can put right; printed without a traceback."""


# --- photographs and model -----------------------------------------------------------------------


def load_photos(folder: Path | None, most: int) -> list[Photo]:
    """Names and RGB photographs from ``folder``, or scikit-learn's two."""
    if folder is None:
        samples = load_sample_images()
        names = [Path(name).name for name in samples.filenames]
        return list(zip(names, map(Image.fromarray, samples.images), strict=True))[:most]
    if not folder.is_dir():
        raise DemoError(f"--images: {folder} is not a directory")
    known = Image.registered_extensions()
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in known)
    if not paths:
        raise DemoError(f"--images: there is no image in {folder}")
    photos = []
    for path in paths[:most]:
        try:
            with Image.open(path) as image:
                photos.append((path.name, ImageOps.exif_transpose(image).convert("RGB")))
        except (OSError, ValueError, SyntaxError) as error:
            raise DemoError(f"--images: {path} cannot be read: {error}") from error
    return photos


def center(size: int) -> v2.Compose:
    return v2.Compose([v2.Resize(size), v2.CenterCrop(size)])


def make_batch(photos: list[Photo], count: int, size: int) -> Tensor:
    """``(count, 3, size, size)`` float32: each photograph's center, then random crops of them."""
    normalize = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    crop = v2.Compose([v2.RandomResizedCrop(size, scale=(0.3, 1.0)), v2.RandomHorizontalFlip()])
    first = [center(size)(photo) for _, photo in photos[:count]]
    rest = [crop(photos[i % len(photos)][1]) for i in range(count - len(first))]
    return torch.stack([normalize(photo) for photo in first + rest])


def load_model(name: str, x: Tensor) -> tuple[nn.Module, str | None]:
    """A ResNet in eval mode, and why it is initialized at random if it is.

    Then BatchNorm's running statistics are those of ``x``: with those of no image at all, activations would
    grow from block to block.
    """
    model = torchvision.models.get_model(name, weights=None)
    why = load_pretrained(model, name)
    if why is not None:
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = None  # the average of all batches seen
        with torch.no_grad():
            model.train()(x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval(), why


# --- tables --------------------------------------------------------------------------------------


def table_of(title: str, *columns: str) -> Table:
    """An empty table whose columns are right-justified but for the first two."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(
            column, justify="left" if place < 2 else "right", no_wrap=place != 1, overflow="fold"
        )
    return table


def print_report(name: str, report: pooling_ext.PatchReport) -> None:
    """The report, with what occurs many times in one row."""
    counts = f"{len(report.replaced)} replaced, {len(report.skipped)} skipped"
    table = table_of(f"pooling_ext.patch({name}): {counts}", "steps", "become", "in")
    table.columns[2].justify = "left"
    for entries, why in ((report.replaced, ""), (report.skipped, "[yellow]skipped: ")):
        groups: dict[tuple[str, str], list[str]] = {}
        for entry in entries:
            groups.setdefault((entry.what, entry.why), []).append(entry.path)
        for (what, becomes), paths in groups.items():
            becomes = becomes.removeprefix("pooling_ext.").removeprefix("functional.")
            more = f" +{len(paths) - 1}" if len(paths) > 1 else ""
            table.add_row(escape(what), why + escape(becomes), escape(paths[0]) + more)
    console.print(table)


def print_frozen(name: str, dtype: torch.dtype, frozen: pooling_ext.Frozen, seconds: float) -> None:
    report = frozen.report
    folded = sum("BatchNorm" in entry.why for entry in report.replaced)
    console.print(
        f"pooling_ext.freeze({name}, {short(dtype)}): {len(report.replaced)} layers frozen, {folded} "
        f"BatchNorms folded, {len(report.skipped)} layers kept; {seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def print_labels(photos: list[Photo], logits: Tensor, names: list[str], why: str | None) -> list[str]:
    """Print the five likeliest classes of each photograph, and return the first ones."""
    likeliest = logits.softmax(1).topk(min(5, len(names)))
    meaning = "" if why is None else " (the weights are random, so these mean nothing)"
    table = table_of(f"Top 5{meaning}", "photograph", "eager model, float32")
    for (photo, _), chances, classes in zip(photos, *likeliest, strict=False):
        rows = zip(chances.tolist(), classes.tolist(), strict=True)
        table.add_row(
            escape(photo), escape(", ".join(f"{names[place]} {chance:.1%}" for chance, place in rows))
        )
    console.print(table)
    chances, classes = likeliest.values[:, 0].tolist(), likeliest.indices[:, 0].tolist()
    return [f"{names[place]} {chance:.0%}" for chance, place in zip(chances, classes, strict=True)]


def print_layers(results: list[LayerResult]) -> None:
    title = "The stem and the pooling layers by themselves, float32 (ms)"
    table = table_of(title, "layer", "", "PyTorch", "ours", "speed-up", "error", "saved MB")
    for result in results:
        times = [f"{ms:.2f}" for ms in result.inference]
        error = number(result.difference)
        table.add_row(f"[bold]{result.name}[/]", "infer", *times, speedup(*result.inference), error)
        times = [f"{ms:.2f}" for ms in result.training]
        saved = " → ".join(number(nbytes / 1e6) for nbytes in result.saved)
        table.add_row(f"[dim]{result.what}[/]", "train", *times, speedup(*result.training), "", saved)
        table.add_row(f"[dim]{'x'.join(map(str, result.shape))}[/]", end_section=True)
    console.print(table)


def print_models(name: str, results: list[ModelResult], images: int) -> None:
    title = f"The whole {name}, {images} images (ms); error and label against eager float32"
    headers = ("", "", "train step", "", "inference", "", "error", "same label")
    table = table_of(title, *headers)
    eager: dict[torch.dtype, ModelResult] = {}
    for result in results:
        before = eager.setdefault(result.dtype, result)
        first = before is result
        train = ["", ""]
        if result.training is not None and before.training is not None:
            train = [f"{result.training:.0f}", "" if first else speedup(before.training, result.training)]
        infer = [f"{result.inference:.0f}", "" if first else speedup(before.inference, result.inference)]
        label = f"[bold]{short(result.dtype)}[/]" if first else ""
        if result.kind == PATCHED and result.dtype != torch.float32:
            label = "[dim]autocast[/]"
        same = f"{result.agreement:.0%}"
        last = result.kind == FROZEN
        table.add_row(label, result.kind, *train, *infer, number(result.difference), same, end_section=last)
    console.print(table)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def number(value: float) -> str:
    """Two digits or a decimal; plain 0 for nothing at all."""
    return "0" if value == 0 else f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"


def charts_of(models: list[ModelResult], kinds: dict[str, list[float]], shape: torch.Size) -> list[Chart]:
    """A training step and inference of the whole model, and the kinds of pooling."""
    dtypes = list(dict.fromkeys(result.dtype for result in models))
    groups = [short(dtype) for dtype in dtypes]
    times = {(result.kind, result.dtype): result for result in models}
    training, inference = (
        {kind: [getattr(times[kind, dtype], what) for dtype in dtypes] for kind in which}
        for what, which in (("training", (EAGER, PATCHED)), ("inference", (EAGER, PATCHED, FROZEN)))
    )
    pools = {label: [pair[side] for pair in kinds.values()] for side, label in enumerate(("PyTorch", "ours"))}
    return [
        Chart("training step, whole model (ms)", groups, training),
        Chart("inference, whole model (ms)", groups, inference),
        Chart(f"pooling {'x'.join(map(str, shape))}, inference (ms)", list(kinds), pools),
    ]


# --- the run -------------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    resnets = [name for name in torchvision.models.list_models(torchvision.models) if "resne" in name]
    switch: Any = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(
        description="A ResNet on photographs: eager, patched for training, and frozen for inference.",
        formatter_class=partial(argparse.HelpFormatter, width=100),
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="your photographs; default: scikit-learn's two"
    )
    parser.add_argument(
        "--model", choices=resnets, default="resnet50", metavar="NAME", help=", ".join(resnets)
    )
    parser.add_argument("--batch", type=int, default=8, help="images in a batch (default 8)")
    parser.add_argument("--size", type=int, default=224, help="the images' side in pixels (default 224)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        help="of the whole model; default: float32, and bfloat16 if the CPU has instructions for it",
    )
    parser.add_argument("--channels-last", action=switch, default=True, help="run in NHWC (default)")
    parser.add_argument(
        "--seconds", type=float, default=3, help="for each timing of the whole model (default 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="for crops and weights (default 0)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default demo.png)")
    args = parser.parse_args(argv)
    if args.batch < 1 or args.size < 64:
        parser.error("--batch must be at least 1 and --size at least 64")
    return args


def describe(args: argparse.Namespace, photos: list[Photo], why: str | None, memory: str) -> None:
    weights = "pretrained on ImageNet" if why is None else f"initialized at random ({why})"
    console.print(f"[bold]{args.model}[/], {escape(weights)}", highlight=False)
    source = args.images or "scikit-learn's sample images"
    console.print(
        f"{len(photos)} photograph{'s' * (len(photos) > 1)} ({source}), {args.batch} crops in a batch, "
        f"{args.size}x{args.size} {'NHWC' if args.channels_last else 'NCHW'}; {torch.get_num_threads()} "
        f"thread{'s' * (torch.get_num_threads() > 1)}; {memory}",
        highlight=False,
        markup=False,
    )
    explanation = pooling_ext.explain(F.max_pool2d, torch.zeros(1, 1, 4, 4), 3)
    if explanation.backend == "aten":
        reasons = "; ".join(dict.fromkeys(explanation.decisions[0].declined.values()))
        console.print(
            f"[yellow]Our kernels are not in use: {escape(reasons)}. Both sides run PyTorch's operators, so "
            "expect speed-ups of 1. `pooling-ext info` says more.[/]",
            highlight=False,
        )


def run(args: argparse.Namespace, progress: Progress) -> None:
    # First of all, so that neither contestant pays for mapping its tensors afresh.
    memory = pooling_ext.reuse_cpu_memory()
    torch.manual_seed(args.seed)
    dtypes = [DTYPES[name] for name in dict.fromkeys(args.dtype)] if args.dtype else native_dtypes()
    steps = progress.add_task("the model", total=8 + 2 * len(dtypes))

    def begin(what: str) -> None:
        progress.update(steps, advance=1, description=what)

    photos = load_photos(args.images, args.batch)
    x = make_batch(photos, args.batch, args.size)
    model, why = load_model(args.model, x)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    describe(args, photos, why, memory.reason)
    reference = logits_of(model, x, torch.float32)
    labels = print_labels(photos[:8], reference, categories(args.model), why)

    patched = copy.deepcopy(model)
    print_report(args.model, pooling_ext.patch(patched))

    results: list[ModelResult] = []
    for dtype in dtypes:
        begin(f"freezing, {short(dtype)}")
        start = time.perf_counter()
        frozen = pooling_ext.freeze(model, x, dtype)
        print_frozen(args.model, dtype, frozen, time.perf_counter() - start)
        begin(f"timing the whole model, {short(dtype)}")
        models = {EAGER: model, PATCHED: patched, FROZEN: frozen}
        results += model_results(models, x, dtype, reference, args.seconds)
    console.print()
    print_models(args.model, results, args.batch)

    layers = []
    for layer in layer_results(model, x, args.seconds / 6):
        begin("timing layers")
        layers.append(layer)
    print_layers(layers)

    stem = capture(model, ["maxpool"], x)["maxpool"]
    kinds = {}
    for kind, theirs, ours in pooling_kinds():
        begin("timing kinds of pooling")
        with torch.no_grad():
            kinds[kind] = in_turn([partial(theirs, stem), partial(ours, stem)], args.seconds / 6)
    begin("drawing")
    shown = [(center(args.size)(photo), label) for (_, photo), label in zip(photos[:2], labels, strict=False)]
    title = f"{args.model}: PyTorch's operators, pooling_ext.patch and pooling_ext.freeze"
    if why is not None:
        shown = [(photo, "") for photo, _ in shown]
        title += " (weights initialized at random)"
    draw(args.out, title, shown, stem, charts_of(results, kinds, stem.shape))
    console.print(f"wrote [bold]{escape(str(args.out))}[/]", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    args = arguments(argv)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            run(args, progress)
    except DemoError as error:
        errors = Console(stderr=True, style="red", soft_wrap=True, markup=False, highlight=False)
        errors.print(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
