"""Takes batch norms, activations and additions into the layers before them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as TF
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..graph.activations import RELU, Activation, kernel_activation
from ..graph.op_tables import BATCH_NORMS, CONVS, TRANSPOSED, argument, name_of, only_user
from .editor import GraphEditor
from .layers import FrozenBatchNormAct, PackedConv, PackedLinear
from .normalization import Affine, Normalization, folded, normalization

_MULTIPLICATIONS = (operator.mul, torch.mul, "mul")
_ADDITIONS = (operator.add, torch.add, "add")
_SUBTRACTIONS = (operator.sub, torch.sub, "sub")


class _Norm(NamedTuple):
    """A normalization that a node does, its input, how the report names it, and the batch norm's path."""

    values: Normalization | Affine
    input: fx.Node
    what: str
    path: str | None = None


def fold_and_fuse(editor: GraphEditor) -> None:
    """Make layers of the convolutions, linear layers and batch norms of the graph, with what follows them."""
    shared: dict[Any, str] = {}
    weights: dict[Any, tuple[Tensor, Tensor | None]] = {}
    for node in list(editor.graph.nodes):
        if node._erased:  # a fusion has taken it in
            continue
        kind = editor.kind(node)
        if kind in (*CONVS, *TRANSPOSED, nn.Linear):
            if len(node.args) == 1 and not node.kwargs:
                _fuse_layer(editor, node, kind, shared, weights)
        elif (norm := _batch_norm(editor, node)) is not None:
            _fuse_norm(editor, node, norm)


# --- recognition -----------------------------------------------------------------------------------


def _batch_norm(editor: GraphEditor, node: fx.Node | None) -> _Norm | None:
    """The batch norm by constants that a node is, as a module or as a function."""
    if node is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if editor.kind(node) in BATCH_NORMS:
        module = editor.module(node)
        path = editor.path(node)
        return _Norm(normalization(module, path), node.args[0], f"{type(module).__name__} {path}", path)
    if node.op != "call_function" or name_of(node) != "batch_norm":
        return None
    functional = node.target is TF.batch_norm
    names = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    if not functional:  # torch.batch_norm
        names[1:5] = ["weight", "bias", "running_mean", "running_var"]
    given = {name: argument(node, name, position, None) for position, name in enumerate(names)}
    eps = given["eps"] if given["eps"] is not None or not functional else 1e-5
    if given["training"] or not isinstance(eps, float):
        return None
    vectors = [given[name] for name in ("running_mean", "running_var", "weight", "bias")]
    tensors = [editor.constant(vector) for vector in vectors]
    if any((vector is None) != (tensor is None) for vector, tensor in zip(vectors, tensors, strict=True)):
        return None
    mean, var, weight, bias = tensors
    if mean is None or var is None:
        return None
    # The forward of a module, if these are its statistics.
    target = str(getattr(vectors[0], "target", "")).rpartition(".")[0]
    module, what, path = editor.modules.get(target), "batch_norm", None
    if isinstance(module, _BatchNorm):
        path = editor.path_of(target)
        what = f"{type(module).__name__} {path}"
    return _Norm(Normalization(mean, var, weight, bias, eps), node.args[0], what, path)


def _affine(editor: GraphEditor, node: fx.Node | None) -> _Norm | None:
    """A multiplication or addition of a constant for each channel."""
    if node is None or node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
        return None
    for value, constant in (node.args, node.args[::-1]):
        vector = _per_channel(editor, value, constant, node)
        if vector is None:
            continue
        if node.target in _MULTIPLICATIONS:
            return _Norm(Affine(vector, None), value, "scale")  # type: ignore[arg-type]
        if node.target in _ADDITIONS:
            return _Norm(Affine(None, vector), value, "shift")  # type: ignore[arg-type]
        if node.target in _SUBTRACTIONS and value is node.args[0]:
            return _Norm(Affine(None, -vector), value, "shift")  # type: ignore[arg-type]
    return None


def _per_channel(editor: GraphEditor, value: Any, constant: Any, node: fx.Node) -> Tensor | None:
    """The vector that broadcasts over all but the second dimension of ``value``."""
    tensor = editor.constant(constant)
    if tensor is None or not isinstance(value, fx.Node):
        return None
    shape, dtype = value.meta.get("shape"), value.meta.get("dtype")
    if shape is None or len(shape) < 2 or node.meta.get("shape") != shape or tensor.dtype != dtype:
        return None
    wide = (1,) * (len(shape) - tensor.dim()) + tuple(tensor.shape)
    fits = tensor.dim() <= len(shape) and wide == (1, shape[1], *[1] * (len(shape) - 2))
    return tensor.reshape(-1) if fits else None


