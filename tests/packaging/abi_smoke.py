"""Checks the library against PyTorch's operators in whatever PyTorch runs this script.

`make abi` runs it under another PyTorch than the one the library was built with, which is the
promise of the stable ABI. It needs neither pytest nor an installed package:

    PYTHONPATH=. python tests/packaging/abi_smoke.py              # the compiled kernels have to load
    POOLING_EXT_NO_NATIVE=1 python tests/packaging/abi_smoke.py --fallback
"""

from __future__ import annotations

import argparse
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

if __package__ in (None, ""):  # run as a script: import the checkout that it lies in
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

LAYOUTS = ("contiguous", "channels_last", "sliced")


def release(version: str) -> str:
    """``"2.13.0+cpu"`` to ``"2.13.0"``."""
    return version.partition("+")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fallback", action="store_true", help="expect that the kernels are missing")
    parser.add_argument("--built-here", action="store_true", help="the PyTorch may be that of the build")
    options = parser.parse_args()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import pooling_ext
        import pooling_ext.functional
        from pooling_ext.backends import cpu_library, cuda_library
    told_cuda = ""
    told = [w for w in caught if issubclass(w.category, pooling_ext.NativeUnavailableWarning)]

    if options.fallback:
        assert cpu_library.module is None, "the compiled kernels loaded although none were expected"
        assert len(told) == 1, f"expected one NativeUnavailableWarning, but got {len(told)}"
        built = None
    else:
        assert cpu_library.module is not None, f"the compiled kernels did not load: {cpu_library.why_not}"
        assert not told, f"unexpected warning: {told[0].message}"
        built = cpu_library.module.build_torch
        assert options.built_here or release(built) != release(torch.__version__), (
            f"built with {built}: run it under another PyTorch"
        )
        # The GPU's library, where there is one, has to load too; nothing here runs on a GPU.
        if find_spec("pooling_ext._cuda") is not None:
            assert cuda_library.why_not() is None, cuda_library.why_not()
            told_cuda = f", CUDA kernels for {', '.join(cuda_library.architectures())}"

    from pooling_ext.ops.conv_bn_act.implementations import from_size

    with from_size(0, fold_ratio=0):
        checked = check_all(native=not options.fallback)
    library = f"library built with {built}{told_cuda}" if built else "without the library"
    print(f"PyTorch {torch.__version__}, {library}: {checked} cases agree with PyTorch")
    return 0


def check_all(native: bool) -> int:
    """Compare every operator with its reference, and return how many calls that were."""
    import pooling_ext
    from pooling_ext.testing.checks import check_values
    from pooling_ext.testing.opspec import cases
    from pooling_ext.testing.specs import SPECS

    checked = 0
    for case in cases(SPECS):
        for dtype in case.spec.dtypes:
            if not native and dtype not in (torch.float32, torch.float64):  # PyTorch pools no other in 3-d
                continue
            for layout in LAYOUTS:
                torch.manual_seed(0)
                tensors = case.tensors(case.spec.wide, dtype, layout)
                try:
                    if not case.spec.autocast:  # kernels of convolutions are for where they are faster
                        took = pooling_ext.explain(case.ours, **tensors)
                        assert took.backend == ("cpu" if native else "aten"), f"not that backend: {took}"
                    check_values(case, tensors, keeps_format=native)
                except Exception:
                    print(f"{case} of {dtype}, {layout}, failed", file=sys.stderr)
                    raise
                checked += 1
    return checked


if __name__ == "__main__":
    sys.exit(main())
