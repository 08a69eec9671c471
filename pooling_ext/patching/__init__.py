"""patch and unpatch: this library's operators put into a model that is already built, in place."""

from .api import patch, unpatch

__all__ = ["patch", "unpatch"]
