"""Runs a small case of every operator on the GPU, for compute-sanitizer to watch."""

from __future__ import annotations

import sys

import torch

from pooling_ext import backends
from pooling_ext.testing.launches import CASES, PHASES


def main() -> int:
    if not torch.cuda.is_available():
        print("There is no GPU that PyTorch can use.", file=sys.stderr)
        return 2
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            for format in (torch.contiguous_format, torch.channels_last):
                tensors = case.tensors(1, dtype, format, "cuda")
                for backend in ("cuda", "triton"):
                    if backend in [known.name for known in backends.BACKENDS]:
                        with backends.use_backend(backend):
                            for phase in PHASES:
                                case.run(phase, tensors)()
    torch.cuda.synchronize()
    print(f"{len(CASES)} operators ran.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
