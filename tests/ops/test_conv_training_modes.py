"""Training and exporting models with our convolutions, by all that PyTorch has around a training step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from statistics import median
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as TF
from ddp_worker import BATCH, LAYOUTS, NORMS, make
from processes import results_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from training_cases import (
    FORWARD,
    INPUT_GRAD,
    STATS,
    WEIGHT_GRAD,
    ResNet,
    assert_trained_by_winograd,
    batch,
    errors,
    gradients,
    in_float64,
    preferring_ours,
    ran,
)

import pooling_ext
from pooling_ext.ops.conv_bn_act.implementations import from_size

pytestmark = pytest.mark.native

#: Of a gradient's norm: in float64, and in float32, where a ReLU that rounding flips moves all before it.
EXACT, ERROR = 1e-11, 2e-2
WORLD = 2


@pytest.fixture(autouse=True)
def ours() -> Iterator[None]:
    with preferring_ours():
        yield


def both(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[ResNet, ResNet]:
    """A model, and its patched twin."""
    torch.manual_seed(0)
    model = ResNet(**options).to(dtype)
    patched = copy.deepcopy(model)
    pooling_ext.patch(patched)
    return model, patched


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], within: float = EXACT) -> None:
    off = errors(found, expected)
    assert max(off.values()) <= within, off


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert torch.equal(found[name], right), name


# --- a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, EXACT), (torch.float32, ERROR)])
def test_gradients_of_a_step(dtype, within, layout):
    model, patched = both()
    images, labels = batch()
    images = images.to(dtype).contiguous(memory_format=LAYOUTS[layout])
    patched.to(dtype)
    found, kernels = ran(lambda: gradients(patched, images, labels))
    assert_trained_by_winograd(kernels)
    assert_close(found, in_float64(model, images, labels), within)


def test_exact_trains_without_winograd():
    model, patched = both()
    pooling_ext.patch(patched, exact=True)
    found, kernels = ran(lambda: gradients(patched, *batch()))
    assert not any(name.startswith("winograd") for name in kernels)
    assert_close(found, in_float64(model, *batch()), ERROR)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    """The same bits as without, what is recomputed by the same kernels, and statistics as PyTorch's."""
    model, patched = both()
    images, labels = batch()

    def checkpointed(net: ResNet):
        def call(x: Tensor) -> Tensor:
            body: Any = checkpoint(net.body, net.stem(x), use_reentrant=reentrant)
            return net.head(body)

        return call

    expected = gradients(copy.deepcopy(patched), images, labels)
    found, kernels = ran(lambda: gradients(patched, images, labels, checkpointed(patched)))
    assert_same(found, expected)
    assert kernels[STATS] == 2 * ResNet.NORMED and kernels[WEIGHT_GRAD] == ResNet.WINOGRAD
    gradients(model, images, labels, checkpointed(model))
    for mine, theirs in zip(patched.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_accumulate():
    model, patched = both(torch.float64)
    images, labels = batch(8, dtype=torch.float64)

    def accumulate(net: nn.Module) -> dict[str, Tensor]:
        net.zero_grad()
        for part, classes in zip(images.split(4), labels.split(4), strict=True):
            (TF.cross_entropy(net(part), classes) / 2).backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    found, kernels = ran(lambda: accumulate(patched))
    assert_close(found, accumulate(model))
    assert_trained_by_winograd(kernels, steps=2)


def test_functional_call():
    model, patched = both(torch.float64)
    images, labels = batch(dtype=torch.float64)
    torch.manual_seed(1)
    values = {name: p.detach() + torch.randn_like(p) / 50 for name, p in model.named_parameters()}

    def by_values(net: nn.Module) -> dict[str, Tensor]:
        given = {name: p.clone().requires_grad_() for name, p in values.items()}
        loss = TF.cross_entropy(functional_call(net, given, (images,)), labels)
        return dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True))

    before = {name: p.clone() for name, p in patched.named_parameters()}
    found, kernels = ran(lambda: by_values(patched))
    assert_trained_by_winograd(kernels)
    assert_close(found, by_values(model))
    assert_same(dict(patched.named_parameters()), before)


def test_bfloat16_autocast():
    """No further from float64 than PyTorch's own step under autocast."""
    model, patched = both()
    images, labels = batch()

    def autocast(net: nn.Module):
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return net(x)

        return call

    found, kernels = ran(lambda: gradients(patched, images, labels, autocast(patched)))
    assert_trained_by_winograd(kernels)
    exact = in_float64(model, images, labels)
    mine, theirs = errors(found, exact), errors(gradients(model, images, labels, autocast(model)), exact)
    assert median(mine.values()) <= 1.1 * median(theirs.values())
    assert max(mine.values()) <= 1.5 * max(theirs.values())
    for name, p in patched.named_parameters():
        assert found[name].dtype == p.dtype


