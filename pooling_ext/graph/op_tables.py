"""The operators, functions and modules that patch and freeze understand, and what they do to memory."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as TF
from torch import fx, nn

from .. import functional as F
from ..ops.conv_choice import STANDS_FOR
from .proxies import IN_PLACE_FUNCTIONS, expect_length

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: In evaluation these give what they are given.
IDENTITIES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)

# --- what an operator does to memory ----------------------------------------------------------------------

#: Operators (by name) whose result is new memory, or no tensor at all.
_FRESH = """
    add sub rsub mul truediv div floordiv floor_divide remainder fmod mod pow matmul bmm mm addmm
    baddbmm einsum neg exp log sqrt rsqrt reciprocal abs sign round floor ceil square sin cos erf
    mean sum prod amax amin max min std var norm argmax argmin topk sort cumsum clamp clamp_min
    clamp_max maximum minimum where cat concat concatenate stack clone hstack vstack dstack repeat
    repeat_interleave tile roll flip rot90 gather index_select masked_fill scatter size dim numel eq
    ne lt le gt ge logical_and logical_or logical_not is_floating_point stride get_device
    is_contiguous item tolist isnan isinf any all nonzero softplus softsign relu relu6 hardtanh
    hardswish hardsigmoid silu gelu leaky_relu prelu elu selu celu mish sigmoid tanh glu logsigmoid
    softmax log_softmax threshold rrelu softmin normalize conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d linear bilinear embedding layer_norm group_norm instance_norm
    local_response_norm rms_norm scaled_dot_product_attention interpolate upsample grid_sample
    affine_grid one_hot cosine_similarity pairwise_distance max_pool1d max_pool2d max_pool3d
    avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d lp_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d global_avg_pool2d zeros ones full empty tensor arange linspace eye rand
    randn randint randperm zeros_like ones_like full_like empty_like rand_like randn_like
    randint_like new_zeros new_ones new_full new_empty new_tensor bernoulli multinomial normal
"""
FRESH = frozenset(_FRESH.split())
#: Operators whose result shares its argument's memory, or may, in any layout.
_VIEWS = """
    transpose permute unsqueeze squeeze expand expand_as narrow select slice chunk split tensor_split
    split_with_sizes unbind detach movedim moveaxis swapaxes swapdims t getitem unfold diagonal view_as
    broadcast_to broadcast_tensors alias pixel_shuffle pixel_unshuffle dropout dropout1d dropout2d dropout3d
    alpha_dropout feature_alpha_dropout stochastic_depth requires_grad_ unflatten
"""
VIEWS = frozenset((*_VIEWS.split(), expect_length.__name__))
_LAYOUT = """
    contiguous reshape reshape_as flatten view ravel to float half bfloat16 double type type_as cpu
    cuda
"""
#: Operators that share their argument's memory or copy it, which depends on its layout and dtype.
LAYOUT = frozenset(_LAYOUT.split())
_RANDOM = """
    rand randn randint randperm normal bernoulli multinomial poisson exponential uniform random
    log_normal cauchy geometric empty new_empty empty_strided dropout dropout1d dropout2d dropout3d
    alpha_dropout feature_alpha_dropout rrelu stochastic_depth
