"""The suite "model": whole torchvision models against eager PyTorch and its peers."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch
from rich.console import Console

HELP = "whole torchvision models: inference"

#: Part of the suite -> module with ``run(args, console) -> int``.
PARTS: dict[str, str] = {
    "inference": "benchmarks.model_inference",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure; default: all"
    )
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help="torchvision's names; default: each part's own"
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, metavar="N", help="batch sizes; default: each part's own"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="fewer models, one batch size, short runs")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads for all; default: torch's own choice"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave other engines out")
    parser.add_argument(
        "--autotune", action="store_true", help="torch.compile's max-autotune too, which takes minutes"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write each part's JSON and markdown here. Without it a run of the default models and batch "
        "sizes goes to benchmarks/results/, another one nowhere",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; the highest of the parts' exit statuses."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    for name in ("threads", "batch"):
        values = getattr(args, name)
        if any(value < 1 for value in (values if isinstance(values, list) else [values or 1])):
            console.print(f"[red]--{name} must be at least 1, but got {values}[/]")
            return 2
    return max(importlib.import_module(PARTS[part]).run(args, console) for part in args.parts)
