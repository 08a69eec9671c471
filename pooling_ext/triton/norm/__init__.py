"""Batch normalization with what follows it, and channels' statistics."""
