"""Benchmarks of pooling_ext against PyTorch: ``python -m benchmarks SUITE``.

A suite is a module of this package named in :data:`benchmarks.registry.SUITES`.
"""
