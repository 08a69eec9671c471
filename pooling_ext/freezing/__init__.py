"""freeze: a model made into a module for inference alone."""

from .api import freeze
from .frozen import Frozen
from .region import Region
from .saving import load

__all__ = ["Frozen", "Region", "freeze", "load"]
