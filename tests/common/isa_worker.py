"""A compact check of the CPU kernels, for one instruction set: test_isa.py runs it in a process of its own.

Prints the instruction set in use, then a digest of every result's bits.
"""

from __future__ import annotations

import hashlib
import sys
import warnings

import torch

from pooling_ext.backends import cpu_library
from pooling_ext.testing import checks
from pooling_ext.testing.opspec import cases
from pooling_ext.testing.specs import SPECS

LAYOUTS = ("contiguous", "channels_last", "sliced", "offset")
#: Wide enough for AVX-512 vectors of bytes and a tail, along channels and along rows.
CHANNELS = 67


def digest(threads: int, compare: bool) -> str:
    """Of every operator's outputs, indices and gradients, compared with their references if asked."""
    torch.set_num_threads(threads)
    bits = hashlib.sha256()
    # Convolutions have tests of their own: test_winograd.py, test_depthwise_conv.py and test_image_conv.py.
    for case in cases(spec for spec in SPECS if not spec.autocast):
        batch, _, *sides = case.spec.wide
        for layout in LAYOUTS:
            for dtype in case.spec.dtypes:
                torch.manual_seed(0)
                tensors = case.tensors((batch, CHANNELS, *sides), dtype, layout)
                found = (
                    checks.check_values(case, tensors) if compare else checks.results(case.ours, tensors)[0]
                )
                for result in found.values():
                    bits.update(result.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()


def main() -> None:
    if cpu_library.module is None:
        sys.exit(f"no compiled kernels: {cpu_library.why_not}")
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    print(cpu_library.module.isa)
    one, two = digest(1, compare=True), digest(2, compare=False)
    assert one == two, "one thread and two give different bits"
    print(one)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
