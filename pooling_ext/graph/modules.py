"""What small modules do, as their own forwards show when they are traced.

A batch norm may go on with an activation (timm's BatchNormAct2d does), a class may apply an activation that
PyTorch has as a function, and a module may give just what it is given. No class is known by its name: what a
forward does is read off its trace, and holds for modules whose attributes are what the trace read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as TF
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.conv_bn_act.call import calls_only_forward
from .activations import MODULES, Activation, function_activation
from .guards import Untraceable, predicate
from .op_tables import BATCH_NORMS, argument, base_of, is_in_place, unchanged_class
from .recorder import batch_norm_of
from .tracer import Trace, trace

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_SIMPLE = (bool, int, float, str, type(None))
# What a forward may ask of its input to check it.
_QUESTIONS = (operator.eq, operator.ne, torch._assert)


@dataclass(frozen=True)
class FunctionStep:
    """An activation that a forward calls as a function."""

    activation: Activation
    inplace: bool

    def __call__(self, x: Any) -> Any:
        return self.activation(x, inplace=self.inplace)


@dataclass(frozen=True, eq=False)
class Steps:
    """What the forward of a class does, one after the other.

    Attributes:
        cls: the class.
        forward: its forward.
        norm: the class of torch.nn whose forward is the batch norm that comes first; None if there is none.
        steps: what follows: functions, and names of children.
        guards: by mode, whether a module's attributes are what the forward read when it was traced.
    """

    cls: type
    forward: Callable[..., Any]
    norm: type | None
    steps: tuple[FunctionStep | str, ...]
    guards: dict[bool, Callable[[Any], bool]]

    def holds(self, module: Any) -> bool:
        """Whether calling the forward of ``module`` just does the steps."""
        cls = self.cls
        return (
            (type(module) is cls or base_of(type(module)) is cls)
            and cls.forward is self.forward  # type: ignore[attr-defined]
            and self.guards[module.training](module)
        )

    @property
    def inherited(self) -> Callable[[Any, Any], Any]:
        """The forward of the batch norm."""
        return self.norm.forward  # type: ignore[union-attr]

    def of(self, module: Any) -> list[Any]:
        """The steps after the batch norm that do something, as callables."""
        found: list[Any] = []
        for step in self.steps:
            if type(step) is not str:
                found.append(step)
            elif not passes(child := module._modules[step]):
                found.append(child)
        return found


_found: dict[type, list[Steps]] = {}
_none: set[Any] = set()


def known_steps(module: nn.Module) -> Steps | None:
    """What :func:`find_steps` has found before and still holds."""
    return next((steps for steps in _found.get(base_of(type(module)), ()) if steps.holds(module)), None)


def find_steps(module: nn.Module) -> Steps | None:
    """The steps of a module with a forward of its own; None if it is no plain sequence."""
    cls = base_of(type(module))
    normalizes = isinstance(module, _BatchNorm)
    if cls.__module__.startswith(("torch.", "pooling_ext.")) or "forward" in module.__dict__:
        return None
    if not normalizes and (module._modules or module._parameters):
        return None
    known = known_steps(module)
    if known is not None:
        return known
    key = cls, *((name, value) for name, value in module.__dict__.items() if type(value) in _SIMPLE)
    if key in _none:
        return None
    steps = _traced_steps(module, cls, normalizes)
    if steps is None:
        _none.add(key)
    else:
        _found.setdefault(cls, []).append(steps)
    return steps


def _traced_steps(module: nn.Module, cls: type, normalizes: bool) -> Steps | None:
    norm = next((base for base in cls.__mro__ if base in BATCH_NORMS), None) if normalizes else None
    if normalizes and norm is None:
        return None
    try:
        traces = [traced for traced in trace(module, cls, norm=norm) if traced.kind is torch.Tensor]
    except Untraceable:
        return None
    found = {_read(traced, module, norm, training) for traced in traces for training in _modes(traced)}
    (steps,) = found if len(found) == 1 else (None,)
    if steps is None:
        return None
    guards = {
        training: predicate(traced.conditions, traced.constants)
        for traced in traces
        for training in _modes(traced)
    }
    return Steps(cls, cls.forward, norm, steps, guards) if len(guards) == 2 else None  # type: ignore[attr-defined]


def _modes(traced: Trace) -> tuple[bool, ...]:
    return (True, False) if traced.training is None else (traced.training,)


def _read(
    traced: Trace, module: Any, norm: type | None, training: bool
) -> tuple[FunctionStep | str, ...] | None:
    """What a trace does after the batch norm, which it has to begin with if ``norm`` is given."""
    steps: list[FunctionStep | str] = []
    value, normalized, counted = None, norm is None, False
    for node in traced.graph.nodes:
        first = node.args[0] if node.args else None
        if node.op == "get_attr" or _is_question(node):
            continue
        if node.op == "output":
            return tuple(steps) if first is value and normalized else None
        if node.op == "placeholder" and value is None:
            value = node
            continue
        if _counts(node):
            counted = True
            continue
        if not normalized:
            by_base = node.target is batch_norm_of
            if first is not value or not (by_base or _is_norm(node, module, training, counted)):
                return None
            normalized = True
        elif node.op == "call_module" and node.args == (value,) and not node.kwargs:
            if "." in str(node.target):
                return None
            steps.append(str(node.target))
        else:
            activation = function_activation(node)
            if activation is None or first is not value:
                return None
            steps.append(FunctionStep(activation, is_in_place(node)))
        value = node
    return None


def _is_question(node: fx.Node) -> bool:
    if node.op == "call_method":
        return bool(node.target == "dim")
    if node.op != "call_function":
        return False
    return node.target in _QUESTIONS or bool(node.target is getattr and node.args[1] == "ndim")


def _counts(node: fx.Node) -> bool:
    """Whether a node adds one to the counter of batches."""
    counter = node.args[0] if node.args else None
    return bool(
        (node.op, node.target) == ("call_method", "add_")
        and isinstance(counter, fx.Node)
        and (counter.op, counter.target) == ("get_attr", "num_batches_tracked")
        and node.args[1:] == (1,)
        and not node.kwargs
    )


def _is_norm(node: fx.Node, module: Any, training: bool, counted: bool) -> bool:
    """Whether a node normalizes as torch.nn's batch norms do in a mode, and has ``counted`` if they do."""
    if node.op != "call_function" or node.target is not TF.batch_norm:
        return False
    tracks = module.track_running_stats
    batch_statistics = training or (module.running_mean is None and module.running_var is None)
    has_counter = module.num_batches_tracked is not None
    if counted != (training and tracks and has_counter) or (counted and module.momentum is None):
        return False
    names = ("running_mean", "running_var", "weight", "bias")
    given = [argument(node, name, position, None) for position, name in enumerate(names, 1)]
    statistics = tracks or not training
    wanted = [
        name if getattr(module, name) is not None and (statistics or name in ("weight", "bias")) else None
        for name in names
    ]
    read = [getattr(x, "target", None) if getattr(x, "op", "get_attr") == "get_attr" else x for x in given]
    momentum = 0.0 if module.momentum is None else module.momentum
    return bool(
        read == wanted
        and argument(node, "training", 5, False) is batch_statistics
        and argument(node, "momentum", 6, 0.1) == momentum
        and argument(node, "eps", 7, 1e-5) == module.eps
    )


