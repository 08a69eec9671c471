"""Runs one program eager, patched and frozen, and says where they differ.

A difference counts when it is larger than what eager itself shows where its data change by a few units in
the last place, and when it is there for other data too: at a kink of an activation, or where two elements
of a pooling window are as good as equal, a correct result may fall to the other side.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils import _pytree as pytree

import pooling_ext
from pooling_ext.freezing.conv_engines import ENGINES

from .source import Rejected, Source

#: What a run leaves: outputs, inputs afterwards, gradients, buffers; and the type of what it returned.
Record = dict[str, Any]

SIDES = ("patched", "frozen")
#: Relative to the largest element; the sensitivity of eager itself decides where this is exceeded.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}
#: What is smaller than this in all of a tensor counts as this large.
LEAST_SCALE = 1e-2
_SENSITIVITY = 50.0
#: What a report says of layers that nothing was fused with.
_UNFUSED = {"ours", *(engine.name for engine in ENGINES)}
_LARGEST = 1e8


@dataclass(frozen=True)
class Fault:
    """One difference.

    Attributes:
        stage: what ran, such as "frozen call 2" or "patched training".
        what: the value that differs without its number ("output", "gradient"), or the error's class.
        detail: for people.
    """

    stage: str
    what: str
    detail: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.stage}: {self.what}: {self.detail}"


@dataclass
class Verdict:
    """What became of one program.

    Attributes:
        faults: the differences.
        fused: whether patch or freeze took operators together.
        refused: why freeze raised ArgumentError, or None.
    """

    faults: list[Fault] = field(default_factory=list)
    fused: bool = False
    refused: str | None = None


@contextmanager
def strict() -> Iterator[None]:
    """Chains run fused and batch norms are folded at any size, and memory that nobody wrote holds NaN."""
    from pooling_ext.ops.conv_bn_act.implementations import from_size

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with from_size(0, fold_ratio=0):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def check(source: Source, seed: int, layout: bool = False, sides: tuple[str, ...] = SIDES) -> Verdict:
    """Compare eager, patched and frozen.

    Args:
        layout: whether outputs must have eager's strides as well.
        sides: what to compare with eager.

    Raises:
        Rejected: the program is no good.
    """
    verdict = _check(source, seed, layout, sides)
    for again in (seed + 1_000_003, seed + 2_000_003):
        if not verdict.faults:
            break
        try:
            found = _check(source, again, layout, sides).faults
        except Rejected:
            continue
        verdict.faults = [fault for fault in verdict.faults if fault in found]
    return verdict


def _check(source: Source, seed: int, layout: bool, sides: tuple[str, ...]) -> Verdict:
    verdict = Verdict()
    with source.model(seed) as model:
        run = _Runs(source, model, seed, layout, verdict)
        if run.normalizes_a_constant():
            raise Rejected("a batch norm is given the same value everywhere, so gradients are all rounding")
        try:
            expected = run.expected()
        except Exception as error:
            raise Rejected(f"{type(error).__name__}: {error}") from error
        for record in expected.values():
            for value in record.values():
                if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                    largest = float(value.abs().max())
                    if not largest < _LARGEST:
                        raise Rejected(f"its values reach {largest}")
        if "patched" in sides:
            run.patched(expected)
        if "frozen" in sides:
            run.frozen(expected)
    return verdict


class _Runs:
    def __init__(self, source: Source, model: nn.Module, seed: int, layout: bool, verdict: Verdict) -> None:
        self.source, self.model, self.seed, self.layout, self.verdict = source, model, seed, layout, verdict
        last = seed % 4 == 0
        self.inputs = source.inputs(seed, 2, last)
        # Another input, another batch, and the first once more: what depends on earlier calls shows.
        self.calls = [self.inputs, source.inputs(seed + 1, 2, last), source.inputs(seed + 2, 3), self.inputs]
        self.flags = sorted(name for name in vars(model) if name.startswith("flag"))
        dtype = self.inputs[0].dtype
        coarse = "autocast" in source.tags
        self.tolerance = TOLERANCE[torch.bfloat16 if coarse else dtype]
        if "ardsigmoid" in source.classes:  # the gradient of PyTorch's has float32's 1 / 6 in float64 too
            self.tolerance = max(self.tolerance, 1e-6)
        self.unit = torch.finfo(torch.bfloat16).eps if coarse else None
        self.stages: dict[str, Callable[[nn.Module], Record]] = {}

    def expected(self) -> dict[str, Record]:
        """What eager does at each stage that makes sense for the program."""
        self.stages = {
            "training": lambda net: _train(net.train(), self.inputs, self.source.trainable),
            "evaluation": lambda net: _evaluate(net.eval(), self.calls),
        }
        if self.source.trainable:
            self.stages["evaluation with gradients"] = lambda net: _train(net.eval(), self.inputs, True)
        if self.flags:
            self.stages["other flags"] = lambda net: _evaluate(_flip(net, self.flags).eval(), self.calls[:1])
        return {name: stage(copy.deepcopy(self.model)) for name, stage in self.stages.items()}

    def normalizes_a_constant(self) -> bool:
        """Whether a channel that a batch norm sees in training is constant.

        Its gradients, which should cancel, are multiplied by the inverse square root of eps.
        """
        found: list[bool] = []

        def note(_: nn.Module, args: tuple) -> None:
            x = args[0].detach().double().transpose(0, 1).flatten(1)
            found.append(bool((x.var(1, correction=0) <= 1e-12 * (1 + x.square().mean(1))).any()))

        net = copy.deepcopy(self.model).train()
        for module in net.modules():
            if isinstance(module, BatchNorm):
                module.register_forward_pre_hook(note)
        with torch.no_grad(), contextlib.suppress(Exception):  # eager's own errors come to light later
            net(*(x.clone() for x in self.inputs))
        return any(found)

    # --- patch ---------------------------------------------------------------------------------

    def patched(self, expected: dict[str, Record]) -> None:
        twin = copy.deepcopy(self.model)
        try:
            report = pooling_ext.patch(twin)
        except Exception as error:
            self._raised("patch", error)
            return
        self.verdict.fused |= any("-" in entry.what for entry in report.replaced)
        for name, stage in self.stages.items():
            try:
                found = stage(copy.deepcopy(twin))
            except Exception as error:
                self._raised(f"patched {name}", error)
                continue
            self._compare(f"patched {name}", name, expected[name], found)

    # --- freeze --------------------------------------------------------------------------------

    def frozen(self, expected: dict[str, Record]) -> None:
        if "batch statistics" in self.source.tags:
            return  # refused by contract
        original = copy.deepcopy(self.model)
        example = tuple(x.clone() for x in self.inputs)
        before = _state(original)
        try:
            fast = pooling_ext.freeze(original, example)
        except pooling_ext.ArgumentError as error:
            self.verdict.refused = str(error).splitlines()[0]
            return
        except Exception as error:
            self._raised("freeze", error)
            return
        whys = [entry.why for entry in fast.report.replaced]
        self.verdict.fused |= any(why not in _UNFUSED for why in whys)
        self._compare("freeze", "", before, _state(original))
        self._compare("freeze", "", _named("example", self.inputs), _named("example", example))
        try:
            found = _evaluate(fast, self.calls)
        except Exception as error:
            self._raised("frozen", error)
            return
        self._compare("frozen", "evaluation", expected["evaluation"], found, skip=("buffer ",))
        if self.layout:
            self._compare_layouts(expected["evaluation"], found)

    def _raised(self, stage: str, error: Exception) -> None:
        text = (str(error).splitlines() or [""])[0]
        self.verdict.faults.append(Fault(stage, f"raises {type(error).__name__}", text))

    # --- comparison ----------------------------------------------------------------------------

    def _compare(
        self, stage: str, eager: str, expected: Record, found: Record, skip: tuple[str, ...] = ()
    ) -> None:
        allowed: dict[str, float] | None = None
        for name, value in expected.items():
            if name.startswith(skip):
                continue
            other = found.get(name)
            if not isinstance(value, Tensor) or not isinstance(other, Tensor):
                if type(value) is not type(other) or (not isinstance(value, Tensor) and value != other):
                    self._differs(stage, name, f"{_short(other)} instead of {_short(value)}")
                continue
            if value.shape != other.shape or value.dtype != other.dtype:
                self._differs(stage, name, f"{_short(other)} instead of {_short(value)}", "'s dtype or shape")
                continue
            error, scale = distance(value, other)
            if error <= self.tolerance * scale:
                continue
            if allowed is None:
                allowed = self._sensitivity(eager) if eager else {}
            if not error <= _SENSITIVITY * allowed.get(name, 0.0) + self.tolerance * scale:
                self._differs(stage, name, f"{error:.3g} where the largest is {scale:.3g}")

    def _differs(self, stage: str, name: str, detail: str, of: str = "") -> None:
        what = name.partition(" ")[0] + of
        fault = Fault(stage, what, f"{name}: {detail}")
        wrong_at_once = what == "kept" and Fault(stage, "output", "") in self.verdict.faults
        if fault not in self.verdict.faults and not wrong_at_once:
            self.verdict.faults.append(fault)

    def _compare_layouts(self, expected: Record, found: Record) -> None:
        for name, value in expected.items():
            if (
                name.startswith("output")
                and isinstance(value, Tensor)
                and isinstance(found.get(name), Tensor)
            ):
                one, other = _steps(value), _steps(found[name])
                if one != other and value.shape == found[name].shape:
                    self._differs("layout", name, f"strides {other} instead of {one}")

    def _sensitivity(self, name: str) -> dict[str, float]:
        """How far eager's results move where parameters and inputs move by some units in the last place."""
        exact = self.stages[name](copy.deepcopy(self.model))
        moved: dict[str, float] = {}
        calls, inputs = self.calls, self.inputs
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)

            def shift(x: Tensor, generator: torch.Generator = generator) -> Tensor:
                unit = 4 * torch.finfo(x.dtype).eps if self.unit is None else self.unit
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
                return torch.empty_like(x).copy_(x * (1 + unit * noise))

            net = copy.deepcopy(self.model)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.copy_(shift(parameter))
            try:
                self.inputs = tuple(map(shift, inputs))
                self.calls = [tuple(map(shift, call)) for call in calls]
                found = self.stages[name](net)
            finally:
                self.calls, self.inputs = calls, inputs
            for key, value in exact.items():
                other = found.get(key)
                if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape == other.shape:
                    error, _ = distance(value, other)
                    moved[key] = max(moved.get(key, 0.0), error)
        return moved