"""
#: Operators that draw numbers, or read memory that nobody wrote.
RANDOM = frozenset(_RANDOM.split())
# Attributes of a tensor that share its memory.
_MEMORY_ATTRIBUTES = frozenset(["T", "mT", "H", "mH", "data", "real", "imag"])
# Methods of Python's containers that change them.
_CONTAINER_METHODS = frozenset(
    ["append", "extend", "insert", "pop", "remove", "clear", "update", "setdefault", "popitem", "sort"]
)

#: Operators in place, and their out-of-place forms. Methods and functions that end in _ have theirs by name.
OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    IN_PLACE_FUNCTIONS["iadd"]: operator.add,
    IN_PLACE_FUNCTIONS["isub"]: operator.sub,
    IN_PLACE_FUNCTIONS["imul"]: operator.mul,
    IN_PLACE_FUNCTIONS["itruediv"]: operator.truediv,
    torch.relu_: torch.relu,
    TF.relu_: TF.relu,
    TF.leaky_relu_: TF.leaky_relu,
    TF.hardtanh_: TF.hardtanh,
    TF.elu_: TF.elu,
    TF.selu_: TF.selu,
    TF.celu_: TF.celu,
    torch.threshold_: TF.threshold,
    torch.sigmoid_: torch.sigmoid,
    torch.tanh_: torch.tanh,
}


# Where functions of torch.nn.functional take ``inplace``, if not by name.
_INPLACE_ARGUMENT: dict[Any, int] = {
    TF.relu: 1,
    TF.relu6: 1,
    TF.hardswish: 1,
    TF.hardsigmoid: 1,
    TF.silu: 1,
    TF.mish: 1,
    TF.selu: 1,
    TF.leaky_relu: 2,
    TF.elu: 2,
    TF.celu: 2,
    TF.hardtanh: 3,
    TF.threshold: 3,
    TF.dropout: 3,
}
# The arguments of torch.nn.functional.batch_norm that training changes.
_STATISTICS = ((1, "running_mean"), (2, "running_var"))


class Effect(NamedTuple):
    """What calling a node does to memory.

    Attributes:
        shares: the nodes whose memory its value may share.
        writes: the nodes whose memory it may change.
        by_layout: whether it shares memory depends on the layout or dtype of its argument.
    """

    shares: tuple[fx.Node, ...] = ()
    writes: tuple[fx.Node, ...] = ()
    by_layout: bool = False


def name_of(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def is_in_place(node: fx.Node, module: nn.Module | None = None) -> bool:
    """Whether a node overwrites its first argument with its result."""
    if node.op == "call_module":
        return bool(getattr(module, "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    named = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    if named or node.target in OUT_OF_PLACE:
        return True
    position = _INPLACE_ARGUMENT.get(node.target, len(node.args))
    return bool(argument(node, "inplace", position, False))


def out_of_place(node: fx.Node) -> Any:
    """The target of the out-of-place form of a function or method in place, or None."""
    if node.target in OUT_OF_PLACE:
        return OUT_OF_PLACE[node.target]
    if node.op == "call_method" and isinstance(node.target, str) and hasattr(torch.Tensor, node.target[:-1]):
        return node.target[:-1]
    if node.op == "call_function" and not name_of(node).endswith("_"):
        return node.target  # inplace=True among its arguments
    return None


def effect(node: fx.Node, module: nn.Module | None = None) -> Effect:
    """What a node does to memory.

    Args:
        module: the module that it calls, whose class may be relied on; None if it calls none, or any.
    """
    sources = tuple(node.all_input_nodes)
    if node.op in ("placeholder", "get_attr", "output"):
        return Effect()
    if node.op == "call_module":
        return _effect_of_module(sources, _unless_seen(node, sources), module)
    name = name_of(node)
    first = tuple(source for source in node.args[:1] if isinstance(source, fx.Node))
    out = node.kwargs.get("out")
    if out is not None:
        given = (out,) if isinstance(out, fx.Node) else sources
        return Effect(given, given)
    if node.target is operator.setitem:
        return Effect((), first)
    if is_in_place(node):
        return Effect(first, first)
    if node.target is TF.batch_norm and argument(node, "training", 5, False):
        statistics = (argument(node, name, position, None) for position, name in _STATISTICS)
        return Effect((), tuple(x for x in statistics if isinstance(x, fx.Node)))
    if name in FRESH or name == "batch_norm":
        return Effect()
    if node.target is getattr:
        return Effect(first if node.args[1] in _MEMORY_ATTRIBUTES else ())
    if name in VIEWS or name in LAYOUT:
        return Effect(sources, (), name in LAYOUT)
    known = node.op == "call_method" and name not in _CONTAINER_METHODS
    if known or str(getattr(node.target, "__module__", None) or "torch").partition(".")[0] in (
        "torch",
        "_operator",
    ):
        return Effect(sources, (), True)  # PyTorch says by a name's end whether it writes
    return Effect(sources, _unless_seen(node, sources), True)


def _unless_seen(node: fx.Node, sources: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """What an unknown function may write: anything, unless it was watched on an example."""
    return () if "type" in node.meta else sources


def _effect_of_module(
    sources: tuple[fx.Node, ...], unknown: tuple[fx.Node, ...], module: nn.Module | None
) -> Effect:
    if module is None or is_hooked(module):
        return Effect(sources, unknown, True)
    kind = plain_kind(module)
    if getattr(module, "inplace", False):
        return Effect(sources, sources)
    if kind in IDENTITIES:
        return Effect(sources)
    if kind in (nn.Flatten, nn.Unflatten):
        return Effect(sources, (), True)
    ours = kind.__module__.startswith(("torch.nn.modules.", "pooling_ext."))
    return Effect() if ours and not module._modules else Effect(sources, unknown, True)


# --- modules --------------------------------------------------------------------------------------

#: The attribute of a class that patch makes, which holds the class that it stands for.
BASE = "_pooling_ext_base"


def base_of(cls: type) -> type:
    """The class itself, or the one that a class of ours stands for."""
    return cls.__dict__.get(BASE) or cls.__dict__.get(STANDS_FOR, cls)


# What a subclass may not change to count as the class of torch.nn that it is made from.
_BEHAVIOR = ("forward", "__call__", "_call_impl", "__getattr__", "_conv_forward", "_check_input_dim")


@functools.cache
def unchanged_class(cls: type) -> type:
    """The class of torch.nn whose behavior ``cls`` has: its own, or one that a subclass does not change.

    A class of ours counts as the one that it stands for.
    """
    cls = base_of(cls)
    for known in cls.__mro__:
        if known.__module__.startswith("torch.nn.modules."):
            same = all(getattr(cls, name, None) is getattr(known, name, None) for name in _BEHAVIOR)
            return known if same else cls
    return cls


def plain_kind(module: nn.Module) -> type:
    """:func:`unchanged_class` of a module; its own class if it has a forward of its own."""
    return type(module) if "forward" in module.__dict__ else unchanged_class(type(module))


def is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


# --- functions ------------------------------------------------------------------------------------

_POOL_NAMES = tuple(
    f"{kind}_pool{rank}d"
    for kind in ("max", "avg", "lp", "adaptive_max", "adaptive_avg")
    for rank in (1, 2, 3)
)
#: Pooling functions of PyTorch, and ours.
POOLS: dict[Any, Callable[..., Any]] = {getattr(TF, name): getattr(F, name) for name in _POOL_NAMES}
POOLS |= {
    getattr(torch, name): getattr(F, name)
    for name in ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "adaptive_avg_pool1d")
}
POOL_NAMES = frozenset(_POOL_NAMES)


def argument(node: fx.Node, name: str, position: int, default: Any) -> Any:
    """An argument of a call by its name or position."""
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def replace_pool(node: fx.Node) -> str | None:
    """Make ``node`` call our pooling function instead of PyTorch's, if it does call one; gives its name."""
    if node.op != "call_function" or node.target not in POOLS:
        return None
    ours = POOLS[node.target]
    from_torch = getattr(torch, ours.__name__, None) is node.target
    if from_torch and "max" in ours.__name__ and len(node.args) > 2 and not node.args[2]:
        node.update_arg(2, None)  # torch.max_pool2d's way to say that the stride is the kernel size
    node.target = ours
    return ours.__name__


