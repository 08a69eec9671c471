"""Random models: eager, patched and frozen agree. ``python -m tests.graph_fuzzer`` runs more of them."""

from __future__ import annotations

import ast
import types

import pytest
import torch
from graph_fuzzer.campaign import Summary, check_seed
from graph_fuzzer.compare import Rejected, check, strict
from graph_fuzzer.minimize import minimize
from graph_fuzzer.models import generate
from graph_fuzzer.source import Source

import pooling_ext

pytestmark = pytest.mark.filterwarnings("ignore")
#: Each test checks the programs of some seeds, so that several processes share them.
PIECES, GRAPHS = 6, 25


@pytest.fixture(autouse=True)
def at_any_size(one_thread):
    with strict():
        yield


@pytest.mark.parametrize("piece", range(PIECES))
def test_random_models(piece):
    summary = Summary()
    for seed in range(piece * GRAPHS, (piece + 1) * GRAPHS):
        source, rejected, verdict = check_seed(seed)
        summary.add(seed, source.tags, rejected, verdict)
    assert not summary.faults, (
        f"{summary}\npython -m tests.graph_fuzzer --minimize {next(iter(summary.faults))}"
    )
    assert not summary.refused_without_cause, str(summary)
    assert summary.fused >= 0.8 * summary.graphs
    assert summary.rejected <= 0.2 * summary.graphs


BLOCK = """\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.flag = True

    def forward(self, x):
        y = x * 2.0
        z = self.norm(self.conv(y))
        if self.flag:
            z = z + y
        return {'out': F.relu(z).mean((2, 3)), 'y': y}
"""


def source(classes: str = BLOCK, dtype: str = "float64", trainable: bool = True) -> Source:
    return Source(classes, ((4, 8, 8),), dtype, trainable)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_plain_block_agrees(dtype):
    verdict = check(source(dtype=dtype), 0, layout=False)
    assert verdict.fused and not verdict.faults and verdict.refused is None


def slightly_off(self, forward, x):
    result = forward(self, x)
    result["out"] = result["out"] * (1 + 1e-6)
    return result


def writes_its_input(self, forward, x):
    result = forward(self, x)
    x.neg_()
    return result


def forgets_a_gradient(self, forward, x):
    return forward(self, x.detach())


def another_nest(self, forward, x):
    return dict(reversed(forward(self, x).items()))


def forgets_statistics(self, forward, x):
    kept = self.norm.running_mean.clone()
    result = forward(self, x)
    self.norm.running_mean.copy_(kept)
    return result


def forgets_the_flag(self, forward, x):
    self.flag = True
    return forward(self, x)


@pytest.mark.parametrize(
    "call, what",
    [
        (slightly_off, "output"),
        (writes_its_input, "input"),
        (forgets_a_gradient, "gradient"),
        (another_nest, "structure"),
        (forgets_statistics, "buffer"),
        (forgets_the_flag, "output"),
    ],
)
def test_what_a_wrong_patch_does_is_found(monkeypatch, call, what):
    patch = pooling_ext.patch

    def wrong_patch(model):
        report = patch(model)
        forward = type(model).forward
        model.forward = types.MethodType(lambda self, x: call(self, forward, x), model)
        return report

    monkeypatch.setattr(pooling_ext, "patch", wrong_patch)
    assert what in {fault.what for fault in check(source(), 0).faults}


class Leaks(torch.nn.Module):
    """A frozen model that gives each call's result in the same memory."""

    def __init__(self, model):
        super().__init__()
        self.model, self.report, self.memory = model.eval(), pooling_ext.PatchReport(), None

    def forward(self, x):
        result = self.model(x)
        if self.memory is None or self.memory.shape != result["out"].shape:
            self.memory = result["out"].clone()
        result["out"] = self.memory.copy_(result["out"])
        return result


class Remembers(Leaks):
    def forward(self, x):
        if self.memory is None:
            self.memory = self.model(x)
        return self.memory


def overwrites_the_example(model, example):
    example[0].zero_()
    return Leaks(model)


@pytest.mark.parametrize(
    "freeze, what", [(Leaks, "kept"), (Remembers, "output"), (overwrites_the_example, "example")]
)
def test_what_a_wrong_freeze_does_is_found(monkeypatch, freeze, what):
    def wrong_freeze(model, example):
        return freeze(model, example) if freeze is overwrites_the_example else freeze(model)

    monkeypatch.setattr(pooling_ext, "freeze", wrong_freeze)
    assert what in {fault.what for fault in check(source(), 0).faults}


def test_the_minimizer_keeps_what_fails():
    def fails(candidate: Source) -> bool:
        try:
            check(candidate, 0)
        except Rejected:
            return False
        return "self.norm(" in candidate.classes

    small = minimize(source(), fails)
    assert len(small.classes.splitlines()) < 12
    assert "flag" not in small.classes and "relu" not in small.classes


def test_programs_are_the_same_for_a_seed_and_printed_to_run_by_themselves():
    assert generate(7) == generate(7) != generate(8)
    script = generate(7).script(7, "freeze")
    exec(compile(ast.parse(script), "<script>", "exec"), {"__name__": "not main"})
