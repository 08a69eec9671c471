"""The fine-tuning's models: their heads, what a stage trains, and synchronized batch norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from finetune_cases import Tiny
from torch import nn

import finetune_model


@pytest.mark.parametrize("name", list(finetune_model.ARCHITECTURES))
@pytest.mark.parametrize("stage", finetune_model.STAGES)
def test_heads(name: str, stage: str) -> None:
    with torch.device("meta"):
        model = finetune_model.make_model(name, 7)
        architecture = finetune_model.ARCHITECTURES[name]
        images = torch.empty(2, 3, architecture.least_size, architecture.least_size)
        trained = finetune_model.set_stage(model, name, stage)
        finetune_model.set_training(model, pretrained=False)
        loss, logits = finetune_model.loss_of(model(images), torch.empty(2, dtype=torch.int64))
    assert loss.shape == ()
    assert logits.shape == (2, 7)
    heads = [model.get_submodule(path) for path in architecture.heads]
    expected = (
        list(model.parameters()) if stage == "all" else [p for head in heads for p in head.parameters()]
    )
    assert {id(p) for p in trained} == {id(p) for p in expected}


def test_inception_trains_its_auxiliary_head() -> None:
    torch.manual_seed(0)
    model = finetune_model.make_model("inception_v3", 5)
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    finetune_model.set_stage(model, "inception_v3", "head")
    finetune_model.set_training(model, pretrained=True)
    outputs = model(torch.randn(2, 3, 299, 299))
    targets = torch.tensor([0, 4])
    loss, _ = finetune_model.loss_of(outputs, targets)
    cross_entropy = nn.functional.cross_entropy
    expected = cross_entropy(outputs.logits, targets) + 0.4 * cross_entropy(outputs.aux_logits, targets)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"fc.weight", "fc.bias", "AuxLogits.fc.weight", "AuxLogits.fc.bias"}
    # Frozen BatchNorm keeps its statistics.
    for name, value in model.named_buffers():
        assert torch.equal(value, statistics[name]), name
    model.eval()
    assert isinstance(model(torch.randn(1, 3, 299, 299)), torch.Tensor)


@pytest.mark.parametrize("pretrained", [False, True])
def test_only_the_second_stage_changes_pretrained_statistics(tiny: str, pretrained: bool) -> None:
    model = finetune_model.make_model(tiny, 3)
    for stage, training in (("head", not pretrained), ("all", True)):
        finetune_model.set_stage(model, tiny, stage)
        finetune_model.set_training(model, pretrained)
        assert model.training and model.get_submodule("fc").training
        assert model.get_submodule("features.1").training == training
        assert model.get_submodule("dropout").training == training


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Untraceable(Tiny):
    """Looks at its data, so that the patch reaches its BatchNorm alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.bn(x) if x.sum() < torch.inf else x)


@pytest.mark.native
@pytest.mark.parametrize(("build", "patched"), [(Tiny, True), (Tiny, False), (Untraceable, True)])
def test_batch_norm_is_synchronized_where_it_can_be(group: None, build: Any, patched: bool) -> None:
    model, why = finetune_model.synchronized(build(), torch.randn(2, 3, 32, 32), patched)
    converted = type(model.get_submodule("features.1")) is nn.SyncBatchNorm
    assert converted == patched
    assert (why is None) == converted


def test_nothing_to_synchronize() -> None:
    assert finetune_model.synchronized(nn.Linear(2, 2), torch.randn(2, 2), True)[1] is None
