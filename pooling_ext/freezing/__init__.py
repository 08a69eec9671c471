"""freeze: a model made into a module for inference alone."""

from .api import Frozen, freeze
from .region import Region

__all__ = ["Frozen", "Region", "freeze"]
