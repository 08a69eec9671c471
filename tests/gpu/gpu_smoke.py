"""Runs a small case of every operator on the GPU, for compute-sanitizer to watch.

With ``--on-cpu`` it runs the CUDA kernels as a library for the CPU, for AddressSanitizer and
UndefinedBehaviorSanitizer: the sizes are small then, some fit for vectors and some not.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from itertools import product

import torch

from pooling_ext import backends
from pooling_ext.backends import cuda_library
from pooling_ext.ops.activations import ACTIVATIONS
from pooling_ext.testing import checks
from pooling_ext.testing.launches import ACTIVATION_CASES, CASES, PHASES, LaunchCase
from pooling_ext.testing.opspec import cases
from pooling_ext.testing.specs import SPECS

# Every activation; one kernel does them all, so that one of its cases is enough.
ACTIVATED = tuple(
    replace(case, name=f"{case.name}-{name}", kwargs={"activation": name})
    for case in ACTIVATION_CASES[-1:]
    for name in ACTIVATIONS
)
#: Every other operator and set of options that GPUs have kernels for.
POOLS_AND_NORMS = tuple(case for case in cases(SPECS) if not case.spec.autocast)
DTYPES = (torch.float32, torch.bfloat16)
FORMATS = (torch.contiguous_format, torch.channels_last)


def run(case: LaunchCase, device: str, backend: str, batch: int = 1) -> None:
    """Every phase of ``case``, in every dtype and format."""
    for dtype in DTYPES:
        for format in FORMATS:
            tensors = case.tensors(batch, dtype, format, device)
            with backends.use_backend(backend):
                for phase in PHASES:
                    case.run(phase, tensors)()


def run_specs(device: str, backend: str) -> None:
    """Every operator with and without gradients, on sizes that fit for vectors and on some that do not."""
    for case, dtype, layout in product(POOLS_AND_NORMS, DTYPES, ("contiguous", "channels_last")):
        spec = case.spec
        for shape in (spec.wide, (2, 48, *(16, 8, 8)[: len(spec.wide) - 2])):
            with torch.device(device), backends.use_backend(backend):
                tensors = case.tensors(shape, dtype, layout)
                checks.results(case.ours, tensors)
                with torch.no_grad():
                    case.ours(**tensors)


def run_convolutions(device: str) -> None:
    """Every tile of the CUDA convolutions, with a prologue and without, with vectors and without."""
    ops, window = torch.ops.pooling_ext, ([2, 1], [1, 1], [1, 1])
    with backends.use_backend("cuda"):
        for dtype, channels, tile in product(DTYPES, (32, 7), range(len(cuda_library.conv_tiles()))):
            x, weight, residual = (
                torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
                for shape in ((2, channels, 17, 12), (72, channels, 3, 3), (2, 72, 9, 12))
            )
            stats = torch.ones(2, channels, dtype=torch.float64, device=device)
            ops.conv_bias_act_cuda(x, weight, None, residual, *window, True, tile)
            ops.conv_stats_cuda(x, weight, None, stats, None, None, 1e-5, True, *window, tile)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on-cpu", action="store_true", help="the CUDA kernels, on the CPU")
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"], help="on a GPU")
    args = parser.parse_args()
    if args.on_cpu:
        if not cuda_library.on_cpu():
            print("POOLING_EXT_CUDA_ON_CPU names no library.", file=sys.stderr)
            return 2
        for case in ACTIVATED:
            run(replace(case, shape=(37, 13, 13)), "cpu", "cuda", batch=2)
        run_specs("cpu", "cuda")
        run_convolutions("cpu")
    elif torch.cuda.is_available():
        for backend in args.backends:
            for case in CASES + ACTIVATED:
                run(case, "cuda", backend)
            run_specs("cuda", backend)
        if "cuda" in args.backends and cuda_library.why_not() is None:
            run_convolutions("cuda")
        torch.cuda.synchronize()
    else:
        print("There is no GPU that PyTorch can use.", file=sys.stderr)
        return 2
    print(f"{len(POOLS_AND_NORMS) + len(ACTIVATED)} operators ran.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
