"""What freeze returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..graph.report import FusionReport
from .parts import Part
from .region import Region
from .saving import files

#: Of pickled frozen models. Another version of this package may write another one.
FORMAT = 1


class Frozen(nn.Module):
    """The result of :func:`freeze`: call it like the model it was made from.

    It may be called from several threads at once and copied. :meth:`save` writes it to a file that is safe to
    load; it can be pickled too (``torch.save``), and a pickle runs code: load only those you trust. It has no
    parameters, stays in eval mode, and computes on the device and in the dtype that it was made for.

    Attributes:
        report: a :class:`FusionReport` of what was folded and prepacked, and what was left.
        dtype: the dtype that it computes in.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> fast = pooling_ext.freeze(model, torch.randn(2, 3, 32, 32), dtype=torch.float64)
        >>> isinstance(fast, pooling_ext.Frozen), fast.dtype
        (True, torch.float64)
        >>> fast(torch.randn(2, 3, 32, 32)).dtype  # the input's
        torch.float32
    """

    def __init__(self, body: nn.Module, name: str, dtype: torch.dtype | None, report: FusionReport):
        super().__init__()
        self.body, self.name, self.dtype, self.report = body, name, dtype, report
        self.format = FORMAT
        self.eval()
        self._take_parameters()

    def _take_parameters(self) -> None:
        """Give this one's forward the model's parameters, by which torch.export tells its arguments."""
        body = self.body

        def forward(*args: Any, **kwargs: Any) -> Any:
            return body(*args, **kwargs)

        region = body.region if type(body) is Part else body
        own = region.signature.parameters if isinstance(region, Region) else inspect.signature(body.forward)
        forward.__signature__ = own  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward

    def __prepare_scriptable__(self) -> Any:
        raise ArgumentError(
            "torch.jit.script cannot compile a frozen model; torch.jit.trace(model, example) makes a script"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        found = state.get("format", 0)
        if found != FORMAT:
            raise ArgumentError(
                f"this frozen model was saved by another version of pooling_ext (format {found}, and this "
                f"one reads {FORMAT}); freeze the model again"
            )
        super().__setstate__(state)
        self._take_parameters()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)

    def save(self, path: files.File) -> None:
        """Write this model to a file from which :func:`pooling_ext.load` makes it again, wherever that is.

        The file has the graph and the layers as data and the weights as plain tensors, and no code. Modules
        of torch.nn that the model kept are in it by their class and arguments; a model that runs code of its
        own (whose forward could not be traced, or that has hooks) cannot be saved in this way.

        Args:
            path: the file's path, or a binary file object to write to. A file of that name is replaced when
                all is written.

        Raises:
            TypeError: ``path`` is neither a path nor a file.
            OSError: the file cannot be written.
            ArgumentError: the model runs what has no form as data; the message names each such module.

        Example:
            >>> import io, torch, pooling_ext
            >>> frozen = pooling_ext.freeze(torch.nn.Conv2d(3, 8, 3), torch.randn(1, 3, 8, 8))
            >>> file = io.BytesIO()
            >>> frozen.save(file)
            >>> pooling_ext.load(io.BytesIO(file.getvalue()))
            Frozen(Conv2d, float32):
              (root): PackedConv(3 to 8, float32, prepacked, kernel=(3, 3), stride=(1, 1))
              1 layers frozen, 0 kept
        """
        files.save(self, path)

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)  # there is nothing left to train

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        for region in self.modules():
            if isinstance(region, Region):
                probe = torch.empty(0, dtype=region.dtype, device=region.device)
                moved = fn(probe)
                if moved.dtype != probe.dtype or moved.device != probe.device:
                    raise ArgumentError(
                        f"a frozen module stays on {region.device} in {region.dtype}, but got "
                        f"{moved.device}, {moved.dtype}; freeze the model again there"
                    )
        return self

    def __repr__(self) -> str:
        lines = [f"Frozen({self.name}, {str(self.dtype).removeprefix('torch.')}):"]
        for path, region in self.body.named_modules():
            if isinstance(region, Region):
                lines += [f"  {path}:"] if path else []
                lines += [f"  {line}" for line in repr(region).splitlines()]
        lines.append(f"  {len(self.report.replaced)} layers frozen, {len(self.report.skipped)} kept")
        return "\n".join(lines)
