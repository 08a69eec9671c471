"""What accelerate_resnet.py measures: layers and whole models, eager, patched and frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as torch_F
from torch import Tensor, nn

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.nn import REPLACES
from timing import in_turn

#: Turns of a whole model at least; a layer takes three.
LEAST = 2
EAGER, PATCHED, FROZEN = "eager", "patched", "frozen"

Pool = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerResult:
    """What a layer takes: milliseconds and bytes, PyTorch's first and ours second."""

    name: str
    what: str
    shape: tuple[int, ...]
    inference: tuple[float, float]
    training: tuple[float, float]
    difference: float
    saved: tuple[int, int]


@dataclass(frozen=True)
class ModelResult:
    """What a whole model takes, and how far it is from the eager one in float32.

    Attributes:
        kind: EAGER, PATCHED or FROZEN.
        training: milliseconds of a training step; None where there is none.
        inference: milliseconds of a batch.
        difference: the largest of a logit.
        agreement: the fraction of images with the same first class.
    """

    dtype: torch.dtype
    kind: str
    training: float | None
    inference: float
    difference: float
    agreement: float


def native_dtypes() -> list[torch.dtype]:
    """float32, and bfloat16 where the CPU has instructions for it."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = any(getattr(torch.cpu, check, bool)() for check in checks)
    return [torch.float32, torch.bfloat16] if fast else [torch.float32]


# --- layers --------------------------------------------------------------------------------------


def layer_results(model: nn.Module, x: Tensor, seconds: float) -> Iterator[LayerResult]:
    """The stem of a ResNet, which the patch fuses, and each pooling layer, on what ``model`` gives them."""
    pools = [path for path, module in model.named_modules() if type(module) in REPLACES]
    inputs = capture(model, ["bn1", *pools], x)
    stem = nn.Sequential(*(model.get_submodule(path) for path in ("bn1", "relu", "maxpool")))
    yield compare("bn1-relu-maxpool", "stem, fused", stem, inputs["bn1"], seconds)
    for path in pools:
        module = model.get_submodule(path)
        yield compare(path, type(module).__name__, module, inputs[path], seconds)


def compare(name: str, what: str, module: nn.Module, x: Tensor, seconds: float) -> LayerResult:
    """Time ``module`` on ``x`` with and without the patch, and compare the outputs."""
    theirs, ours = copy.deepcopy(module).eval(), copy.deepcopy(module).eval()
    pooling_ext.patch(ours)
    leaf = x.detach().requires_grad_()

    def step(layer: nn.Module, grad: Tensor) -> None:
        torch.autograd.grad(layer(leaf), [leaf, *layer.parameters()], grad)

    with torch.no_grad():
        expected, actual = theirs(x), ours(x)
        difference = (actual - expected).abs().max().item()
        inference = in_turn([partial(theirs, x), partial(ours, x)], seconds)
    theirs.train()
    ours.train()
    grad = torch.randn_like(expected)
    training = in_turn([partial(step, theirs, grad), partial(step, ours, grad)], seconds)
    saved = saved_bytes(theirs, leaf), saved_bytes(ours, leaf)
    pairs = (inference[0], inference[1]), (training[0], training[1])
    return LayerResult(name, what, tuple(x.shape), *pairs, difference, saved)


def saved_bytes(layer: Pool, x: Tensor) -> int:
    """Bytes that ``layer`` keeps for backward, without input and output, which the neighbors keep anyway."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    for tensor in (x, output):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def capture(model: nn.Module, paths: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """Run ``model`` on ``x`` and return the inputs of the modules at ``paths``."""
    inputs: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.setdefault(path, args[0])

    handles = [model.get_submodule(path).register_forward_pre_hook(partial(keep, path)) for path in paths]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return inputs


def pooling_kinds() -> list[tuple[str, Pool, Pool]]:
    """Label, PyTorch's function and ours of each kind of pooling, as the stem would use it."""
    window = {"kernel_size": 3, "stride": 2}
    padded = {**window, "padding": 1}
    lp = {"norm_type": 2, **window}
    return [
        ("max", partial(torch_F.max_pool2d, **padded), partial(F.max_pool2d, **padded)),
        ("average", partial(torch_F.avg_pool2d, **padded), partial(F.avg_pool2d, **padded)),
        ("L2", partial(torch_F.lp_pool2d, **lp), partial(F.lp_pool2d, **lp)),
        ("global average", partial(torch_F.adaptive_avg_pool2d, output_size=1), F.global_avg_pool2d),
    ]


# --- whole models --------------------------------------------------------------------------------


def autocast(dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(N, classes)`` float32; a frozen model has its dtype already, the others get autocast."""
    with nullcontext() if isinstance(model, pooling_ext.Frozen) else autocast(dtype):
        return model(x).float()


def training_times(
    models: Sequence[nn.Module], x: Tensor, targets: Tensor, dtype: torch.dtype, seconds: float
) -> list[float]:
    """Milliseconds of a training step of each model, which changes it."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(dtype):
            logits = model(x)
        torch_F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    calls = []
    for model in models:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9)
        calls.append(partial(step, model, optimizer))
    return in_turn(calls, seconds, LEAST)


def model_results(
    models: dict[str, nn.Module], x: Tensor, dtype: torch.dtype, reference: Tensor, seconds: float
) -> Iterator[ModelResult]:
    """Time the training and the inference of ``models`` in ``dtype``.

    Args:
        models: by kind, in eval mode. They stay as they are.
        reference: logits that those of the models are compared with, ``(N, classes)``.
    """
    outputs = [logits_of(model, x, dtype) for model in models.values()]
    inference = in_turn([partial(logits_of, model, x, dtype) for model in models.values()], seconds, LEAST)
    learners = {kind: copy.deepcopy(model) for kind, model in models.items() if kind != FROZEN}
    targets = torch.randint(reference.shape[1], (len(x),))
    steps = training_times(list(learners.values()), x, targets, dtype, 1.5 * seconds)
    training = dict(zip(learners, steps, strict=True))
    for kind, logits, ms in zip(models, outputs, inference, strict=True):
        difference = (logits - reference).abs().max().item()
        agreement = (logits.argmax(1) == reference.argmax(1)).double().mean().item()
        yield ModelResult(dtype, kind, training.get(kind), ms, difference, agreement)