class Addition(NamedTuple):
    """A sum of two values; in place into the left one, or not."""

    left: fx.Node
    right: fx.Node
    in_place: bool

    def other(self, value: fx.Node) -> fx.Node:
        return self.right if self.left is value else self.left


_ADDS = (operator.add, torch.add, "add")
_IN_PLACE_ADDS = (operator.iadd, IN_PLACE_FUNCTIONS["iadd"], "add_")


def addition(node: fx.Node | None) -> Addition | None:
    """The sum of two different values that ``node`` computes."""
    if node is None or node.op not in ("call_function", "call_method"):
        return None
    in_place = node.target in _IN_PLACE_ADDS
    if not (in_place or node.target in _ADDS) or node.kwargs or len(node.args) != 2:
        return None
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    return Addition(left, right, in_place)


class GlobalMean(NamedTuple):
    """A mean over height and width by Tensor.mean over ``dims``."""

    dims: tuple[int, int]
    keepdim: bool


def global_mean(node: fx.Node) -> GlobalMean | None:
    """The mean over the third and fourth of four dimensions (or the last two) that ``node`` computes."""
    if (node.op, node.target) not in (("call_method", "mean"), ("call_function", torch.mean)):
        return None
    arguments = dict(zip(("input", "dim", "keepdim", "dtype"), node.args, strict=False)) | dict(node.kwargs)
    dims: Any = arguments.get("dim")
    if not isinstance(dims, (tuple, list)) or not set(arguments) <= {"input", "dim", "keepdim"}:
        return None
    if list(dims) not in ([2, 3], [3, 2], [-2, -1], [-1, -2]):
        return None
    keepdim = arguments.get("keepdim", False)
    return GlobalMean(tuple(dims), keepdim) if isinstance(keepdim, bool) else None


def is_global(output_size: Any) -> bool:
    """Whether an adaptive pooling of that output size makes one element of each plane."""
    return output_size == 1 or (isinstance(output_size, (tuple, list)) and list(output_size) == [1, 1])


def only_user(node: fx.Node | None) -> Any:
    """The one node that reads ``node``, once; the output is none."""
    if node is None or len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if user.op != "output" and uses(user, node) == 1 else None


def uses(user: fx.Node, node: fx.Node) -> int:
    """How often ``node`` stands among the arguments of ``user``."""
    count = 0

    def visit(found: fx.Node) -> fx.Node:
        nonlocal count
        count += found is node
        return found

    fx.map_arg((user.args, user.kwargs), visit)
    return count
