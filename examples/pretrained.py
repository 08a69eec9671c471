"""ImageNet's weights for torchvision's models, where they can be had."""

from __future__ import annotations

import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

#: Seconds to wait for the server that has them.
PATIENCE = 5


def load_pretrained(model: nn.Module, name: str) -> str | None:
    """Load the weights of torchvision's ``name`` into ``model``; if they cannot be had, say why not."""
    weights = _weights(name)
    cached = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[-1])
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(PATIENCE)
        if not cached.is_file() and not _answers(weights.url):
            return f"no answer from their server in {PATIENCE} s"
        model.load_state_dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        return str(error)
    finally:
        socket.setdefaulttimeout(before)
    return None


def categories(name: str) -> list[str]:
    """What the classes of ``name``'s weights are called; this takes no download."""
    return _weights(name).meta["categories"]


def _weights(name: str) -> Any:
    return getattr(torchvision.models.get_model_weights(name), "DEFAULT")  # noqa: B009 (untyped)


def _answers(url: str) -> bool:
    # In a thread, because the timeout of a socket does not cover the look-up of its name.
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()
            answered.set()
        except (OSError, ValueError):
            pass

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(PATIENCE)
    return answered.is_set()
