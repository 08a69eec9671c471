"""Runs a small case of every operator on the GPU, for compute-sanitizer to watch.

With ``--on-cpu`` it runs the CUDA kernels as a library for the CPU, for AddressSanitizer and
UndefinedBehaviorSanitizer: the sizes are small then, some fit for vectors and some not.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch

from pooling_ext import backends, cuda
from pooling_ext.testing.launches import CASES, PHASES, LaunchCase

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on-cpu", action="store_true", help="the CUDA kernels, on the CPU")
    if parser.parse_args().on_cpu:
        if not cuda.on_cpu():
            print("POOLING_EXT_CUDA_ON_CPU names no library.", file=sys.stderr)
            return 2
        for case in CASES:
            for channels, size in ((48, 16), (37, 13)):
                shape = (min(case.shape[0], channels), *(min(side, size) for side in case.shape[1:]))
                run(replace(case, shape=shape), "cpu", "cuda", batch=2)
    elif torch.cuda.is_available():
        for case in CASES:
            for backend in ("cuda", "triton"):
                run(case, "cuda", backend)
        torch.cuda.synchronize()
    else:
        print("There is no GPU that PyTorch can use.", file=sys.stderr)
        return 2
    print(f"{len(CASES)} operators ran.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
