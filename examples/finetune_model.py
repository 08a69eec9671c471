"""The models that finetune.py trains: torchvision's, with a new head, in its two stages."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import pooling_ext
from pretrained import load_pretrained

#: Stage one trains the new head on a frozen backbone, stage two all layers.
STAGES = ("head", "all")


@dataclass(frozen=True)
class Architecture:
    """A model of torchvision: where its last layers are, and which sizes of image it takes."""

    name: str
    heads: tuple[str, ...]
    image_size: int = 224
    least_size: int = 32


RESNETS = [Architecture(f"resnet{depth}", ("fc",)) for depth in (18, 34, 50, 101, 152)]
ARCHITECTURES = {architecture.name: architecture for architecture in RESNETS} | {
    "alexnet": Architecture("alexnet", ("classifier.6",), least_size=63),
    "vgg11_bn": Architecture("vgg11_bn", ("classifier.6",)),
    "squeezenet": Architecture("squeezenet1_1", ("classifier.1",)),
    "densenet121": Architecture("densenet121", ("classifier",)),
    "inception_v3": Architecture("inception_v3", ("fc", "AuxLogits.fc"), image_size=299, least_size=299),
}


def make_model(name: str, classes: int) -> nn.Module:
    """``name`` with initialized weights and ``classes`` outputs."""
    model = _build(name)
    _replace_heads(model, name, classes)
    return model


def make_pretrained(name: str, classes: int) -> tuple[nn.Module, str | None]:
    """``name`` with ImageNet's weights if they can be had, and a new head; and if not, why not."""
    model = _build(name)
    why = load_pretrained(model, ARCHITECTURES[name].name)
    _replace_heads(model, name, classes)
    return model, why


def _build(name: str) -> nn.Module:
    # The normalization of the pretrained Inception is its own, and it can undo ImageNet's.
    more = {"init_weights": True, "transform_input": True} if name == "inception_v3" else {}
    return torchvision.models.get_model(ARCHITECTURES[name].name, weights=None, **more)


def _replace_heads(model: nn.Module, name: str, classes: int) -> None:
    for path in ARCHITECTURES[name].heads:
        old = model.get_submodule(path)
        if isinstance(old, nn.Conv2d):
            head = nn.Conv2d(old.in_channels, classes, kernel_size=1)
        else:
            assert isinstance(old, nn.Linear)
            head = nn.Linear(old.in_features, classes)
        # Small, so that no class is preferred at first and squeezenet's ReLU after it lets gradients through.
        nn.init.normal_(head.weight, std=0.01)
        assert head.bias is not None
        nn.init.zeros_(head.bias)
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, head)


def set_stage(model: nn.Module, name: str, stage: str) -> list[nn.Parameter]:
    """Choose the parameters that ``stage`` trains, and return them."""
    model.requires_grad_(stage == "all")
    for path in ARCHITECTURES[name].heads:
        model.get_submodule(path).requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def set_training(model: nn.Module, pretrained: bool) -> None:
    """Put ``model`` into training mode, and what is frozen of its pretrained weights into eval mode.

    A frozen BatchNorm in training mode would normalize by each batch and move its running statistics, so
    the features under the head would change all the time. Initialized weights have no statistics worth
    keeping: in eval mode, BatchNorm would not normalize at all. Where all is trained, nothing is frozen.
    """
    model.train()
    if not pretrained or all(parameter.requires_grad for parameter in model.parameters()):
        return
    for module in model.modules():
        if not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()


def loss_of(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, a scalar, and the logits, ``(N, classes)`` float32, of what a model returns.

    In training, Inception returns the logits of its auxiliary head too, which count 0.4 as in its paper
    (Szegedy et al., 2015).
    """
    auxiliary = None
    if not isinstance(outputs, Tensor):
        outputs, auxiliary = outputs
    logits = outputs.float()
    loss = nn.functional.cross_entropy(logits, targets)
    if auxiliary is not None:
        loss = loss + 0.4 * nn.functional.cross_entropy(auxiliary.float(), targets)
    return loss, logits


def synchronized(model: nn.Module, images: Tensor, patched: bool) -> tuple[nn.Module, str | None]:
    """``model`` with SyncBatchNorm in place of BatchNorm; or as it was, and why, where that cannot run.

    PyTorch's SyncBatchNorm refuses tensors on the CPU, where it takes a patched model, and trying is the way
    to know whether the patch reaches every one of them. All processes have to call this, and come to the
    same answer.

    Args:
        images: a batch to try it on, ``(N, 3, H, W)`` with N at least 2.
        patched: the model will be patched.
    """
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return model, None
    if images.is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model), None
    if not patched:
        return model, "PyTorch's runs on a GPU only"
    trial = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    pooling_ext.patch(trial)
    try:
        with torch.no_grad():
            trial.train()(images)
            trial.eval()(images)
    except (ValueError, NotImplementedError) as error:
        return model, str(error).partition(". ")[0]
    return nn.SyncBatchNorm.convert_sync_batchnorm(model), None
