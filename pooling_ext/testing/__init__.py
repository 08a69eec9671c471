"""What tests and benchmarks share: reference implementations, tolerances and named shapes."""
