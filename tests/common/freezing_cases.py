"""Small networks for freeze, and what a frozen one is compared by."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision
from helpers import strides
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pooling_ext
from pooling_ext.freezing.conv_allotment import convolutions as convolutions
from pooling_ext.ops import conv_choice, conv_speeds


def conv(inputs: int = 4, outputs: int = 4, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def norm(channels: int = 4, cls: type = nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A batch norm whose statistics and parameters matter."""
    layer = cls(channels)
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 1.5)
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.normal_()
    return layer


def relu_block(inputs: int = 4, outputs: int = 4) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs), norm(outputs), nn.ReLU())


def network(**children: Callable[[], Any]) -> Callable[[Any], type[nn.Module]]:
    """Make a class of a forward, under its name, so that it can be pickled; ``children`` make its own."""

    def init(self: nn.Module) -> None:
        nn.Module.__init__(self)
        for name, make in children.items():
            setattr(self, name, make())
        self.eval().requires_grad_(False)

    def make(forward: Any) -> type[nn.Module]:
        members = {"__init__": init, "forward": forward, "__module__": forward.__module__}
        return type(forward.__name__, (nn.Module,), members)

    return make


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 8, 8)))


def seeded(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """The result and the arguments afterwards, with copies of the arguments and the same random numbers."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    args, kwargs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
    with torch.no_grad():
        result = model(*args, **kwargs)
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, result), args, kwargs


def assert_close(found: Any, expected: Any, tolerance: float = 1e-4, layout: bool = True) -> None:
    """Nests are of the same types, and their tensors of the same values, dtypes and strides."""
    ours, spec = pytree.tree_flatten(found)
    theirs, other = pytree.tree_flatten(expected)
    assert spec == other
    for one, reference in zip(ours, theirs, strict=True):
        assert type(one) is type(reference)
        if not isinstance(reference, Tensor):
            assert one == reference
            continue
        size = float(reference.abs().max()) if reference.numel() else 0.0
        torch.testing.assert_close(one, reference, rtol=tolerance, atol=tolerance * max(size, 1e-3))
        assert not layout or strides(one) == strides(reference)


def other_images(x: Any) -> list[Any]:
    """Calls like that with ``x``: other values, another batch size and another image size."""
    if not isinstance(x, Tensor):
        return [pytree.tree_map(lambda x: 0.5 - x, x)]
    batch = [torch.randn(3, *x.shape[1:])] if x.dim() == 4 else []
    return [0.5 - x, *batch, torch.randn(*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 3)]


def assert_frozen(
    model: nn.Module, *args: Any, tolerance: float = 1e-4, layout: bool = True, **options: Any
) -> Any:
    """Freeze ``model``; the result, and what it is pickled to, do as the model does, call after call.

    Calls that the model does not take are errors of the frozen one too.

    Returns:
        the frozen model.
    """
    before = copy.deepcopy(model.state_dict())
    frozen = pooling_ext.freeze(model, args if len(args) > 1 else args[0], **options)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    twin = pickle.loads(pickle.dumps(frozen))
    calls = [args, *((x,) for x in other_images(args[0]))] if len(args) == 1 else [args]
    for call in calls:
        try:
            expected = seeded(model, *call)
        except RuntimeError:
            for fast in (frozen, twin):
                with np.testing.assert_raises((RuntimeError, ValueError)):
                    seeded(fast, *call)
            continue
        for fast in (frozen, twin):
            assert_close(seeded(fast, *call), expected, tolerance, layout)
    return frozen


def is_whole(frozen: Any) -> bool:
    """Whether the model was frozen as one region."""
    return type(frozen.body).__name__ == "Region"


def norms_left(frozen: nn.Module) -> list[nn.Module]:
    """Batch norms that a frozen model still runs."""
    return [module for module in frozen.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


#: That layers take in, or that follow them.
ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.Hardtanh(-0.5, 0.7),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.LeakyReLU(0.2),
    nn.Sigmoid(),
    nn.Tanh(),
]


def ways(frozen: nn.Module) -> list[str]:
    return [layer.way for layer in convolutions(frozen)]


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def set_winograd(monkeypatch: Any, off: bool = False, amx: bool = False) -> None:
    """Whether POOLING_EXT_WINOGRAD=0 is set, and whether the processor has AMX.

    Depthwise kernels count as slower for planes of 28 pixels and more, whatever was measured.
    """
    monkeypatch.setattr(
        conv_speeds,
        "speedup",
        lambda kernels, conv, phase: (0.5, True) if kernels == "depthwise" and conv.size[0] >= 28 else None,
    )
    monkeypatch.delenv("POOLING_EXT_WINOGRAD_MIB", raising=False)
    for name, value in (
        ("SWITCHED_OFF", off),
        ("HAS_AMX", amx),
    ):
        monkeypatch.setattr(conv_choice, name, value)


def randomize(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and parameters that matter."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return model


def build(name: str) -> nn.Module:
    if name.startswith(("alexnet", "vgg")):
        return randomize(with_narrow_head(name))
    extra = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    return randomize(torchvision.models.get_model(name, **extra))


def with_narrow_head(name: str) -> nn.Module:
    """Of 4096 hidden features 64: the rest have 100 million weights, which take most of the time."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    for index, layer in enumerate(model.classifier):
        if isinstance(layer, nn.Linear):
            sizes = (64 if size == 4096 else size for size in (layer.in_features, layer.out_features))
            model.classifier[index] = nn.Linear(*sizes)
    for layer in model.features.to_empty(device="cpu"):
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):
            layer.reset_parameters()
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return model


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, over the size of what is expected."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def small() -> nn.Module:
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 8, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    )


def layers(frozen: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in frozen.modules() if isinstance(module, kind)]
