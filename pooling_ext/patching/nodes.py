"""What the nodes of a traced forward call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook

from ..graph.activations import RELU, function_activation, kernel_activation
from ..graph.modules import FunctionStep, Steps, find_steps, passes
from ..graph.op_tables import (
    BATCH_NORMS,
    addition,
    argument,
    base_of,
    global_mean,
    is_global,
    is_in_place,
    name_of,
    only_user,
    unchanged_class,
)
from ..ops import activations as kernels
from ..ops.conv_bn_act.call import calls_only_forward
from .fused_calls import (
    ADDS,
    MAX_POOLS,
    RELUS,
    Add,
    GlobalAvgPool,
    MaxPool,
    step_activation,
)

_MAX_POOL_ARGUMENTS = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}


class Nodes:
    """Tells what the nodes of a graph call.

    Args:
        module: whose forward it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def calls_module(self, node: Any) -> bool:
        """Whether ``node`` calls a module with one argument."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or node.kwargs or len(node.args) != 1:
            return False
        return isinstance(node.args[0], fx.Node)

    def is_module(self, node: Any, kinds: tuple[type, ...]) -> bool:
        """Whether ``node`` calls a module of these classes, or one as good as them, with one argument."""
        return self.calls_module(node) and unchanged_class(type(self.child(node))) in kinds

    def is_norm(self, node: Any) -> bool:
        """Whether ``node`` calls a batch norm, which may go on with an activation."""
        return self.is_module(node, BATCH_NORMS) or self.steps(node) is not None

    def steps(self, node: Any) -> Steps | None:
        """What a batch norm of a class of its own does."""
        if not self.calls_module(node):
            return None
        steps = find_steps(self.child(node))
        return steps if steps is not None and steps.norm is not None else None

    def own_steps(self, bn: fx.Node) -> list[Any]:
        """What a batch norm goes on with by itself."""
        steps = self.steps(bn)
        return [] if steps is None else steps.of(self.child(bn))

    def passes(self, node: fx.Node | None) -> bool:
        """Whether ``node`` calls a module that gives what it is given."""
        return self.calls_module(node) and passes(self.child(node))  # type: ignore[arg-type]

    def after(self, node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
        """The calls that do nothing on the way from ``node`` to the one that reads it, and that one."""
        passed, user = [], only_user(node)
        while self.passes(user):
            passed.append(user)
            user = only_user(user)
        return passed, user

    def child(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def ends_in_batch_norm(self, node: fx.Node) -> list[str]:
        """The path of the Sequential that ``node`` calls and those at its end, if a batch norm ends them."""
        if node.op != "call_module":
            return []
        path, child, paths = str(node.target), self.child(node), []
        while is_plain_sequential(child) and len(child):  # type: ignore[arg-type]
            paths.append(path)
            name, child = list(child.named_children())[-1]
            path = f"{path}.{name}"
        steps = find_steps(child)
        plain = steps is not None and steps.norm is not None and not steps.of(child)
        return paths if plain or unchanged_class(type(child)) in BATCH_NORMS else []

    def activation(self, node: fx.Node | None) -> kernels.Activation | None:
        """The activation of our kernels that ``node`` applies."""
        if node is None:
            return None
        if self.calls_module(node):
            return step_activation(self.child(node))
        found = function_activation(node)
        return None if found is None else kernel_activation(found)

    def function_step(self, act: fx.Node | None) -> FunctionStep | None:
        """The activation that ``act`` calls as a function."""
        found = None if act is None else function_activation(act)
        return None if found is None else FunctionStep(found, is_in_place(act))  # type: ignore[arg-type]

    def add(self, node: fx.Node | None, value: fx.Node) -> tuple[Add, fx.Node] | None:
        """How ``node`` adds ``value`` to another, and that other."""
        found = addition(node)
        if found is None or value not in (found.left, found.right):
            return None
        # An addition in place to the other operand shows outside.
        if found.in_place and found.left is not value:
            return None
        return Add(ADDS[found.in_place], found.left is not value), found.other(value)

    def max_pool(self, node: fx.Node | None) -> Any:
        """``node`` if it is a max pooling module, its MaxPool if it is a function, else None."""
        if node is None:
            return None
        if self.is_module(node, MAX_POOLS):
            child: Any = self.child(node)
            return None if child.return_indices else node
        if node.op != "call_function" or node.target not in (TF.max_pool2d, torch.max_pool2d):
            return None
        arguments = dict(zip(_MAX_POOL_ARGUMENTS, node.args[1:], strict=False)) | dict(node.kwargs)
        if arguments.pop("return_indices", False) or len(node.all_input_nodes) != 1:
            return None
        arguments = _MAX_POOL_ARGUMENTS | arguments
        arguments["stride"] = arguments["stride"] or None
        return MaxPool(tuple(_as_tuple(value) for value in arguments.values()))

    def names(self, node: fx.Node) -> list[str]:
        """What reports call a step; of a batch norm also what it goes on with."""
        if node.op != "call_module":
            return [function_name(node)]
        path = str(node.target)
        own = map(step_name, self.own_steps(node) if self.is_norm(node) else ())
        if path.rpartition(".")[2].isdecimal():  # in a Sequential
            path = f"{type(self.child(node)).__name__}({path})"
        return [path, *own]


def is_plain_sequential(module: Any) -> bool:
    """Whether calling ``module`` just calls its children."""
    return (
        getattr(base_of(type(module)), "forward", None) is nn.Sequential.forward
        and calls_only_forward(module)
        and not _has_any_global_hook()
    )


def relu_function(node: fx.Node | None) -> Callable[[Any], Any] | None:
    """torch.relu or torch.relu_ if ``node`` calls one of them or its like."""
    if node is None or function_activation(node) != RELU:
        return None
    return RELUS[is_in_place(node)]


def global_avg_pool(node: fx.Node) -> GlobalAvgPool | None:
    """The global average pooling that ``node`` calls as a function."""
    if not node.args or len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_function" and node.target is TF.adaptive_avg_pool2d:
        return GlobalAvgPool(True) if is_global(argument(node, "output_size", 1, None)) else None
    mean = global_mean(node)
    return None if mean is None else GlobalAvgPool(mean.keepdim, mean.dims)


_FUNCTION_NAMES = {"in_place_add": "add", "iadd": "add", "add_": "add", "relu_": "relu", "swish": "silu"}


def step_name(step: Any) -> str:
    """What reports call a step of a batch norm's own forward."""
    if not isinstance(step, FunctionStep):
        return type(step).__name__
    return _FUNCTION_NAMES.get(step.activation.name, step.activation.name)


def function_name(node: fx.Node) -> str:
    name = name_of(node)
    return _FUNCTION_NAMES.get(name, name)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
