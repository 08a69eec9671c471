"""Run a torchvision ResNet on photographs with PyTorch's pooling and with pooling_ext's.

    python examples/accelerate_resnet.py [--images DIR] [--model resnet50] [--out demo.png]

Prints what each pooling layer takes before and after, how far the results are apart, what is kept for
backward, and what the whole model gains. Draws the photographs, the stem's feature map and what
the kinds of pooling make of it.
"""

from __future__ import annotations

import argparse
import copy
import socket
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor, nn

import pooling_ext
import pooling_ext.functional as F

try:
    import torchvision
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL import Image, ImageOps
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from sklearn.datasets import load_sample_images
    from torchvision.transforms import v2
except ImportError as error:
    sys.exit(f"This example needs more packages ({error}): pip install 'pooling_ext[demo]'")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Seconds to wait for the server that has the pretrained weights.
PATIENCE = 5
#: Seconds for each pair of timings: of one layer, and of the whole model.
LAYER_SECONDS, MODEL_SECONDS = 0.8, 9.0
INK, FAINT, TORCH, OURS = "#1f2933", "#d9dee4", "#9aa5b1", "#0b7285"

Pool = Callable[[Tensor], Tensor]

console = Console()


class DemoError(Exception):
    """Something the user can put right; printed without a traceback."""


@dataclass(frozen=True)
class LayerResult:
    """What one pooling operation takes: milliseconds and bytes with PyTorch's operator and with ours."""

    name: str
    what: str
    shape: tuple[int, ...]
    inference: tuple[float, float]
    training: tuple[float, float]
    difference: float
    saved: tuple[int, int]


def load_photos(folder: Path | None, most: int) -> list[Image.Image]:
    """RGB photographs from ``folder``, or scikit-learn's two."""
    if folder is None:
        return [Image.fromarray(array) for array in load_sample_images().images]
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
                photos.append(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise DemoError(f"--images: {path} cannot be read: {error}") from error
    return photos


def make_batch(photos: list[Image.Image], count: int, size: int) -> Tensor:
    """``(count, 3, size, size)`` float32: each photograph's centre, then random crops of them."""
    normalise = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    centre = v2.Compose([v2.Resize(size), v2.CenterCrop(size), normalise])
    crop = v2.Compose([v2.RandomResizedCrop(size, scale=(0.3, 1.0)), v2.RandomHorizontalFlip(), normalise])
    first = [centre(photo) for photo in photos[:count]]
    rest = [crop(photos[i % len(photos)]) for i in range(count - len(first))]
    return torch.stack(first + rest)


def reachable(url: str) -> bool:
    """Whether a server answers for ``url`` in time; looking up its name counts, though sockets do not."""
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE):
                answered.set()
        except (OSError, ValueError):
            pass

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(PATIENCE)
    return answered.is_set()


def load_model(name: str) -> tuple[nn.Module, str]:
    """A ResNet in eval mode with pretrained weights if they can be had, and which weights it has."""
    weights: Any = getattr(torchvision.models.get_model_weights(name), "DEFAULT")  # noqa: B009 (untyped)
    cached = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[-1])
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(PATIENCE)
        if cached.is_file() or reachable(weights.url):
            return torchvision.models.get_model(name, weights=weights).eval(), f"pretrained ({weights})"
        why = f"no answer from their server in {PATIENCE} s"
    except (OSError, RuntimeError) as error:
        why = str(error)
    finally:
        socket.setdefaulttimeout(before)
    return torchvision.models.get_model(name, weights=None).eval(), f"initialised at random ({why})"


