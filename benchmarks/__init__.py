"""Benchmarks of pooling_ext against PyTorch: ``python -m benchmarks SUITE``.

A suite is a module of this package named in :data:`benchmarks.registry.SUITES`.
"""

import os

# The profiler, which counts allocations here, reports its own starts and stops unless told not to.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
