"""What patch and freeze share: tracing a forward, what its operators do to memory, and the report."""
