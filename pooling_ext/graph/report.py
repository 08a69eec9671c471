"""What patch and freeze say about a model: the layers they fused, and those they left and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ArgumentError
from .op_tables import is_hooked


@dataclass(frozen=True)
class FusionEntry:
    """What became of one module.

    Attributes:
        path: the module's dotted path, "(root)" for the model itself.
        what: the class of a module, or the steps of a chain in its forward, such as "conv1-bn1-relu".
        why: the operator or layer that took its place, or the reason that it was left alone.
    """

    path: str
    what: str
    why: str


@dataclass
class FusionReport:
    """The report of :func:`patch` and :func:`freeze`: what was replaced and what was skipped, with reasons.

    Print it for a table.

    Attributes:
        replaced: what runs on an operator of this library.
        skipped: what was left as it is.
        warnings: what could not be checked.
        details: of frozen convolutions, by path: the way that each runs, and why not in a faster one; see
            :meth:`explain`.
        batch_norms: how many there are.
        batch_norms_left: those of them, among ``skipped``, that run as they are.
        folded: the paths of the batch norms that ``freeze`` has folded or made one pass.
        uncalled: the paths of those that the model does not call in eval mode, which do not count.
        winograd_bytes: what the transformed weights of a frozen model take.
        beyond_limit: the frozen convolutions for whose transformed weights there was no memory left
            (POOLING_EXT_WINOGRAD_MIB).

    Example:
        >>> report = pooling_ext.patch(nn.Sequential(nn.MaxPool2d(2), nn.FractionalMaxPool2d(2, 8)))
        >>> [(entry.path, entry.what) for entry in report.replaced]
        [('0', 'MaxPool2d')]
        >>> report.skipped[0].why
        'has no counterpart here'
    """

    replaced: list[FusionEntry] = field(default_factory=list)
    skipped: list[FusionEntry] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    details: dict[str, list[str]] = field(default_factory=dict)
    batch_norms: int = 0
    batch_norms_left: list[FusionEntry] = field(default_factory=list)
    folded: set[str] = field(default_factory=set)
    uncalled: list[str] = field(default_factory=list)
    winograd_bytes: int = 0
    beyond_limit: list[str] = field(default_factory=list)

    def replace(self, path: str, what: str, why: str) -> None:
        """Note a module that runs on an operator or layer of this library, once for each."""
        entry = FusionEntry(path or "(root)", what, why)
        if entry not in self.replaced:
            self.replaced.append(entry)

    def skip(self, path: str, what: str, why: str) -> None:
        """Note a module that is left alone, once for each reason."""
        entry = FusionEntry(path or "(root)", what, why)
        if entry not in self.skipped:
            self.skipped.append(entry)

    def leave_norm(self, path: str, what: str, why: str) -> None:
        """Note a batch norm that is not fused."""
        self.skip(path, what, why)
        self.batch_norms_left.append(FusionEntry(path or "(root)", what, why))

    def count_norms(self, model: nn.Module) -> None:
        """Count the batch norms of a model that was frozen, and tell why some are left."""
        skipped = {entry.path: entry.why for entry in self.skipped}
        modules = {path or "(root)": module for path, module in model.named_modules()}
        norms = [path for path, module in modules.items() if isinstance(module, _BatchNorm)]
        self.batch_norms = len(norms)
        for path in norms:
            if path in self.folded:
                continue
            parents = [".".join(path.split(".")[:depth]) for depth in range(path.count(".") + 1, 0, -1)]
            within = next((p for p in parents if p in skipped or is_hooked(modules[p])), None)
            if within is None:
                self.batch_norms -= 1
                self.uncalled.append(path)
                continue
            why = skipped.get(within, "has hooks")
            why = why if within == path else f"is in {within}, which {why}"
            self.leave_norm(path, type(modules[path]).__name__, why)

    @property
    def batch_norms_fused(self) -> int:
        """How many batch norms are fused, folded, or done in one pass."""
        return self.batch_norms - len(self.batch_norms_left)

    def explain(self, path: str) -> str:
        """What became of a module: its entries, and for a frozen convolution why it runs as it does.

        Args:
            path: the module's dotted path, as the table has it.

        Raises:
            ArgumentError: there is no entry for ``path``.
        """
        entries = [entry for entry in (*self.replaced, *self.skipped) if entry.path == path]
        if not entries:
            raise ArgumentError(f"path must be one of the report's, but got {path!r}")
        lines = dict.fromkeys(f"{entry.path} ({entry.what}): {entry.why}" for entry in entries)
        return "\n".join([*lines, *(f"  {line}" for line in self.details.get(path, ()))])

    def __setstate__(self, state: dict) -> None:
        # Reports of earlier versions have fewer fields.
        new = FusionReport()
        self.__dict__.update({**new.__dict__, **state})

    def __str__(self) -> str:
        rows = [("", "module", "what", "")]
        rows += [("replaced", entry.path, entry.what, entry.why) for entry in self.replaced]
        rows += [("skipped", entry.path, entry.what, entry.why) for entry in self.skipped]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        lines.append(f"{len(self.replaced)} replaced, {len(self.skipped)} skipped")
        if self.batch_norms:
            more = f"; {len(self.uncalled)} more are not called in eval mode" if self.uncalled else ""
            lines.append(f"fused {self.batch_norms_fused} of {self.batch_norms} batch norms{more}")
        signs = ("batch_norm", "BatchNorm")  # in an operator's name, and in what freeze folded
        entries = (*self.replaced, *self.skipped)
        if not any("-" in entry.what or any(sign in entry.why for sign in signs) for entry in entries):
            lines.append("no convolution, BatchNorm and ReLU to fuse")
        if self.winograd_bytes:
            lines.append(f"Winograd's transformed weights take {self.winograd_bytes / (1 << 20):.1f} MiB")
        if self.beyond_limit:
            paths = ", ".join(dict.fromkeys(self.beyond_limit))
            lines.append(f"not Winograd for the limit of POOLING_EXT_WINOGRAD_MIB: {paths}")
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(line.rstrip() for line in lines)
