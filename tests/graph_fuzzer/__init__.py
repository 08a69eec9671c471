"""Random models that compare eager, patched and frozen; ``python -m tests.graph_fuzzer --help``."""
