"""Processes that work together by gloo: a test starts a worker's file, and each saves what it found."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def results_of(worker: str, folder: Path, world: int, timeout: int) -> list[Any]:
    """What each of ``world`` processes found that run a file of this folder which calls :func:`work`."""
    file = Path(__file__).with_name(worker)
    processes = [
        subprocess.Popen(
            [sys.executable, str(file), str(rank), str(world), str(folder / "meet"), str(folder / "found")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"found.{rank}") for rank in range(world)]


def work(run: Callable[[int, int], Any]) -> None:
    """A process's share: saves ``run(rank, world)``, on one thread and in the group of all."""
    rank, world, rendezvous, results = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(rank, world)
    torch.save(found, f"{results}.{rank}")
    dist.destroy_process_group()