# --- fusion --------------------------------------------------------------------------------------------


def _fuse_layer(
    editor: GraphEditor,
    node: fx.Node,
    kind: type,
    shared: dict[Any, str],
    weights: dict[Any, tuple[Tensor, Tensor | None]],
) -> None:
    """Take what follows a convolution or linear layer into it.

    Args:
        shared, weights: the layers that were made, and the folded weights, by what they were made of.
    """
    module = editor.module(node)
    path, parts = editor.path(node), [type(module).__name__]
    rank = 2 if kind is nn.Linear else module.weight.dim()
    shape: Any = node.meta.get("shape_in") or ()
    last, normalizations, key = _following_norms(editor, node, rank, parts)
    user = only_user(last)
    activation, residual = editor.activation(user), None
    if activation is not None and user is not None:
        last = user
        parts.append(str(activation))
    elif kind in (nn.Conv2d, nn.Conv3d) and len(shape) == rank:
        found = _residual(editor, node, last)
        if found is not None:
            residual, last, rectified = found
            parts.append("add")
            if rectified:
                activation = RELU
                parts.append("relu")
    if kind is nn.Linear and len(shape) not in (1, 2) and not shape:
        return
    unbatched = kind is not nn.Linear and len(shape) == rank - 1
    if unbatched:
        shape = _batched(editor, node, shape)
    before, own_padding = _padding(module, kind)
    if before is not None:
        _pad(editor, node, before, module.padding_mode)
    known = tuple(key)
    key += [activation, residual is not None, shape]
    name = shared.get(tuple(key))
    if name is None:
        if known not in weights:  # layers that differ in what follows, or in size, have them in common
            weights[known] = _weight(editor, module, kind, normalizations)
        if before is not None and shape:
            extra = [low + high for low, high in zip(before[::2], before[1::2], strict=True)][::-1]
            shape = (*shape[:2], *(size + more for size, more in zip(shape[2:], extra, strict=True)))
        layer = _packed(module, kind, weights[known], activation, residual is not None, own_padding, shape)
        name = shared[tuple(key)] = editor.add(str(node.target), layer)
    args = (node.args[0],) if residual is None else (node.args[0], residual)
    # A residual may be made after the convolution, so the sum is where both are there. How a convolution runs
    # is told when it is known.
    editor.tell(node, parts[0], ", ".join(parts[1:]) or "prepacked" * (kind is nn.Linear))
    made = editor.substitute(node if residual is None else last, last, name, args, path)
    if unbatched:
        _unbatched(editor, made)


def _following_norms(
    editor: GraphEditor, node: fx.Node, rank: int, parts: list[str]
) -> tuple[fx.Node, list[Normalization | Affine], list[Any]]:
    """The last of the batch norms after a layer, what they do, and what tells the folded weights from others.

    Args:
        rank: dimensions of a batch.
        parts: the names, to which theirs are added.
    """
    last, normalizations = node, []
    key: list[Any] = [node.target]
    user = only_user(last)
    while user is not None and len(node.meta.get("shape") or ()) == rank:
        norm = _batch_norm(editor, user) or _affine(editor, user)
        if norm is None or norm.input is not last:
            break
        normalizations.append(norm.values)
        parts.append(norm.what)
        editor.tell_norm(norm.path)
        key.append(user.target if user.op == "call_module" else user)
        last, user = user, only_user(user)
    return last, normalizations, key