# --- compiled, exported ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training(backend, fresh_compiler):
    model, patched = both(torch.float64, channels=16)
    images, labels = batch(dtype=torch.float64)
    compiled: Any = torch.compile(patched, fullgraph=True, backend=backend)
    gradients(patched, images, labels, compiled)
    found, kernels = ran(lambda: gradients(patched, images, labels, compiled))
    assert_trained_by_winograd(kernels)
    assert_close(found, in_float64(model, images, labels))
    gradients(model, images, labels)
    gradients(model, images, labels)
    for mine, theirs in zip(patched.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_compiled_evaluation(fresh_compiler):
    """Without gradients the compiler's own convolutions run: it could keep no transformed weights."""
    model, patched = both(channels=16)
    images, _ = batch()
    compiled: Any = torch.compile(patched.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(images)
        found, kernels = ran(lambda: compiled(images))
        torch.testing.assert_close(found, model.eval()(images), rtol=1e-4, atol=1e-5)
    assert not any(name.startswith("winograd") for name in kernels)


def exported(
    module: nn.Module, x: Tensor, dynamic: bool = False, grads: bool = True, strict: bool = False
) -> Any:
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
    # As for users, some of whose layers are small.
    with torch.set_grad_enabled(grads), from_size(1 << 16):
        return torch.export.export(module, (x,), dynamic_shapes=shapes, strict=strict).module()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["patched", "Conv2d"])
def test_exported(kind, dynamic, grads, strict):
    """One program for every batch, of PyTorch's convolutions; with gradients of its operators alone."""
    if kind == "Conv2d":
        ours: nn.Module = pooling_ext.Conv2d(16, 16, 3, padding=1)
        theirs: nn.Module = nn.Conv2d(16, 16, 3, padding=1)
        theirs.load_state_dict(ours.state_dict())
        images = torch.randn(4, 16, 14, 14)
    else:
        theirs, ours = both()
        ours.eval()
        theirs.eval()
        images, _ = batch()
    program = exported(ours, images, dynamic, grads, strict)
    for size in (4, 1, 9) if dynamic else (4,):
        x = torch.randn(size, *images.shape[1:])
        with torch.no_grad():
            found, kernels = ran(lambda x=x: program(x))
            torch.testing.assert_close(found, theirs(x), rtol=1e-4, atol=1e-5)
        assert not kernels if grads else kernels.keys() <= {"max_pool", "avg_pool"}


@pytest.mark.parametrize("training", [False, True])
def test_exported_keeps_gradients(training):
    theirs, ours = both(torch.float64)
    theirs.train(training)
    ours.train(training)
    images, labels = batch(dtype=torch.float64)
    program = exported(ours, images)
    assert_close(gradients(program, images, labels), in_float64(theirs, images, labels))


class BatchNorms(nn.Module):
    """The fused functions, whose parameters alone want gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8)
        self.residual = nn.Parameter(torch.ones(2, 8, 10, 10))

    def forward(self, x: Tensor) -> Tensor:
        x, bn = x.detach(), self.bn
        own = bn.running_mean, bn.running_var, bn.weight, bn.bias
        y = pooling_ext.functional.batch_norm_act(x, *own, True)
        pooled = pooling_ext.functional.batch_norm_relu_max_pool(x, *own, True)
        tail = pooling_ext.functional.add_relu_global_avg_pool(x, self.residual)
        return y.sum() + pooled.sum() + tail.sum()


@pytest.mark.parametrize(
    "module",
    [
        pooling_ext.MaxPool2d(2),
        pooling_ext.AvgPool2d(2),
        pooling_ext.LPPool2d(2, 2),
        pooling_ext.AdaptiveAvgPool2d(3),
        pooling_ext.AdaptiveMaxPool2d(3),
        pooling_ext.BatchNormAct2d(8),
        BatchNorms(),
        pooling_ext.ConvBNAct2d(8, 8, 3),
        pooling_ext.Conv2d(8, 8, 3),
    ],
    ids=lambda module: type(module).__name__,
)
def test_exported_layers_keep_gradients(module):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), module)
    x = torch.randn(2, 3, 12, 12)
    program = exported(net, x)
    for own in (net, program):
        own(x).square().sum().backward()
    theirs = dict(program.named_parameters())
    for name, p in net.named_parameters():
        if p.grad is None:
            assert theirs[name].grad is None
        else:
            torch.testing.assert_close(theirs[name].grad, p.grad, rtol=1e-4, atol=1e-3)


# --- two processes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What each process got: gradients and kernels, by norms and layout."""
    return results_of("ddp_worker.py", tmp_path_factory.mktemp("ddp"), WORLD, timeout=250)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norms", NORMS)
def test_two_processes(shared, norms, layout):
    """DistributedDataParallel's gradients are those of the whole batch in one process, unpatched."""
    (first, kernels), (second, others) = (found[norms, layout] for found in shared)
    assert_same(second, first)
    images, labels = batch(BATCH, torch.float64)
    # Norms of a process's own have the statistics of its part; then the mean over processes is wanted.
    parts = images.chunk(WORLD if norms == "own" else 1), labels.chunk(WORLD if norms == "own" else 1)
    found = [in_float64(make(norms, layout), x, y) for x, y in zip(*parts, strict=True)]
    expected = {name: sum(part[name] for part in found) / len(found) for name in first}
    assert_close(first, expected)
    for counted in (kernels, others):
        assert counted.get(STATS, 0) == (ResNet.NORMED if norms == "own" else 0)
        assert counted[FORWARD] == ResNet.WINOGRAD - counted.get(STATS, 0)
        assert counted[INPUT_GRAD] == counted[WEIGHT_GRAD] == ResNet.WINOGRAD
