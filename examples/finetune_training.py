"""The training loop of finetune.py: epochs on one process or several, and checkpoints that outlive them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from finetune_model import STAGES, loss_of, set_stage, set_training

LAST, BEST = "last.pt", "best.pt"
T = TypeVar("T")


class CheckpointError(Exception):
    """A checkpoint that cannot be used; names the file."""


@dataclass(frozen=True)
class Processes:
    """This process and those that train with it; one alone needs no torchrun."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def start(cls) -> Processes:
        """Join the processes that torchrun started, if it did."""
        rank, count, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if count > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, max(count, 1), device)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """What ``work()`` gives in the first process, in each of them; if it fails they all end."""
        result, failed = None, False
        if self.first:
            try:
                result = work()
            except Exception:
                self._share([None, True])
                raise
        result, failed = self._share([result, failed])
        if failed:
            raise SystemExit(2)  # the first one says why
        return result

    def _share(self, objects: list[Any]) -> list[Any]:
        if self.count > 1:
            dist.broadcast_object_list(objects, device=self.device)
        return objects

    def sum(self, values: Tensor) -> Tensor:
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def same_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers: without SyncBatchNorm each has its own statistics."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def lost_another(self, error: RuntimeError) -> bool:
        """Whether ``error`` comes of another process that has ended."""
        return self.count > 1 and any(text in str(error) for text in ("by peer", "remote process"))

    def stop(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()


@dataclass(frozen=True)
class Options:
    """What the result depends on, apart from the images. ``batch_size`` and ``workers`` are per process."""

    epochs: dict[str, int]
    lr: dict[str, float]
    lr_step: int
    batch_size: int
    seed: int
    bf16: bool
    channels_last: bool
    workers: int
    pretrained: bool


@dataclass(frozen=True)
class Epoch:
    """A line of the history. Losses are means over images, accuracies fractions of them."""

    stage: str
    lr: float
    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float
    seconds: float

    def text(self) -> str:
        return (
            f"train {self.train_loss:.3f} {self.train_accuracy:7.2%}   "
            f"valid {self.valid_loss:.3f} {self.valid_accuracy:7.2%}   {self.seconds:.1f} s"
        )


def save(path: Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint in one step: whatever happens, ``path`` is the old or the new one, whole."""
    aside = path.with_name(path.name + ".partial")
    try:
        with open(aside, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; it may come from another machine, so it can hold only plain data."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path}") from None
    except Exception as error:  # whatever unpickling damaged bytes leads to
        raise CheckpointError(f"{path} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if not isinstance(contents, dict) or not {"model", "settings", "history"} <= contents.keys():
        raise CheckpointError(f"{path} is not a checkpoint of this example")
    return contents


class Trainer:
    """Trains a model in two stages and writes ``last.pt`` and ``best.pt`` into a folder after every epoch.

    Each epoch seeds its random numbers from ``options.seed``, the number of the epoch and the rank, so what
    an epoch does depends only on the checkpoint before it, and none of the generators has to be saved.

    Args:
        model: on the device of ``processes``, patched or not. Its state_dict is what is saved.
        architecture: its name in finetune_model.ARCHITECTURES.
        train, valid: data sets of images and classes.
        facts: goes into both checkpoints.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: str,
        train: Dataset[Any],
        valid: Dataset[Any],
        options: Options,
        processes: Processes,
        folder: Path,
        facts: dict[str, Any],
        console: Console,
    ) -> None:
        self.model, self.architecture = model, architecture
        self.options, self.processes, self.console = options, processes, console
        self.folder, self.facts = folder, facts
        self.history: list[Epoch] = []
        self._resumed: dict[str, Any] | None = None
        rank, count = processes.rank, processes.count
        images, batch = len(train), options.batch_size  # type: ignore[arg-type]
        self.sampler = DistributedSampler(train, count, rank, shuffle=True, seed=options.seed)
        common: dict[str, Any] = {
            "num_workers": options.workers,
            "pin_memory": processes.device.type == "cuda",
        }
        # BatchNorm cannot train on a last batch of one image; a set smaller than a batch is one batch.
        batch = min(batch, -(-images // count))
        self.train_loader = DataLoader(train, batch, sampler=self.sampler, drop_last=True, **common)
        # A DistributedSampler would count some images twice to give every process as many.
        share = Subset(valid, range(rank, len(valid), count))  # type: ignore[arg-type]
        self.valid_loader = DataLoader(share, options.batch_size, **common)

    @property
    def best(self) -> float:
        """The best validation accuracy so far."""
        return max((epoch.valid_accuracy for epoch in self.history), default=-1.0)

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Go on after the last epoch of ``checkpoint``."""
        self.model.load_state_dict(checkpoint["model"])
        self.history = [Epoch(**epoch) for epoch in checkpoint["history"]]
        self._resumed = checkpoint

    def left(self, stage: str) -> int:
        """How many epochs of ``stage`` are still to be done; none if a later stage has begun."""
        done = [epoch.stage for epoch in self.history]
        if any(later in done for later in STAGES[STAGES.index(stage) + 1 :]):
            return 0
        return max(0, self.options.epochs[stage] - done.count(stage))

    def fit(self) -> None:
        for stage in STAGES:
            if self.left(stage):
                self._fit_stage(stage)

    def _fit_stage(self, stage: str) -> None:
        count = self.options.epochs[stage]
        done = count - self.left(stage)
        parameters = set_stage(self.model, self.architecture, stage)
        optimizer = torch.optim.Adam(parameters, lr=self.options.lr[stage])
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, self.options.lr_step)
        if done and self._resumed is not None:
            optimizer.load_state_dict(self._resumed["optimizer"])
            scheduler.load_state_dict(self._resumed["scheduler"])
        model = self.model
        if self.processes.count > 1:
            # Made anew for each stage, since it looks at requires_grad once.
            with as_batch_norm(model):
                model = DistributedDataParallel(model)
        for number in range(done, count):
            start = time.perf_counter()
            self._seed()
            lr = float(scheduler.get_last_lr()[0])
            with self._progress(f"{stage} {number + 1}/{count}") as progress:
                train_loss, train_accuracy = self._train(model, optimizer, progress)
                self.processes.same_buffers(self.model)
                valid_loss, valid_accuracy = self._validate(progress)
            scheduler.step()
            seconds = time.perf_counter() - start
            epoch = Epoch(stage, lr, train_loss, train_accuracy, valid_loss, valid_accuracy, seconds)
            better = epoch.valid_accuracy > self.best
            self.history.append(epoch)
            if self.processes.first:
                self._save(optimizer, scheduler, better)
            # After it is saved: what has been shown can be resumed.
            mark = "   best" if better else ""
            self.console.print(
                f"{stage:>4} {number + 1:2}/{count}   {epoch.text()}{mark}", soft_wrap=True, highlight=False
            )

    def _seed(self) -> None:
        self.sampler.set_epoch(len(self.history))
        torch.manual_seed((self.options.seed * 10_007 + len(self.history)) * 1_009 + self.processes.rank)

    def _train(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
    ) -> tuple[float, float]:
        set_training(self.model, self.options.pretrained)
        totals = torch.zeros(3, dtype=torch.float64, device=self.processes.device)
        for images, targets in progress.track(self.train_loader, description="train"):
            images, targets = self._place(images), targets.to(self.processes.device, non_blocking=True)
            with self._autocast():
                outputs = model(images)
            loss, logits = loss_of(outputs, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            totals += tally(loss, logits, targets)
        return means(self.processes.sum(totals))

    @torch.no_grad()
    def _validate(self, progress: Progress) -> tuple[float, float]:
        # Not through DistributedDataParallel: the processes may have different numbers of batches.
        self.model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.processes.device)
        for images, targets in progress.track(self.valid_loader, description="valid"):
            targets = targets.to(self.processes.device, non_blocking=True)
            with self._autocast():
                outputs = self.model(self._place(images))
            totals += tally(*loss_of(outputs, targets), targets)
        return means(self.processes.sum(totals))

    def _place(self, images: Tensor) -> Tensor:
        return place(images, self.processes.device, self.options.channels_last)

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.processes.device, self.options.bf16)

    def _progress(self, label: str) -> Progress:
        columns = (
            TextColumn(f"{label} {{task.description}}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        shown = self.processes.first and self.console.is_terminal
        return Progress(*columns, console=self.console, transient=True, disable=not shown)

    def _save(self, optimizer: Any, scheduler: Any, better: bool) -> None:
        history = [asdict(epoch) for epoch in self.history]
        state = {**self.facts, "model": self.model.state_dict(), "history": history}
        # The best first: stopped between the two, the epoch is done again and leads to the same.
        if better:
            save(self.folder / BEST, state)
        state |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        state["finished"] = not any(map(self.left, STAGES))
        save(self.folder / LAST, state)


@contextmanager
def as_batch_norm(model: nn.Module) -> Iterator[None]:
    """Let the SyncBatchNorm in ``model`` pass for BatchNorm.

    PyTorch's own runs on a GPU only, so DistributedDataParallel refuses to wrap a model on the CPU that has
    one, though a patched model runs it there.
    """
    modules: list[nn.Module] = [module for module in model.modules() if type(module) is nn.SyncBatchNorm]
    try:
        for module in modules:
            module.__class__ = nn.BatchNorm2d
        yield
    finally:
        for module in modules:
            module.__class__ = nn.SyncBatchNorm


def place(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """``images`` on ``device``, in NHWC or NCHW."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(device, non_blocking=True).contiguous(memory_format=layout)


def place_model(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """``model`` on ``device``, its weights laid out for NHWC or NCHW."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(device).to(memory_format=layout)


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def tally(loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over a batch, ``(3,)`` float64: losses, right answers, images."""
    right = (logits.argmax(1) == targets).sum()
    count = torch.full_like(right, len(targets))
    return torch.stack([loss.detach() * count, right, count]).double()


def means(totals: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy from the sums of :func:`tally`."""
    loss, right, count = totals.tolist()
    return loss / count, right / count