def _batched(editor: GraphEditor, node: fx.Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give a layer its one image as a batch, whose shape is returned."""
    with editor.graph.inserting_before(node):
        batched = editor.graph.call_method("unsqueeze", (node.args[0], 0))
    batched.meta = {"shape": (1, *shape), "shape_in": shape}
    editor.aliasing.replace(node.args[0], batched, node)  # type: ignore[arg-type]
    node.args = (batched,)
    return (1, *shape)


def _unbatched(editor: GraphEditor, made: fx.Node) -> None:
    """Let users of a layer have the image of a batch of one."""
    with editor.graph.inserting_after(made):
        alone = editor.graph.call_method("squeeze", (made, 0))
    alone.meta = dict(made.meta)
    made.meta = {**made.meta, "shape": (1, *(made.meta.get("shape") or ()))}
    editor.aliasing.replace(made, alone, made)
    made.replace_all_uses_with(alone, delete_user_cb=lambda user: user is not alone)


def _residual(editor: GraphEditor, node: fx.Node, last: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """What is added to ``last``, the node that does so or the ReLU after it, and whether there is one.

    The layer moves there, so nothing between may change its input.
    """
    user = only_user(last)
    found = editor.addition(user)
    if found is None:
        return None
    residual, after = found.other(last), only_user(user)
    rectified = editor.activation(after) == RELU
    if rectified and editor.aliasing.unchanged(residual, user, after):
        user = after
    else:
        rectified = False
    if not editor.aliasing.unchanged(node.args[0], node, user):  # type: ignore[arg-type]
        return None
    return residual, user, rectified


def _weight(
    editor: GraphEditor, module: Any, kind: type, normalizations: list[Normalization | Affine]
) -> tuple[Tensor, Tensor | None]:
    """Folded, in the dtype to compute in."""
    dtype = editor.dtype or module.weight.dtype
    weight, bias = folded(module.weight, module.bias, normalizations, module if kind in TRANSPOSED else None)
    return weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype)


def _packed(
    module: Any,
    kind: type,
    weights: tuple[Tensor, Tensor | None],
    activation: Activation | None,
    residual: bool,
    own_padding: Sequence[int],
    shape: Sequence[int],
) -> nn.Module:
    weight, bias = weights
    if kind is nn.Linear:
        rows = torch.Size(shape[:-1]).numel() if len(shape) > 1 else 1
        return PackedLinear(weight, bias, activation, rows)
    return PackedConv(
        weight,
        bias,
        module.stride,
        own_padding,
        module.dilation,
        module.groups,
        activation,
        "add" if residual else None,
        shape,
        module.output_padding if kind in TRANSPOSED else None,
        settle=False,
    )


def _fuse_norm(editor: GraphEditor, node: fx.Node, norm: _Norm) -> None:
    """A batch norm that nothing takes in becomes one pass with what follows."""
    residual, last, parts = None, node, []
    user = only_user(node)
    activation = _of_our_kernels(editor, user)
    if activation is not None:
        last = user
        parts.append(str(activation))
    elif (found := editor.addition(user)) is not None:
        after = only_user(user)
        activation = _of_our_kernels(editor, after)
        if activation is not None and editor.aliasing.unchanged(found.other(node), user, after):
            residual, last = found.other(node), after
            parts += ["add", str(activation)]
        else:
            activation = None
    if not editor.aliasing.unchanged(norm.input, node, last):
        residual, last, activation, parts = None, node, None, []
    values = norm.values
    assert isinstance(values, Normalization)
    wide = torch.float64 if (editor.dtype or values.mean.dtype) == torch.float64 else torch.float32
    vectors = [None if x is None else x.detach().to(wide) for x in values[:4]]
    layer = FrozenBatchNormAct(*vectors, values.eps, activation)  # type: ignore[arg-type]
    path = norm.path or node.name
    name = editor.add(str(node.target) if node.op == "call_module" else node.name, layer)
    args = (norm.input,) if residual is None else (norm.input, residual)
    editor.report.replace(path, norm.what.partition(" ")[0], ", ".join(["one pass", *parts]))
    editor.tell_norm(norm.path)
    editor.substitute(last, last, name, args, path)


def _of_our_kernels(editor: GraphEditor, node: fx.Node | None) -> Activation | None:
    """The activation that a node applies, if the kernels of batch norm have it."""
    found = editor.activation(node)
    return None if found is None or kernel_activation(found) is None else found


def _padding(module: Any, kind: type) -> tuple[list[int] | None, Sequence[int]]:
    """What to pad beforehand (in torch.nn.functional.pad's order), and what the convolution pads."""
    if kind is nn.Linear:
        return None, ()
    if kind in TRANSPOSED:
        return None, module.padding
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return None, module.padding
    before = list(module._reversed_padding_repeated_twice)
    symmetric = all(low == high for low, high in zip(before[::2], before[1::2], strict=True))
    if module.padding_mode == "zeros" and symmetric:
        return None, before[::2][::-1]
    return before, [0] * len(module.kernel_size)


def _pad(editor: GraphEditor, node: fx.Node, before: list[int], mode: str) -> None:
    source: Any = node.args[0]
    with editor.graph.inserting_before(node):
        mode = "constant" if mode == "zeros" else mode
        padded = editor.graph.call_function(TF.pad, (source, before), {"mode": mode})
    editor.aliasing.replace(node, padded, node)
    padded.meta["shape_in"] = source.meta.get("shape")
    node.args = (padded, *node.args[1:])
