"""``pooling-ext bench MODEL``: a model of torchvision or timm as it is beside what accelerate makes of it."""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import ArgumentError
from .api import accelerate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PHASES = ("training", "inference")
FRAMES = 16


class Model(NamedTuple):
    """A model that can be made.

    Attributes:
        make: gives the model, with random weights.
        size: rows and columns of the images that it is usually given; None where it does not say.
        frames: whether it takes videos.
    """

    make: Callable[[], nn.Module]
    size: tuple[int, int] | None
    frames: bool = False


def find(name: str) -> Model:
    """The model ``name``, of torchvision where both libraries have one; "timm/NAME" is timm's alone.

    Raises:
        ArgumentError: there is none, or it takes other inputs than images or videos.
    """
    library, _, short = name.rpartition("/")
    libraries = {"torchvision": _torchvision, "timm": _timm}
    close: list[str] = []
    for kind, look in libraries.items():
        if library in ("", kind) and find_spec(kind) is not None:
            found = look(short)
            if isinstance(found, Model):
                return found
            close += found
    missing = [kind for kind in libraries if find_spec(kind) is None]
    hint = f"; close ones: {', '.join(close)}" if close else ""
    hint += f" ({' and '.join(missing)} not installed)" if missing else ""
    raise ArgumentError(
        f"MODEL must be the name of a classifier in torchvision or timm, but got {name}{hint}"
    )


def _torchvision(name: str) -> Model | list[str]:
    import torchvision.models as models

    modules = (models, models.segmentation, models.video)
    names = [known for module in modules for known in models.list_models(module=module)]
    if name not in names:
        if name in models.list_models():
            raise ArgumentError(f"MODEL must take images alone, but {name} takes other inputs")
        return difflib.get_close_matches(name, names)
    preset: dict[str, Any] = {}
    for weights in models.get_model_weights(name):
        preset = getattr(weights.transforms, "keywords", {})
    size = preset.get("crop_size", preset.get("resize_size"))
    sides = None if size is None else (size, size) if isinstance(size, int) else (size[0], size[-1])
    extra = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    extra |= {"weights_backbone": None} if name in models.list_models(module=models.segmentation) else {}
    return Model(
        lambda: models.get_model(name, **extra), sides, name in models.list_models(module=models.video)
    )


def _timm(name: str) -> Model | list[str]:
    import timm  # pyright: ignore[reportMissingImports]

    if not timm.is_model(name):
        return difflib.get_close_matches(name, timm.list_models())
    config = timm.get_pretrained_cfg(name)
    _, *sides = (None,) if config is None else config.input_size
    size = (sides[0], sides[1]) if sides else None
    return Model(lambda: timm.create_model(name), size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="its name in torchvision or timm; timm/NAME for timm's"
    )
    parser.add_argument("--batch", type=_positive, default=16, help="images; default: 16")
    parser.add_argument("--size", type=_positive, help="pixels a side; default: what the model usually takes")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="half ones by autocast")
    parser.add_argument("--threads", type=_positive, help="default: torch's")
    parser.add_argument("--only", choices=PHASES, help="default: both, each in a process of its own")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but got {value}")
    return value


def run(arguments: Sequence[str], args: argparse.Namespace, cpu: str) -> int:
    """Measure and print; the exit status.

    Args:
        arguments: what ``args`` were parsed from.
        cpu: the processor's name.
    """
    try:
        model = find(args.model)
    except ArgumentError as error:
        print(f"pooling-ext bench: {error}", file=sys.stderr)
        return 2
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.only is not None:
        return _measure(model, args)
    print(
        f"{args.model}, {args.dtype}, {torch.get_num_threads()} threads, {cpu}, PyTorch {torch.__version__}"
    )
    sys.stdout.flush()
    command = [sys.executable, "-m", "pooling_ext.cli", "bench", *arguments]
    # Memory that one of them reuses would change what the other measures before.
    return max(subprocess.run([*command, "--only", phase]).returncode for phase in PHASES)


def _measure(found: Model, args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how weights are made
        model = found.make()
    rows, columns = (args.size, args.size) if args.size else found.size or (224, 224)
    images = torch.randn(args.batch, 3, *([FRAMES] if found.frames else []), rows, columns)
    training, dtype = args.only == "training", DTYPES[args.dtype]
    half = dtype is not torch.float32
    autocast: AbstractContextManager[Any] = torch.autocast("cpu", dtype) if half else nullcontext()
    try:
        with autocast:
            made = accelerate(
                model, images, training=training, dtype=dtype if half and not training else None
            )
    except ArgumentError as error:
        print(f"pooling-ext bench: {error}", file=sys.stderr)
        return 1
    print(made.accelerate_report, flush=True)
    return 0
