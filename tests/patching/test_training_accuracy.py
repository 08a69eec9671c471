"""Training with our kernels ends where training without them does."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_cases import ResNet, assert_trained_by_winograd, preferring_ours, ran

import pooling_ext

pytestmark = pytest.mark.native

EPOCHS, BATCH, RATE = 5, 64, 0.05


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Scikit-learn's handwritten digits, 8x8 pixels: those to learn from, and a fifth of them to ask for."""
    load_digits: Any = pytest.importorskip("sklearn.datasets").load_digits
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)[order] / 8 - 1
    labels = torch.tensor(data.target)[order]
    asked = len(order) // 5
    return (images[asked:], labels[asked:]), (images[:asked], labels[:asked])


def fit(kind: str) -> tuple[float, list[float], dict[str, int]]:
    """The accuracy that a network reaches, its losses, and the kernels of its first step."""
    torch.manual_seed(0)
    model = ResNet(16, colors=1)
    if kind != "unpatched":
        pooling_ext.patch(model, exact=kind == "exact")
    (images, labels), (asked, answers) = digits()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, EPOCHS * len(images) // BATCH)
    losses: list[float] = []

    def step(indices: Tensor) -> None:
        loss = F.cross_entropy(model(images[indices]), labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

    kernels: dict[str, int] = {}
    for _ in range(EPOCHS):
        for indices in torch.randperm(len(images)).split(BATCH):
            if losses:
                step(indices)
            else:
                _, kernels = ran(lambda indices=indices: step(indices))
    with torch.no_grad():
        return float((model.eval()(asked).argmax(1) == answers).float().mean()), losses, kernels


@pytest.mark.no_poison  # which takes longer than such small layers
def test_training_ends_at_the_same_accuracy():
    """From one seed, unpatched, patched, and patched without Winograd."""
    with preferring_ours():
        accuracy, losses, none = fit("unpatched")
        found = {kind: fit(kind) for kind in ("patched", "exact")}
    assert accuracy >= 0.96 and not none
    for kind, (reached, others, kernels) in found.items():
        assert reached >= 0.96 and abs(reached - accuracy) <= 0.02, kind
        # Rounding is all that differs, though it grows from step to step.
        torch.testing.assert_close(others[:5], losses[:5], rtol=1e-3, atol=0)
        assert sum(others) == pytest.approx(sum(losses), rel=0.1), kind
        if kind == "patched":
            assert_trained_by_winograd(kernels)
        else:
            assert not any(name.startswith("winograd") for name in kernels)
