"""One of several processes that train by DistributedDataParallel; test_conv_training_modes.py starts them.

    python ddp_worker.py RANK WORLD RENDEZVOUS RESULTS

Each takes its part of a batch that all can make, and saves its gradients to ``RESULTS.RANK``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from processes import work
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training_cases import ResNet, batch, preferring_ours, ran

import pooling_ext
from pooling_ext.ops.conv_bn_act.implementations import from_size

#: What the batch norms do: statistics of each process's part, of the whole batch, or constants.
NORMS = ("own", "synchronized", "constant")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BATCH = 8


def make(norms: str, layout: str) -> nn.Module:
    """The model, with the same parameters in every process."""
    torch.manual_seed(0)
    model: Any = ResNet(64).double().to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.train(norms != "constant")
    return model


def step(norms: str, layout: str, part: slice) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The gradients of a step, and which of our operators made them."""
    model = make(norms, layout)
    if norms == "synchronized":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    pooling_ext.patch(model)
    # PyTorch's SyncBatchNorm is for GPUs, so DistributedDataParallel refuses one on the CPU.
    synchronized: list[nn.Module] = [m for m in model.modules() if type(m) is nn.SyncBatchNorm]
    for module in synchronized:
        module.__class__ = nn.BatchNorm2d
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=layout == "contiguous")
    for module in synchronized:
        module.__class__ = nn.SyncBatchNorm
    images, labels = batch(BATCH, torch.float64)
    images = images.contiguous(memory_format=LAYOUTS[layout])
    _, kernels = ran(lambda: F.cross_entropy(parallel(images[part]), labels[part]).backward())
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, dict(kernels)


def run(rank: int, world: int) -> dict[tuple[str, str], Any]:
    size = BATCH // world
    part = slice(rank * size, (rank + 1) * size)
    with preferring_ours(), from_size(0):
        return {(norms, layout): step(norms, layout, part) for norms in NORMS for layout in LAYOUTS}


if __name__ == "__main__":
    work(run)
