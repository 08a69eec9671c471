"""What an operator registers: the dtypes that each backend supports, and the kernels that it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Dtypes = frozenset[torch.dtype]


@dataclass(frozen=True)
class Operator:
    """An operator as the backends know it.

    Attributes:
        name: as :func:`choose` and ``explain`` call it.
        dtypes: for each backend that has kernels, those of the input that they support.
        kernels: for each GPU backend, the low-level operators (``torch.ops.pooling_ext``) that it implements.
        triton_module: has a function for each of Triton's, of the same name and arguments.
        triton_first: whether Triton's kernels are preferred to CUDA's.
    """

    name: str
    dtypes: Mapping[str, Dtypes]
    kernels: Mapping[str, tuple[str, ...]]
    triton_module: str
    triton_first: bool = False


def operator(
    op: str,
    *,
    cpu: Dtypes | None = None,
    cuda: Dtypes | None = None,
    triton: Dtypes | None = None,
    kernels: tuple[str, ...] | None = None,
    cuda_kernels: tuple[str, ...] | None = None,
    triton_module: str | None = None,
    triton_first: bool = False,
) -> Operator:
    """See ``Registry.register``."""
    given = {"cpu": cpu, "cuda": cuda, "triton": triton}
    dtypes = {name: found for name, found in given.items() if found is not None}
    shared = (op,) if kernels is None else kernels
    own = {"cuda": shared if cuda_kernels is None else cuda_kernels, "triton": shared}
    return Operator(
        op,
        dtypes,
        {name: names for name, names in own.items() if name in dtypes},
        triton_module or "",
        triton_first,
    )
