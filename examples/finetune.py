"""Fine-tune a torchvision CNN on a folder of images, with pooling_ext.

    python examples/finetune.py [--data DIR] [--model resnet18] [--output DIR] [--resume]
    torchrun --nproc-per-node 2 examples/finetune.py ...

Transfer learning in two stages: a new head on a frozen backbone, then all layers. Without --data it
learns scikit-learn's handwritten digits. Every epoch ends with a checkpoint to resume from.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pooling_ext

try:
    from rich.console import Console
    from rich.markup import escape

    from finetune_data import DataError, Splits, message, open_splits, write_digits
    from finetune_model import ARCHITECTURES, STAGES, make_model, make_pretrained, synchronized
    from finetune_report import draw_curves, draw_predictions, print_throughput, throughput
    from finetune_training import (
        BEST,
        LAST,
        CheckpointError,
        Options,
        Processes,
        Trainer,
        load,
        place,
        place_model,
    )
except ImportError as error:
    sys.exit(f"This example needs more packages ({error}): pip install 'pooling_ext[demo]'")

#: What a checkpoint must agree with to be resumed at all; the rest makes the result another one.
NEEDED = ("model", "classes", "image_size")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune a torchvision CNN on a folder of images. The first stage trains a new head on "
        "the frozen backbone, the second one all layers. Writes last.pt and best.pt after every epoch, and "
        "curves.png and predictions.png at the end.",
        epilog="On several processes: torchrun --nproc-per-node N examples/finetune.py ...; the batch size "
        "and the workers are those of each process.",
        formatter_class=partial(argparse.HelpFormatter, width=100),
    )
    switch: Any = argparse.BooleanOptionalAction

    data = parser.add_argument_group("images")
    data.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="has train/CLASS/ and valid/CLASS/, with the same classes; default: scikit-learn's digits",
    )
    data.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="JSON, class folder to name; default: DIR/cat_to_name.json if it is there",
    )
    data.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="default 224, inception_v3 299; for the digits the least that the model takes, 32 mostly",
    )
    data.add_argument("--flip", action=switch, help="mirror images at random; default: all but digits")
    data.add_argument("--limit", type=int, metavar="N", help="only the first N images of each class")
    data.add_argument("--workers", type=int, metavar="N", help="that load images; default: half the cores")

    model = parser.add_argument_group("model")
    names = list(ARCHITECTURES)
    model.add_argument("--model", choices=names, default=names[0], metavar="NAME", help=", ".join(names))
    model.add_argument(
        "--pretrained",
        action=switch,
        default=True,
        help="start from ImageNet's weights if they can be had (default)",
    )
    model.add_argument("--no-patch", action="store_true", help="train on PyTorch's operators")
    model.add_argument("--channels-last", action=switch, default=True, help="run in NHWC (default)")
    model.add_argument("--bf16", action="store_true", help="bfloat16 autocast")

    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs-head", type=int, metavar="N", help="length of the first stage; default 5, digits 1"
    )
    training.add_argument(
        "--epochs-all", type=int, metavar="N", help="length of the second stage; default 10, digits 9"
    )
    training.add_argument("--batch-size", type=int, default=32, metavar="N", help="default 32")
    training.add_argument(
        "--lr",
        type=float,
        default=1e-3,
        help="of Adam; pretrained weights get a tenth in the second stage (default 0.001)",
    )
    training.add_argument(
        "--lr-step", type=int, default=7, metavar="N", help="epochs after which it is a tenth (default 7)"
    )
    training.add_argument("--seed", type=int, default=0, help="of weights, order and crops (default 0)")

    run = parser.add_argument_group("run")
    run.add_argument(
        "--output", type=Path, default=Path("finetuned"), metavar="DIR", help="default: finetuned"
    )
    run.add_argument("--resume", action="store_true", help="go on after the last finished epoch in --output")
    run.add_argument("--overwrite", action="store_true", help="start again although --output is unfinished")
    run.add_argument(
        "--timing",
        type=float,
        default=10,
        metavar="SECONDS",
        help="for each throughput at the end, 0 to leave it out (default 10)",
    )

    args = parser.parse_args(argv)
    _fill_in(args)
    _check(parser, args)
    return args


def _fill_in(args: argparse.Namespace) -> None:
    digits, architecture = args.data is None, ARCHITECTURES[args.model]
    if args.image_size is None:
        args.image_size = architecture.least_size if digits else architecture.image_size
    if args.flip is None:
        args.flip = not digits
    if args.epochs_head is None:
        args.epochs_head = 1 if digits else 5
    if args.epochs_all is None:
        args.epochs_all = 9 if digits else 10
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        args.workers = min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // 2)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    least = {
        "image_size": ARCHITECTURES[args.model].least_size,
        "limit": 1,
        "workers": 0,
        "epochs_head": 0,
        "epochs_all": 0,
        "batch_size": 2,
        "lr_step": 1,
        "seed": 0,
        "timing": 0,
    }
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not value >= bound:
            of = f" for {args.model}" if name == "image_size" else ""
            parser.error(f"--{name.replace('_', '-')} must be at least {bound}{of}, got {value}")
    if not 0 < args.lr < float("inf"):
        parser.error(f"--lr must be a positive number, got {args.lr}")
    if args.epochs_head + args.epochs_all == 0:
        parser.error("--epochs-head and --epochs-all are both 0, so there is nothing to train")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")


def find_images(args: argparse.Namespace, processes: Processes) -> Splits:
    """Check the images, writing the digits if they are asked for."""
    folder = args.data or args.output / "digits"

    def look() -> Splits:
        if args.data is None:
            write_digits(folder)
        splits = open_splits(
            folder,
            args.image_size,
            cat_to_name=args.names,
            digits=args.data is None,
            flip=args.flip,
            limit=args.limit,
        )
        if len(splits.train) <= processes.count:
            who = "1 process needs" if processes.count == 1 else f"{processes.count} processes need"
            raise DataError(f"{splits.train.root}: {who} at least {processes.count + 1} images")
        return splits

    return processes.on_first(look)


def settings_of(args: argparse.Namespace, classes: list[str], processes: Processes) -> dict[str, Any]:
    """What the result depends on, kept in the checkpoints and compared by --resume."""
    names = ("model", "image_size", "flip", "limit", "no_patch", "channels_last", "bf16")
    names += ("batch_size", "lr", "lr_step", "seed")
    settings = {name: getattr(args, name) for name in names}
    return settings | {"classes": classes, "processes": processes.count}


def find_checkpoint(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint to go on from, or none with ``--output`` clear for a new run.

    Raises:
        CheckpointError: there is none, it is of another model, or a run that is not to be resumed would be
            written over before its end.
    """
    last, best = args.output / LAST, args.output / BEST
    if args.resume:
        checkpoint = load(last)
        load(best)
        for name in NEEDED:
            if checkpoint["settings"][name] != settings[name]:
                was = checkpoint["settings"][name]
                raise CheckpointError(f"{last} is of another run: its {name} is {was}, not {settings[name]}")
        return checkpoint
    if last.exists() and not args.overwrite and not load(last)["finished"]:
        raise CheckpointError(
            f"{last} is of an unfinished run: --resume goes on with it, --overwrite starts again"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    # So that the two are always of one run.
    last.unlink(missing_ok=True)
    best.unlink(missing_ok=True)
    return None


def start_model(args: argparse.Namespace, classes: int, processes: Processes) -> tuple[nn.Module, bool, str]:
    """A model with a new head, whether its weights are pretrained, and that in words."""
    why = "--no-pretrained"
    if args.pretrained:
        model, why = processes.on_first(partial(make_pretrained, args.model, classes))
        if why is None:
            return model, True, "pretrained on ImageNet"
    return make_model(args.model, classes), False, f"initialized at random ({why})"


def run(args: argparse.Namespace, processes: Processes, console: Console) -> None:
    # Before anything is timed, so that no operator pays for mapping its tensors afresh.
    pooling_ext.reuse_cpu_memory()
    torch.manual_seed(args.seed)
    splits = find_images(args, processes)
    settings = settings_of(args, splits.classes, processes)
    checkpoint = processes.on_first(partial(find_checkpoint, args, settings))
    if checkpoint is None:
        model, pretrained, weights = start_model(args, len(splits.classes), processes)
    else:
        model = make_model(args.model, len(splits.classes))
        pretrained, weights = checkpoint["pretrained"], f"from {args.output / LAST}"
        changed = [name for name, value in settings.items() if checkpoint["settings"].get(name) != value]
        if changed:
            console.print(
                f"[yellow]Changed since that checkpoint: {', '.join(changed)}. The result will not be that "
                "of a single run.[/]"
            )
    console.print(f"[bold]{args.model}[/], {escape(weights)}", highlight=False, soft_wrap=True)
    options = Options(
        epochs=dict(zip(STAGES, (args.epochs_head, args.epochs_all), strict=True)),
        # What is pretrained needs smaller steps than what is new.
        lr=dict(zip(STAGES, (args.lr, args.lr / 10 if pretrained else args.lr), strict=True)),
        lr_step=args.lr_step,
        batch_size=args.batch_size,
        seed=args.seed,
        bf16=args.bf16,
        channels_last=args.channels_last,
        workers=args.workers,
        pretrained=pretrained,
    )
    model = to_train(model, args, processes, console)
    describe(args, splits, processes, console)
    facts = {"settings": settings, "names": splits.names, "pretrained": pretrained}
    trainer = Trainer(
        model, args.model, splits.train, splits.valid, options, processes, args.output, facts, console
    )
    if checkpoint is not None:
        trainer.resume(checkpoint)
        console.print(f"going on after {len(trainer.history)} epochs", highlight=False)
    trainer.fit()
    processes.stop()
    if processes.first:
        report(args, splits, trainer, console)


def to_train(model: nn.Module, args: argparse.Namespace, processes: Processes, console: Console) -> nn.Module:
    """``model`` on its device, with SyncBatchNorm if there are several processes, and patched."""
    model = place_model(model, processes.device, args.channels_last)
    if processes.count > 1:
        trial = torch.zeros(2, 3, args.image_size, args.image_size)
        trial = place(trial, processes.device, args.channels_last)
        model, why = synchronized(model, trial, patched=not args.no_patch)
        layers = sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        if why is not None:
            text = f"BatchNorm is not synchronized, so each process normalizes by its own batch: {why}"
        else:
            text = f"SyncBatchNorm in {layers} layers: all processes' batches are normalized as one"
        if why is not None or layers:
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    if not args.no_patch:
        patched = pooling_ext.patch(model)
        console.print(
            f"pooling_ext.patch: {len(patched.replaced)} replaced, {len(patched.skipped)} skipped",
            highlight=False,
        )
    return model


def describe(args: argparse.Namespace, splits: Splits, processes: Processes, console: Console) -> None:
    source = args.data or "scikit-learn's handwritten digits"
    kind = f"{'NHWC' if args.channels_last else 'NCHW'} {'bfloat16' if args.bf16 else 'float32'}"
    where = f"{processes.count} process{'es' * (processes.count > 1)} on {processes.device.type}"
    console.print(
        f"{len(splits.train)} training and {len(splits.valid)} validation images in {len(splits.classes)} "
        f"classes ({source}), {args.image_size}x{args.image_size} {kind}; {where}, {torch.get_num_threads()} "
        f"thread{'s' * (torch.get_num_threads() > 1)}, {args.workers} worker{'s' * (args.workers != 1)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def report(args: argparse.Namespace, splits: Splits, trainer: Trainer, console: Console) -> None:
    """Draw and time the best model of all epochs."""
    best = load(args.output / BEST)
    options, device = trainer.options, trainer.processes.device
    model = place_model(make_model(args.model, len(splits.classes)), device, options.channels_last)
    model.load_state_dict(best["model"])
    title = f"{args.model}: {trainer.best:.1%} of {len(splits.valid)} validation images right"
    console.print(
        f"\n[bold]best validation accuracy {trainer.best:.2%}[/], after epoch {len(best['history'])} of "
        f"{len(trainer.history)}; {sum(epoch.seconds for epoch in trainer.history):.0f} s in all",
        highlight=False,
    )
    curves, predictions = args.output / "curves.png", args.output / "predictions.png"
    draw_curves(curves, trainer.history, title)
    draw_predictions(predictions, model, splits, options, device, title)
    wrote = ", ".join(str(path) for path in (args.output / BEST, args.output / LAST, curves, predictions))
    if args.timing:
        images, targets = next(iter(trainer.train_loader))
        images = place(images, device, options.channels_last)
        with console.status("timing with and without the patch, in turn"):
            rates = throughput(model, images, targets.to(device), options, args.timing)
        print_throughput(console, rates, f"{args.model}, batches of {len(images)}")
    console.print(f"wrote {wrote}", highlight=False, markup=False, soft_wrap=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    args = arguments(argv)
    errors = Console(stderr=True, style="red", soft_wrap=True, markup=False, highlight=False)
    # A terminated run ends like one stopped by Ctrl-C, also when torchrun stops its processes.
    before = signal.signal(signal.SIGTERM, _interrupt)
    processes = Processes.start()
    try:
        run(args, processes, Console(quiet=not processes.first))
    except (DataError, CheckpointError) as error:
        errors.print(message(error))
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        errors.print(f"{error.filename}: {error.strerror}")
        return 2
    except RuntimeError as error:
        if not processes.lost_another(error):
            raise
        errors.print(f"Process {processes.rank} ends because another one did.")
        return 1
    except KeyboardInterrupt:
        if processes.first:
            last = args.output / LAST
            how = f"the same command with --resume goes on after the last finished epoch, from {last}"
            nothing = "no epoch was finished, so there is nothing to resume"
            errors.print(f"Interrupted: {how if last.exists() else nothing}.")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
