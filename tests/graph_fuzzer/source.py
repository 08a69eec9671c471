"""A model as Python source: tracebacks and inspect find its lines, and printed it runs by itself."""

from __future__ import annotations

import itertools
import linecache
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HEADER = """\
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

"""
_numbers = itertools.count()


class Rejected(Exception):
    """PyTorch itself does not run the program, or its values are no good for a comparison."""


@dataclass(frozen=True)
class Source:
    """A program, and what its model takes.

    Attributes:
        classes: definitions; the last one is ``Model``.
        shapes: of one image, for each argument.
        dtype: the name of the dtype of parameters and inputs.
        trainable: whether autograd runs through it in training mode.
        tags: see :class:`Program`.
    """

    classes: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    trainable: bool
    tags: frozenset[str] = frozenset()

    def inputs(self, seed: int, batch: int, channels_last: bool = False) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, self.dtype)
        format_ = torch.channels_last if channels_last else torch.contiguous_format
        return tuple(
            torch.randn(batch, *shape, generator=generator, dtype=dtype).contiguous(memory_format=format_)
            for shape in self.shapes
        )

    @contextmanager
    def model(self, seed: int) -> Iterator[nn.Module]:
        """The model with random parameters and statistics; its module can be imported meanwhile.

        Raises:
            Rejected: it cannot be made.
        """
        name = f"graph_fuzzer_model_{next(_numbers)}"
        filename = f"<{name}>"
        text = HEADER + self.classes
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
        module = types.ModuleType(name)
        module.__file__ = filename
        sys.modules[name] = module
        try:
            try:
                exec(compile(text, filename, "exec"), module.__dict__)
                torch.manual_seed(seed)
                model = module.Model().to(getattr(torch, self.dtype))
            except Exception as error:
                raise Rejected(f"{type(error).__name__}: {error}") from error
            randomize(model, seed)
            yield model
        finally:
            del sys.modules[name], linecache.cache[filename]

    def script(self, seed: int, stage: str) -> str:
        """A program that shows the difference by itself."""
        run = _PATCHED if "patch" in stage else _FROZEN
        shapes = "".join(f"torch.randn(2, {', '.join(map(str, shape))}), " for shape in self.shapes)
        main = _MAIN.format(seed=seed, dtype=self.dtype, shapes=shapes, run=run)
        return f"{HEADER}import pooling_ext\n\n\n{self.classes}\n\n{main}"


_MAIN = """\
if __name__ == "__main__":
    torch.manual_seed({seed})
    model = Model().to(torch.{dtype}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    inputs = [x.to(torch.{dtype}) for x in ({shapes})]
{run}"""
_FROZEN = """\
    fast = pooling_ext.freeze(model, tuple(x.clone() for x in inputs))
    print(fast.report)
    with torch.no_grad():
        for _ in range(2):
            print("eager ", model(*[x.clone() for x in inputs]))
            print("frozen", fast(*[x.clone() for x in inputs]))
"""
_PATCHED = """\
    import copy

    patched = copy.deepcopy(model)
    print(pooling_ext.patch(patched))
    for mode in (True, False):
        print("eager  ", model.train(mode)(*[x.clone() for x in inputs]))
        print("patched", patched.train(mode)(*[x.clone() for x in inputs]))
"""


def randomize(model: nn.Module, seed: int) -> None:
    """Affine parameters and statistics that are neither zero nor one, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(generator=generator)
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
