"""accelerate: whatever of this library makes a model faster, put in and measured by one call."""

from .api import accelerate
from .report import AccelerateReport

__all__ = ["AccelerateReport", "accelerate"]
