"""Which convolutions of a frozen model Winograd's kernels get, by memory; and what the report says of each.

A transformed weight takes four times what the plain one takes, or eight times in half precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from ..graph.report import FusionReport
from .conv_engines import WINOGRAD, as_conv, saved_multiplications, winograd_unfit
from .layers import PackedConv
from .region import Region

_NO_MEMORY = "is more than there is left of POOLING_EXT_WINOGRAD_MIB"


def allot(layers: Iterable[PackedConv], left: int, exact: bool) -> bool:
    """Let layers choose the way they run, those first to which Winograd's kernels save the most by the byte.

    Those that were asked before may change for more or less memory alone.

    Args:
        left: what their transformed weights may take together, in bytes.
        exact: whether Winograd's kernels are left out.

    Returns:
        Whether any of them now runs in another way.
    """
    reasons: dict[PackedConv, str | None] = {}
    for layer in layers:
        settled = layer.left_out is not None and not _lacks_memory(layer)
        reasons[layer] = layer.left_out if settled else winograd_unfit(layer)
        if exact and reasons[layer] is None:
            reasons[layer] = "exact results are asked for"
    reasons |= beyond((layer for layer, reason in reasons.items() if reason is None), left)
    changed = False
    # Those that give memory back come first.
    for layer in sorted(reasons, key=lambda layer: reasons[layer] is None):
        if layer.engine is None or layer.left_out != reasons[layer]:
            layer.settle(reasons[layer])
            changed = True
    return changed


def beyond(layers: Iterable[PackedConv], left: int) -> dict[PackedConv, str]:
    """Those of ``layers`` for whose transformed weights there is no memory left, with the reason."""
    sharing: dict[int, list[PackedConv]] = {}  # by the weight that they have in common
    for layer in layers:
        sharing.setdefault(id(layer.weight), []).append(layer)
    reasons: dict[PackedConv, str] = {}
    for group in sorted(sharing.values(), key=_saved_by_the_byte, reverse=True):
        needed = transformed_bytes(group[0])
        if needed <= left:
            left -= needed
            continue
        for layer in group:
            reasons[layer] = f"its transformed weight of {_mib(needed)} {_NO_MEMORY}"
    return reasons


def _lacks_memory(layer: PackedConv) -> bool:
    return layer.left_out is not None and layer.left_out.endswith(_NO_MEMORY)


def transformed_bytes(layer: PackedConv) -> int:
    conv = as_conv(layer)
    return 0 if isinstance(conv, str) else conv.winograd_bytes


def _saved_by_the_byte(group: list[PackedConv]) -> float:
    convs = [conv for layer in group if not isinstance(conv := as_conv(layer), str)]
    return sum(map(saved_multiplications, convs)) / max(1, convs[0].winograd_bytes)


def spent(root: nn.Module) -> int:
    """The bytes of all transformed weights in a module."""
    weights = {id(layer.weight): layer for layer in convolutions(root) if layer.engine is WINOGRAD}
    return sum(map(transformed_bytes, weights.values()))


def convolutions(root: nn.Module) -> list[PackedConv]:
    return [module for module in root.modules() if isinstance(module, PackedConv)]


def describe(root: nn.Module, report: FusionReport) -> None:
    """Let the report say how each frozen convolution of ``root`` runs, and why not in a faster way."""
    ways: dict[str, list[str]] = {}
    for region in root.modules():
        if not isinstance(region, Region):
            continue
        for name, layer in region.graph.named_children():
            if not isinstance(layer, PackedConv):
                continue
            path = region.layers.get(name, name)
            ways.setdefault(path, []).append(layer.way)
            lines = report.details.setdefault(path, [])
            size = "x".join(map(str, layer.input_size)) or "unknown size"
            lines.append(f"{layer.way}, for an input of {size}")
            lines += [f"not {other}: {reason}" for other, reason in layer.rejected]
            if _lacks_memory(layer):
                report.beyond_limit.append(path)
    told = []
    for entry in report.replaced:
        if entry.path in ways:
            way = " and ".join(dict.fromkeys(ways[entry.path]))
            entry = replace(entry, why=f"{way}, {entry.why}" if entry.why else way)
        told.append(entry)
    report.replaced[:] = told
    report.winograd_bytes = spent(root)


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.3g} MiB"