def in_turn(calls: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Median milliseconds of each call; they take turns for about ``seconds`` in all."""
    for call in calls:
        call()
    taken: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(taken[0]) < 3 or time.perf_counter() < end:
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times) for times in taken]


def saved_bytes(pool: Pool, x: Tensor) -> int:
    """Bytes that ``pool`` keeps for backward, without input and output, which the neighbours keep anyway."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = pool(x)
    for tensor in (x, output):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def compare(name: str, what: str, theirs: Pool, ours: Pool, x: Tensor) -> LayerResult:
    """Time ``theirs`` and ``ours`` on ``x`` and compare their outputs."""
    leaf = x.detach().requires_grad_()

    def step(pool: Pool, grad: Tensor) -> None:
        torch.autograd.grad(pool(leaf), leaf, grad)

    with torch.no_grad():
        expected, actual = theirs(x), ours(x)
        difference = (actual - expected).abs().max().item()
        inference = in_turn([partial(theirs, x), partial(ours, x)], LAYER_SECONDS)
    grad = torch.randn_like(expected)
    training = in_turn([partial(step, theirs, grad), partial(step, ours, grad)], LAYER_SECONDS)
    saved = saved_bytes(theirs, leaf), saved_bytes(ours, leaf)
    shape = tuple(x.shape)
    return LayerResult(
        name, what, shape, (inference[0], inference[1]), (training[0], training[1]), difference, saved
    )


def capture(model: nn.Module, paths: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """Run ``model`` on ``x`` and return the inputs of the modules at ``paths``."""
    inputs: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.setdefault(path, args[0])

    handles = [model.get_submodule(path).register_forward_pre_hook(partial(keep, path)) for path in paths]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return inputs


def pooling_kinds() -> list[tuple[str, Pool, Pool]]:
    """Label, PyTorch's function and ours of each kind of pooling, as the stem would use it."""
    window = {"kernel_size": 3, "stride": 2}
    padded = {**window, "padding": 1}
    lp = {"norm_type": 2, **window}
    return [
        ("max", partial(torch_F.max_pool2d, **padded), partial(F.max_pool2d, **padded)),
        ("average", partial(torch_F.avg_pool2d, **padded), partial(F.avg_pool2d, **padded)),
        ("L2", partial(torch_F.lp_pool2d, **lp), partial(F.lp_pool2d, **lp)),
        ("global average", partial(torch_F.adaptive_avg_pool2d, output_size=1), F.global_avg_pool2d),
    ]


def number(value: float) -> str:
    """Two digits or a decimal; plain 0 for nothing at all."""
    return "0" if value == 0 else f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"


def speedup(pair: tuple[float, float]) -> str:
    ratio = pair[0] / pair[1]
    colour = "green" if ratio >= 1.1 else "red" if ratio < 0.95 else "default"
    return f"[{colour}]{ratio:.{0 if ratio >= 20 else 1 if ratio >= 2 else 2}f}x[/]"


def print_layers(title: str, results: list[LayerResult]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    table.add_column("", no_wrap=True)
    for header in ("PyTorch", "ours", "speed-up", "error", "saved MB"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        times = [f"{ms:.2f}" for ms in result.inference]
        error = number(result.difference)
        table.add_row(f"[bold]{result.name}[/]", "infer", *times, speedup(result.inference), error)
        times = [f"{ms:.2f}" for ms in result.training]
        saved = " → ".join(number(nbytes / 1e6) for nbytes in result.saved)
        table.add_row(f"[dim]{result.what}[/]", "train", *times, speedup(result.training), "", saved)
        table.add_row(f"[dim]{'x'.join(map(str, result.shape))}[/]", end_section=True)
    console.print(table)


def print_model(name: str, pair: tuple[float, float], layers: list[LayerResult], difference: float) -> None:
    """The whole model's times, with the pooling layers' part in them."""
    table = Table(title=f"The whole {name}, inference", title_justify="left", box=box.SIMPLE_HEAD)
    for header in ("", "time", "pooling's share"):
        table.add_column(header, justify="left" if not header else "right")
    for which, label in enumerate(("PyTorch's pooling", "pooling_ext's pooling")):
        share = sum(layer.inference[which] for layer in layers) / pair[which]
        table.add_row(label, f"{pair[which]:.0f} ms", f"{share:.1%}")
    table.add_row("speed-up", speedup(pair), "")
    table.add_row("largest difference of the logits", number(difference), "")
    console.print(table)


def draw(
    path: Path, photos: list[Image.Image], stem: Tensor, kinds: dict[str, list[float]], title: str
) -> None:
    """Write the picture: a row a photograph, and the times below.

    Args:
        photos: what the model saw of those to draw.
        stem: the stem's feature maps of the whole batch, ``(N, C, H, W)``, the photographs' first.
        kinds: milliseconds of PyTorch's and our pooling of ``stem``, by kind.
    """
    rows = len(photos)
    # The channel with most contrast shows most.
    channel = int(stem[:rows].std(dim=(2, 3)).mean(0).argmax())
    style: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": FAINT}
    style |= dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"), INK)
    with rc_context(style), torch.no_grad():
        figure = Figure(figsize=(14, 2.3 * rows + 3.4), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[2.3 * rows + 0.7, 2.7], squeeze=False)[:, 0]
        axes = top.subplots(rows, 6, squeeze=False)
        for row, photo in enumerate(photos):
            draw_maps(axes[row], photo, stem[row : row + 1], channel, heads=row == 0)
        top.suptitle(title, x=0.01, ha="left", weight="bold", size=13)
        draw_times(bottom.subplots(), kinds, tuple(stem.shape))
        figure.savefig(path, dpi=120, facecolor="white")


def draw_maps(axes: Sequence[Any], photo: Image.Image, maps: Tensor, channel: int, heads: bool) -> None:
    """Draw a photograph, a channel of its ``(1, C, H, W)`` feature maps, and that channel pooled.

    A colour means the same value throughout, but for the L2 norm, whose scale is three times as long: that
    is the norm of nine ones.
    """
    brightest = float(maps[0, channel].max())
    axes[0].imshow(photo)
    axes[1].imshow(maps[0, channel], cmap="magma", vmin=0, vmax=brightest)
    titles = ["photograph", f"stem, channel {channel}\n{maps.shape[2]}x{maps.shape[3]}"]
    for axis, (label, _, ours) in zip(axes[2:], pooling_kinds(), strict=True):
        pooled = ours(maps)[0]
        height, width = pooled.shape[1:]
        shown, longest = pooled[channel], brightest * (3 if label == "L2" else 1)
        title = f"{label}\n{height}x{width}"
        if height * width == 1:
            # One number a channel: all channels, as a square, with this one framed.
            side = int(len(pooled) ** 0.5)
            shown, longest = pooled[: side * side, 0, 0].reshape(side, side), None
            y, x = divmod(channel, side)
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#22d3ee", linewidth=2))
            title = f"{label}\n1x1, {side * side} channels"
        axis.imshow(shown, cmap="magma", vmin=0, vmax=longest)
        titles.append(title)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_axis_off()
        if heads:
            axis.set_title(title, size=10)


def draw_times(axis: Any, kinds: dict[str, list[float]], shape: tuple[int, ...]) -> None:
    """Horizontal bars of the time that each kind of pooling takes."""
    bar = 0.38
    for which, (label, colour) in enumerate((("PyTorch", TORCH), ("pooling_ext", OURS))):
        places = [place + (which - 0.5) * bar for place in range(len(kinds))]
        axis.barh(places, [pair[which] for pair in kinds.values()], bar, color=colour, label=label)
        for place, pair in zip(places, kinds.values(), strict=True):
            text = f"{pair[which]:.3g} ms"
            if which:
                ratio = pair[0] / pair[1]
                text += f"   {ratio:.0f}x" if ratio >= 9.95 else f"   {ratio:.1f}x"
            style: dict[str, Any] = {"va": "center", "size": 9, "weight": "bold" if which else "normal"}
            axis.annotate(text, (pair[which], place), xytext=(5, 0), textcoords="offset points", **style)
    axis.set_yticks(range(len(kinds)), list(kinds))
    axis.set_ylim(len(kinds) - 0.4, -0.6)
    axis.set_xlim(0, 1.12 * max(max(pair) for pair in kinds.values()))
    axis.set_title(f"pooling the batch's stem, {list(shape)} float32, in inference", loc="left", size=11)
    axis.set_xlabel("milliseconds")
    axis.grid(axis="x", color=FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(loc="lower right", framealpha=1, edgecolor="white")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    resnets = [name for name in torchvision.models.list_models(torchvision.models) if "resne" in name]
    parser = argparse.ArgumentParser(
        description="A ResNet on photographs, with PyTorch's pooling and with ours."
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="your photographs; default: scikit-learn's two"
    )
    parser.add_argument(
        "--model", choices=resnets, default="resnet50", metavar="NAME", help=", ".join(resnets)
    )
    parser.add_argument("--batch", type=int, default=16, help="images in a batch (default 16)")
    parser.add_argument("--size", type=int, default=224, help="the images' side in pixels (default 224)")
    parser.add_argument("--channels-last", action="store_true", help="run the model in NHWC")
    parser.add_argument("--seed", type=int, default=0, help="for crops and weights (default 0)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default demo.png)")
    args = parser.parse_args(argv)
    if args.batch < 1 or args.size < 32:
        parser.error("--batch must be at least 1 and --size at least 32")
    return args


def run(args: argparse.Namespace) -> None:
    # First of all, so that neither contestant pays for mapping its tensors afresh.
    memory = pooling_ext.reuse_cpu_memory()
    torch.manual_seed(args.seed)
    photos = load_photos(args.images, args.batch)
    model, weights = load_model(args.model)
    x = make_batch(photos, args.batch, args.size)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    ours = copy.deepcopy(model)
    report = pooling_ext.patch(ours)

    console.print(f"[bold]{args.model}[/], {weights}", highlight=False)
    source = args.images or "scikit-learn's sample images"
    layout = "NHWC" if args.channels_last else "NCHW"
    console.print(
        f"{len(photos)} photograph{'s' * (len(photos) > 1)} ({source}), {args.batch} crops in a batch, "
        f"{args.size}x{args.size} {layout} float32; {torch.get_num_threads()} threads; {memory.reason}",
        highlight=False,
    )
    inputs = capture(model, [entry.path for entry in report.replaced], x)
    explanation = pooling_ext.explain(F.max_pool2d, x, 3)
    if explanation.backend == "aten":
        reasons = "; ".join(dict.fromkeys(explanation.decisions[0].declined.values()))
        console.print(
            f"[yellow]Our kernels are not in use: {reasons}. Both sides run PyTorch's operators, so expect "
            "speed-ups of 1. `pooling-ext info` says more.[/]",
            highlight=False,
        )
    layers = []
    with console.status("timing the pooling layers"):
        for path, given in inputs.items():
            theirs = model.get_submodule(path)
            layers.append(compare(path, type(theirs).__name__, theirs, ours.get_submodule(path), given))
    print_layers(f"Pooling layers of {args.model}: ms, largest error, MB kept for backward", layers)

    with torch.no_grad(), console.status("timing the whole model, in turn"):
        difference = (ours(x) - model(x)).abs().max().item()
        before, after = in_turn([partial(model, x), partial(ours, x)], MODEL_SECONDS)
    print_model(args.model, (before, after), layers, difference)

    stem = inputs["maxpool"]
    with torch.no_grad(), console.status("timing other pooling of the stem's feature map"):
        kinds = {
            label: in_turn([partial(theirs, stem), partial(mine, stem)], LAYER_SECONDS)
            for label, theirs, mine in pooling_kinds()
        }
    console.print(f"\n[bold]pooling_ext.patch({args.model})[/]")
    console.print(str(report), highlight=False)
    title = f"{args.model}'s stem and its pooling: PyTorch's operators and pooling_ext's"
    square = v2.Compose([v2.Resize(args.size), v2.CenterCrop(args.size)])
    draw(args.out, [square(photo) for photo in photos[:2]], stem, kinds, title)
    console.print(f"\nwrote [bold]{args.out}[/]", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    try:
        run(arguments(argv))
    except DemoError as error:
        console.print(f"[red]{error}[/]", highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
