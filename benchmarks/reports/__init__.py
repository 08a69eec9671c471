"""What runs found: results, targets, tables and plots."""
