"""One of several processes that share a batch; test_sync_batch_norm.py starts them.

    python sync_worker.py RANK WORLD RENDEZVOUS RESULTS

Each takes its part of a batch that all can make, and saves what it gets to ``RESULTS.RANK``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from processes import work
from torch import Tensor, nn

import pooling_ext.functional as F
from pooling_ext.ops.batch_norm_arguments import batch_norm_arguments

CHANNELS = 5
#: The sizes of the processes' parts.
SPLITS = {"even": (3, 3), "uneven": (5, 1), "empty": (6, 0)}
#: Operator, dtype, memory format, how the batch is split, and what gradients are wanted of.
EVERYTHING = ("input", "weight", "bias", "residual")
CASES = [
    ("norm", torch.float32, "contiguous", "even", EVERYTHING),
    ("norm", torch.float32, "channels_last", "uneven", EVERYTHING),
    ("norm", torch.float64, "contiguous", "uneven", EVERYTHING),
    ("norm", torch.bfloat16, "channels_last", "uneven", EVERYTHING),
    ("norm", torch.float32, "contiguous", "empty", EVERYTHING),
    ("norm", torch.float32, "contiguous", "uneven", ("input",)),
    ("norm", torch.float32, "contiguous", "uneven", ("weight",)),
    ("norm", torch.float32, "contiguous", "uneven", ("bias",)),
    ("norm", torch.float32, "contiguous", "uneven", ("residual",)),
    ("norm", torch.float32, "contiguous", "uneven", ("weight", "bias")),
    ("plain", torch.float32, "contiguous", "uneven", EVERYTHING[:3]),
    ("plain", torch.float64, "channels_last", "uneven", EVERYTHING[:3]),
    ("stem", torch.float32, "contiguous", "uneven", EVERYTHING[:3]),
    ("stem", torch.float64, "channels_last", "even", EVERYTHING[:3]),
    ("stem", torch.float32, "contiguous", "uneven", ("weight",)),
    ("module", torch.float32, "contiguous", "uneven", EVERYTHING),
    ("module", torch.float32, "channels_last", "even", EVERYTHING),
]


def tensors(dtype: torch.dtype, layout: str) -> dict[str, Tensor]:
    """The whole batch, its gradient and the parameters: the same in every process."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(6, CHANNELS, 8, 7, dtype=torch.float64) * 2 + 3).to(dtype)
    residual = torch.randn(6, CHANNELS, 8, 7, dtype=torch.float64).to(dtype)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return {
        "input": x.contiguous(memory_format=memory_format),
        "residual": residual.contiguous(memory_format=memory_format),
        "weight": torch.randn(CHANNELS, dtype=wide),
        "bias": torch.randn(CHANNELS, dtype=wide),
        "running_mean": torch.zeros(CHANNELS, dtype=wide),
        "running_var": torch.ones(CHANNELS, dtype=wide),
    }


def run(
    op: str, dtype: torch.dtype, layout: str, wanted: tuple[str, ...], part: slice, group: Any
) -> dict[str, Tensor]:
    """Output, running statistics and gradients for a part of the batch."""
    whole = tensors(dtype, layout)
    leaves = {name: x[part] if name in ("input", "residual") else x for name, x in whole.items()}
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in leaves.items()}
    x, residual, weight, bias = (leaves[name] for name in ("input", "residual", "weight", "bias"))
    mean, var = leaves["running_mean"], leaves["running_var"]
    if op == "stem":
        output = F.batch_norm_relu_max_pool(x, mean, var, weight, bias, True, process_group=group)
    elif op == "module":
        conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
        torch.nn.init.constant_(conv.weight, 0.25)
        torch.nn.init.constant_(conv.bias, 1.0)
        bn = nn.SyncBatchNorm(CHANNELS) if group is not None else nn.BatchNorm2d(CHANNELS)
        bn.weight, bn.bias = nn.Parameter(weight), nn.Parameter(bias)
        output = F.conv_bn_act(conv, bn, x, residual)
        leaves["weight"], leaves["bias"] = bn.weight, bn.bias
        mean, var = bn.running_mean, bn.running_var
        assert bn.num_batches_tracked == 1
        if group is not None:
            assert batch_norm_arguments(bn)["process_group"] is not None
            assert batch_norm_arguments(bn.eval())["process_group"] is None
    else:
        added = residual if op == "norm" else None
        output = F.batch_norm_act(x, mean, var, weight, bias, True, 0.1, 1e-5, added, process_group=group)
    torch.manual_seed(1)
    grad = torch.randn((6, *output.shape[1:]), dtype=torch.float64).to(dtype)
    output.backward(grad[part])
    result = {"output": output.detach(), "running_mean": mean, "running_var": var}
    return result | {f"grad of {name}": leaves[name].grad for name in wanted}


def run_all(rank: int, world: int) -> list[dict[str, Any]]:
    found = []
    for op, dtype, layout, split, wanted in CASES:
        sizes = SPLITS[split]
        part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        found.append(run(op, dtype, layout, wanted, part, dist.group.WORLD))
    # More than one value in all, but only one in each process.
    lone = F.batch_norm_act(torch.full((1, 2), float(rank)), None, None, training=True,
                            activation="identity", process_group=dist.group.WORLD)  # fmt: skip
    found.append({"output": lone})
    return found


if __name__ == "__main__":
    work(run_all)
