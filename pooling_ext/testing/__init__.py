"""What tests, benchmarks and plugins share: operators' specs and checks, references, shapes, tolerances."""
