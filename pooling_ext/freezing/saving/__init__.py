"""Files of frozen models: plain data and plain tensors, which load without running anything they name."""

from .files import load, save

__all__ = ["load", "save"]
