"""Our modules, patched and frozen models in all that makes programs of them, beside what they give.

A program is made for one size, and runs at others.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.jit import TracerWarning  # pyright: ignore[reportPrivateImportUsage]

import pooling_ext
import pooling_ext.functional as F
from pooling_ext import ArgumentError, scripting
from pooling_ext.exporting import _SINCE_2_14
from pooling_ext.ops.conv_bn_act.implementations import from_size

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.pool = nn.AvgPool2d(2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(torch.relu(self.bn(self.conv(x)) + x))
        return torch.relu(y + 2 * y).mean((-2, -1))


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(16, 5)),
    )


def unfoldable() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 16, 3, padding=1))


def settled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.train()(torch.rand(4, 4, 12, 10))
    return model.eval()


def patched(make: Callable[[], nn.Module]) -> nn.Module:
    model = settled(make())
    assert pooling_ext.patch(model).replaced
    return model


def frozen(make: Callable[[], nn.Module]) -> nn.Module:
    return pooling_ext.freeze(settled(make()), torch.rand(2, 4, 12, 10))


def _cases() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Makers of models, and the rank of their inputs."""
    p: Any = pooling_ext
    cases: dict[str, tuple[Callable[[], nn.Module], int]] = {}
    for rank in (1, 2, 3):
        kinds = {"MaxPool": (3, 2, 1), "AvgPool": (2,), "LPPool": (2, 2), "AdaptiveAvgPool": (3,)}
        for kind, args in (kinds | {"AdaptiveMaxPool": (3,)}).items():
            name = f"{kind}{rank}d"
            cases[name] = (lambda name=name, args=args: getattr(p, name)(*args)), rank
    cases |= {
        "indices": (lambda: p.MaxPool2d(3, 2, return_indices=True), 2),
        "dilated": (lambda: p.MaxPool2d(3, 2, 1, dilation=2), 2),
        "ceil": (lambda: p.MaxPool2d(3, 2, 1, ceil_mode=True), 2),
        "divisor": (lambda: p.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=5), 2),
        "same": (lambda: p.MaxPool2d(3, 2, padding="same"), 2),
        "same-avg": (lambda: p.AvgPool2d(3, 2, padding="same"), 2),
        "sides": (lambda: p.AvgPool2d(3, 2, (1, 0, 2, 0), ceil_mode=True, count_include_pad=False), 2),
        "safe": (lambda: p.LPPool2d(3, 2, safe=True), 2),
        "norm": (lambda: p.LPPool2d(1.5, 3, 2), 2),
        "global-avg": (lambda: p.GlobalAvgPool2d(keepdim=False), 2),
        "global-max": (lambda: p.GlobalMaxPool2d(), 2),
        "global-lp": (lambda: p.GlobalLPPool2d(2), 2),
        "Conv1d": (lambda: p.Conv1d(4, 4, 3, groups=4), 1),
        "Conv2d": (lambda: p.Conv2d(4, 4, 3, groups=4), 2),
        "Conv3d": (lambda: p.Conv3d(4, 4, (1, 3, 3), groups=4), 3),
        "BatchNormAct2d": (lambda: p.BatchNormAct2d(4).eval(), 2),
        "ConvBNAct2d": (lambda: p.ConvBNAct2d(4, 4, 3).eval(), 2),
        "BatchNormAct2d-training": (lambda: p.BatchNormAct2d(4, activation="silu"), 2),
        "leaky": (lambda: p.ConvBNAct2d(4, 4, 3, activation="leaky_relu", negative_slope=0.2).eval(), 2),
        "ConvBNAct2d-training": (lambda: p.ConvBNAct2d(4, 4, 3), 2),
        "patched": (lambda: patched(network), 2),
        "patched-residual": (lambda: patched(Residual), 2),
        "frozen": (lambda: frozen(network), 2),
        "frozen-residual": (lambda: frozen(Residual), 2),
        "frozen-norm": (lambda: frozen(unfoldable), 2),
    }
    return cases