def distance(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """The largest difference (infinite where one is NaN alone), and the largest element expected."""
    if expected.numel() == 0:
        return 0.0, LEAST_SCALE
    a, b = expected.detach().double(), found.detach().double()
    error = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    largest = float(error.nan_to_num(nan=math.inf).max())
    return largest, max(float(a.abs().nan_to_num().max()), LEAST_SCALE)


def _flip(net: nn.Module, flags: list[str]) -> nn.Module:
    for name in flags:
        setattr(net, name, not getattr(net, name))
    return net


def _evaluate(net: nn.Module, calls: list[tuple[Tensor, ...]]) -> Record:
    """Call without gradients, one after the other."""
    record: Record = {}
    kept: list[Any] = []
    with torch.no_grad():
        for number, call in enumerate(calls, 1):
            given = tuple(x.clone() for x in call)
            torch.default_generator.manual_seed(number)
            output = net(*given)
            record |= _outputs(f"of call {number}", output)
            record |= _named(f"input of call {number}", given)
            kept.append(output)
    for number, output in enumerate(kept, 1):  # a later call must not write into an earlier one's result
        record |= {f"kept {name}": value for name, value in _outputs(f"of call {number}", output).items()}
    return record | _state(net)


def _train(net: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> Record:
    """One step with gradients, or the forward alone without them."""
    torch.default_generator.manual_seed(0)
    if not backward:
        with torch.no_grad():
            given = tuple(x.clone() for x in inputs)
            return _outputs("", net(*given)) | _named("input", given) | _state(net)
    leaves = [x.clone().requires_grad_() for x in inputs]
    given = tuple(leaf.clone() for leaf in leaves)  # a forward may write into its input
    output = net(*given)
    record = _outputs("", output) | _named("input", given)
    found = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
    record["requires_grad"] = [getattr(x, "requires_grad", None) for x in pytree.tree_leaves(output)]
    if found:
        sum(
            (x * torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)).sum() for x in found
        ).backward()
    for number, leaf in enumerate(leaves):
        record[f"gradient of input {number}"] = leaf.grad
    for name, parameter in net.named_parameters():
        record[f"gradient of {name}"] = parameter.grad
    return record | _state(net)


def _outputs(where: str, output: Any) -> Record:
    leaves, spec = pytree.tree_flatten(output)
    record: Record = {f"structure {where}": str(spec)}
    for number, leaf in enumerate(leaves):
        copied = leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
        record[f"output {number} {where}"] = copied
    return record


def _named(name: str, tensors: tuple[Tensor, ...]) -> Record:
    return {f"{name} {number}": x.detach().clone() for number, x in enumerate(tensors)}


def _state(net: nn.Module) -> Record:
    return {f"buffer {name}": value.detach().clone() for name, value in net.named_buffers()}


def _steps(x: Tensor) -> list[int]:
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return str(value)[:80]
