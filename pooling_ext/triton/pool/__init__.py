"""Pooling over windows and planes, forward and backward."""