CASES = _cases()
#: What PyTorch's functions do not take.
BEYOND = ("same", "same-avg", "sides", "safe")
#: Of which torch.onnx.export makes nothing, or what is right at the example's size alone, as of PyTorch's.
NOT_IN_ONNX = ("MaxPool1d", *(name for name in CASES if "Adaptive" in name))


def every(*without: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name in CASES if name not in without])


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    with from_size(0):  # ours also where they are small
        yield
    torch._dynamo.reset()


def made(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A model, and inputs of several sizes."""
    make, rank = CASES[name]
    shapes = ((7, 4, 8, 12, 10), (6, 4, 9, 14, 11), (9, 4, 10, 13, 17))
    return make(), [torch.rand(shape[:2] + shape[-rank:]) for shape in shapes]


def check(model: nn.Module, program: Any, x: Tensor) -> None:
    """That ``program`` gives what ``model`` does, and leaves the same buffers, from the same state."""
    state, kept = copy.deepcopy(model.state_dict()), dict(model.named_buffers())
    expected = model(x)
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    if isinstance(program, nn.Module) and program is not model:
        program.load_state_dict(state, strict=False)
    found = program(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    own = program if isinstance(program, nn.Module) else model
    for buffer in kept.keys() & dict(own.named_buffers()).keys():
        torch.testing.assert_close(own.state_dict()[buffer], after[buffer])
    model.load_state_dict(state)


@every()
def test_compiled_for_every_size(name):
    model, inputs = made(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    # Uneven adaptive windows are told from even ones.
    once = torch._dynamo.config.patch(error_on_recompile="Adaptive" not in name)
    with torch.no_grad(), once:
        for x in inputs:
            check(model, lambda x: compiled(x), x)


@pytest.mark.parametrize("grads", [False, True], ids=["inference", "trainable"])
@every()
def test_exported_for_every_size(name, grads):
    model, inputs = made(name)
    dims = {0: torch.export.Dim("batch", min=1, max=64)}
    dims |= {axis: torch.export.Dim.DYNAMIC for axis in range(2, inputs[0].dim())}
    with torch.set_grad_enabled(grads):
        program = torch.export.export(model, (inputs[0],), dynamic_shapes=(dims,))
        for x in inputs:
            check(model, program.module(), x)
    torch.export.save(program, io.BytesIO())
    ours = "pooling_ext" in str(program.graph)
    if not grads and "Pool" in name:
        assert ours  # and not PyTorch's in their place


@pytest.mark.parametrize(
    "name", ["MaxPool2d", "BatchNormAct2d", "patched", "frozen", "frozen-residual", "frozen-norm"]
)
def test_exported_strictly(name):
    model, (x, *_) = made(name)
    if "frozen" in name and not _SINCE_2_14:
        pytest.skip("this PyTorch does not say whether it exports")
    check(model, torch.export.export(model, (x,), strict=True).module(), x)


@every()
def test_traced(name):
    model, inputs = made(name)
    with warnings.catch_warnings():
        # Sizes decide there what our padding is.
        warnings.simplefilter("ignore" if name in BEYOND or model.training else "error", TracerWarning)
        traced: Any = torch.jit.trace(model, (inputs[0],), check_trace=not model.training)
    assert "pooling_ext::" not in str(traced.inlined_graph) and "PythonOp" not in str(traced.inlined_graph)
    for x in inputs[:1] if name in BEYOND else inputs:
        check(model, traced, x)
    torch.jit.save(traced, io.BytesIO())


@every(*BEYOND, "frozen", "frozen-residual", "frozen-norm")
def test_scripted(name):
    model, inputs = made(name)
    classes = [type(module) for module in model.modules()]
    scripted = torch.jit.script(model)
    assert [type(module) for module in model.modules()] == classes
    for x in inputs:
        check(model, scripted, x)
    torch.jit.save(scripted, io.BytesIO())


@pytest.mark.parametrize("name", ["same", "same-avg", "safe"])
def test_scripts_have_no_arguments_beyond_pytorchs(name):
    with pytest.raises(ArgumentError, match=r"(padding|safe)=.* torch.jit.script"):
        torch.jit.script(made(name)[0])
    with pytest.raises(ArgumentError, match=r"torch.jit.trace\(model, example\)"):
        torch.jit.script(frozen(network))


def test_scripted_functions():
    def pools(x: Tensor, norm: Tensor):
        highest, indices = F.max_pool2d(x, 3, 2, return_indices=True)
        averages = F.avg_pool2d(x, 3, padding=1), F.adaptive_avg_pool2d(x, 3)
        fused = F.batch_norm_act(x, norm, norm, residual=x), F.add_relu_global_avg_pool(x, -x / 2, False)
        stem = F.batch_norm_relu_max_pool(x, norm, norm)
        rest = F.adaptive_max_pool2d(x, [2, 3]), F.lp_pool2d(x, 2.0, 2), F.global_lp_pool2d(x, 3.0)
        return highest, indices, averages, fused, stem, rest, F.global_max_pool2d(x), F.max_pool1d(x[0], 2)

    x, norm = torch.rand(2, 4, 9, 11), torch.rand(4)
    torch.testing.assert_close(torch.jit.script(pools)(x, norm), pools(x, norm))
    alone = torch.jit.script(F.global_avg_pool2d)
    torch.testing.assert_close(alone(x), F.global_avg_pool2d(x))


@pytest.mark.parametrize("name", ["batch_norm_act", "batch_norm_relu_max_pool", "add_relu_global_avg_pool"])
def test_what_stands_in_is_the_same(name):
    x, norm = torch.randn(2, 4, 9, 11), torch.rand(4)
    arguments = (x, -x / 3) if name.startswith("add") else (x, norm, norm + 1, norm, norm)
    found, expected = (getattr(module, name)(*arguments) for module in (scripting, F))
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def one_registry():
    """The exporter reads all of onnxscript's functions again for each model, most of its time; here once."""
    pytest.importorskip("onnxscript")
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@every(*NOT_IN_ONNX, "BatchNormAct2d-training", "ConvBNAct2d-training")
def test_exported_to_onnx_for_every_size(name, tmp_path, one_registry):
    runtime = pytest.importorskip("onnxruntime")
    model, inputs = made(name)
    dims = {0: torch.export.Dim("batch", min=1, max=64)}
    dims |= {axis: torch.export.Dim.DYNAMIC for axis in range(2, inputs[0].dim())}
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (inputs[0],), path, dynamo=True, dynamic_shapes=(dims,), verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in inputs:
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        expected = model(x)
        expected = [y.detach() for y in expected] if isinstance(expected, tuple) else [expected.detach()]
        torch.testing.assert_close([torch.from_numpy(y) for y in found], expected, rtol=1e-3, atol=1e-4)


def test_onnx_has_no_adaptive_windows_for_every_size():
    """PyTorch's own exporter takes their size from the example and says nothing."""
    pytest.importorskip("onnxscript")
    dims, model = {2: torch.export.Dim.DYNAMIC}, pooling_ext.AdaptiveAvgPool2d(3).eval()
    # The exporter goes on to try other ways, and names the operator that the last one meets.
    with pytest.raises(Exception, match=r"of dynamic size|pooling_ext\.avg_pool"):
        torch.onnx.export(
            model, (torch.rand(1, 2, 12, 9),), dynamo=True, dynamic_shapes=(dims,), verbose=False
        )


@every("BatchNormAct2d-training", "ConvBNAct2d-training")
def test_vmap(name):
    model, (x, *_) = made(name)
    xs = torch.stack([x, x / 2, x + 0.3])
    found = torch.func.vmap(model)(xs)
    results = [model(x) for x in xs]
    expected = (
        tuple(map(torch.stack, zip(*results, strict=True))) if name == "indices" else torch.stack(results)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every()
def test_functional_call_and_copies(name):
    model, (x, *_) = made(name)
    state = {
        key: value * 1.1 if value.is_floating_point() else value for key, value in model.state_dict().items()
    }
    other = copy.deepcopy(model)
    other.load_state_dict(copy.deepcopy(state))
    torch.testing.assert_close(torch.func.functional_call(model, state, (x,)), other(x), rtol=1e-4, atol=1e-5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin).__name__ == type(model).__name__ and repr(twin) == repr(model)
        check(model, twin, x)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("kind", ["norm", "stem"])
def test_one_training_graph_for_every_size(kind, training):
    model: nn.Module = pooling_ext.BatchNormAct2d(8)
    if kind == "stem":
        model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        pooling_ext.patch(model)
    model.train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    one_graph = torch._dynamo.config.patch(error_on_recompile=True)
    for shape in ((5, 8, 9, 11), (6, 8, 14, 13), (4, 8, 10, 17), (7, 8, 16, 12)):
        x, found = torch.randn(shape), []
        for each in (compiled, twin):
            each.zero_grad()
            leaf = x.clone().requires_grad_()
            with one_graph:
                y = each(leaf)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            found.append([y.detach(), leaf.grad, *(p.grad for p in each.parameters()), *each.buffers()])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_frozen_models_have_the_models_parameters():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)

        def forward(self, image: Tensor, scale: Tensor) -> Tensor:
            return TF.relu(self.conv(image)) * scale

    arguments = torch.rand(2, 4, 9, 9), torch.rand(2, 8, 1, 1)
    fast = pooling_ext.freeze(Two(), arguments)
    batch = torch.export.Dim("batch", min=1, max=8)
    shapes = {"scale": {0: batch}, "image": {0: batch}}
    program = torch.export.export(fast, arguments, dynamic_shapes=shapes)
    more = torch.rand(5, 4, 9, 9), torch.rand(5, 8, 1, 1)
    torch.testing.assert_close(program.module()(*more), fast(*more))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MaxPool2d", "global-max", "patched", "frozen-residual"])
def test_aot_inductor(name, tmp_path):
    model, inputs = made(name)
    dims = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    with torch.no_grad():
        program = torch.export.export(model, (inputs[0],), dynamic_shapes=(dims,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        check(model, torch._inductor.aoti_load_package(path).__call__, inputs[1])


@pytest.mark.parametrize("pool", [pooling_ext.AdaptiveAvgPool2d, pooling_ext.AdaptiveMaxPool2d])
def test_aot_inductor_on_adaptive_pools_of_known_sizes(pool, tmp_path):
    """As in VGG; of sizes that are not known they are an error, which docs/programs.md tells of."""
    model, x = pool((3, 2)).eval(), torch.rand(2, 4, 11, 13)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        check(model, torch._inductor.aoti_load_package(path).__call__, torch.rand(5, 4, 11, 13))


def test_graph_modules_and_scripts_in_a_patched_model():
    """They run as they are, and the report says so."""
    for make, why in ((torch.fx.symbolic_trace, "GraphModule"), (torch.jit.script, "compiled by torch.jit")):
        model = nn.Sequential(make(settled(network())), nn.Unflatten(1, (5, 1, 1)), nn.MaxPool2d(1))
        x = torch.rand(2, 4, 12, 10)
        expected = model(x)
        report = pooling_ext.patch(model)
        torch.testing.assert_close(model(x), expected)
        assert any(why in entry.why for entry in report.skipped), report
        assert "2" in [entry.path for entry in report.replaced]
        with pytest.raises(ArgumentError, match=why):
            pooling_ext.patch(model, strict=True)
    with pytest.raises(ArgumentError, match="freeze the module it was made from"):
        pooling_ext.freeze(torch.jit.script(settled(network())), x)


@pytest.mark.slow
def test_frozen_models_compile_by_inductor():
    model, (x, *_) = made("frozen")
    compiled = torch.compile(model, fullgraph=True)
    check(model, lambda x: compiled(x), x)
