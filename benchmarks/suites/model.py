"""The suite "model": whole torchvision models against eager PyTorch and its peers."""

from __future__ import annotations

import argparse
from functools import partial

from ..harness import suite
from ..harness.suite import DTYPES
from ..reports import model_report, plots
from ..reports.model_results import FAMILIES, FROZEN, INFERENCE, PATCHED, TRAINING, Models
from . import model_families, model_inference, model_training, model_zoo

HELP = "whole torchvision models: training step, inference, and with --all every family"

#: Part of the suite -> what adds its measurements.
PARTS = {
    TRAINING: model_training.measure_part,
    INFERENCE: model_inference.measure_part,
    FAMILIES: model_families.measure_part,
}
DEFAULT = (TRAINING, INFERENCE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suite.add_arguments(parser, "model")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help=f"what to measure; default: {' and '.join(DEFAULT)}"
    )
    parser.add_argument(
        "--all", action="store_true", help="all parts, and inference of more models; takes much longer"
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, metavar="N", help="batch sizes; default: each part's own"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--no-peers", action="store_true", help="leave torch.compile and other engines out")
    parser.add_argument(
        "--autotune", action="store_true", help="torch.compile's max-autotune too, which takes minutes"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 if one of our models gave a wrong result."""
    console = suite.make_console()
    if any(batch < 1 for batch in args.batch or ()):
        args.error(f"--batch must be at least 1, but got {args.batch}")
    suite.choose(model_zoo.known(), ["*"], args)  # for what it refuses, before anything takes time
    parts = args.parts or (tuple(PARTS) if args.all else DEFAULT)
    if args.list:
        for part, names in model_report.PLANS.items():
            console.print(f"{part:10} {', '.join(names)}", highlight=False)
        return 0
    with suite.settings(args, console) as facts:
        models = Models(facts)
        for part in parts:
            PARTS[part](models, args, console)
    document = model_report.document(models)
    name = FAMILIES if set(parts) == {FAMILIES} else "model"
    parted = name == FAMILIES or (set(parts) >= set(DEFAULT) and not args.no_peers)
    whole = parted and not (args.quick or args.cases or args.batch) and len(args.dtypes) == len(DTYPES)
    suite.finish(name, document, models.as_json(), whole, args, console, partial(plots.draw_models, models))
    return 1 if any(label.endswith((PATCHED, FROZEN)) for label in models.wrong) else 0