# --- single modules ----------------------------------------------------------------------------------------


def passes(module: Any) -> bool:
    """Whether calling ``module`` gives what it is given, and does nothing else, global hooks aside."""
    kind = type(module)
    if kind in MODULES:
        return False
    if kind is not nn.Identity:
        kind = unchanged_class(kind)
    if kind is nn.Identity:
        plain = True
    elif kind in DROPOUTS:
        plain = module.p == 0
    elif kind is nn.Sequential:
        plain = not module._modules
    else:
        steps = known_steps(module)
        plain = steps is not None and steps.norm is None and not steps.steps
    return plain and calls_only_forward(module)


def module_activation(step: Any) -> Activation | None:
    """The activation that ``step`` applies and nothing else, global hooks aside."""
    if isinstance(step, FunctionStep):
        return step.activation
    if not isinstance(step, nn.Module) or not calls_only_forward(step):
        return None
    make = MODULES.get(type(step)) or MODULES.get(unchanged_class(type(step)))
    if make is not None:
        return make(step)
    steps = known_steps(step)
    if steps is None or steps.norm is not None or len(steps.steps) != 1:
        return None
    (only,) = steps.steps
    return only.activation if isinstance(only, FunctionStep) else None


def kind_of(module: nn.Module) -> Any:
    """What a plan depends on of a module: its class, what its forward does, and whether it does nothing."""
    kind = unchanged_class(type(module))
    return (kind, module.p == 0) if kind in DROPOUTS else find_steps(module) or base_of(type(module))
