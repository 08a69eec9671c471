"""Whether a program is being exported."""

from __future__ import annotations

import torch

_TOLD = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


if _TOLD:
    from torch.compiler import is_exporting
else:

    def is_exporting() -> bool:
        """False: 2.11 says that it exports whenever it compiles, which it should not."""
        return False


__all__ = ["is_exporting"]
