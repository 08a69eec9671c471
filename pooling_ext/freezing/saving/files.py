"""Writes frozen models to files, and reads them.

A file is what ``torch.save`` makes of a dictionary: ``format`` and ``version``; ``model``, JSON that
describes the graph, the layers and the report; ``tensors``, by the names that the JSON has for them; and
``checksum``, a SHA-256 of all that. ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...ops import winograd_weights
from .. import conv_allotment
from ..region import Region
from . import regions, reports
from .values import Decoder, Encoder, Fields

if TYPE_CHECKING:
    from ..frozen import Frozen

FORMAT = "pooling_ext/frozen"
#: Of the files that are written. Those of smaller numbers can be read, those of larger ones cannot.
VERSION = 1
_KINDS = {"format": str, "version": int, "model": str, "tensors": dict, "checksum": str}
_ZIP = b"PK\x03\x04"

File = str | os.PathLike[str] | IO[bytes]


def save(frozen: Frozen, file: File) -> None:
    """Write ``frozen`` to a file; see :meth:`Frozen.save`."""
    if not isinstance(frozen.body, Region):
        left = [f"{entry.path} ({entry.what}): {entry.why}" for entry in frozen.report.skipped]
        raise _refused(frozen, left or [f"(root) ({type(frozen.body).__name__})"])
    encoder = Encoder()
    region, problems = regions.encode(frozen.body, encoder)
    if problems:
        raise _refused(frozen, problems)
    model = {
        "written_by": _versions(),
        "name": frozen.name,
        "dtype": encoder.value(frozen.dtype),
        "report": reports.encode(frozen.report),
        "region": region,
    }
    text = json.dumps(model, separators=(",", ":"), default=operator.index)  # numbers may be numpy's
    data = {"format": FORMAT, "version": VERSION, "model": text, "tensors": encoder.tensors}
    data["checksum"] = _checksum(VERSION, text, encoder.tensors)
    with _writing(file) as stream:
        torch.save(data, stream)


def load(path: File) -> Frozen:
    """Read a frozen model that :meth:`Frozen.save` wrote; no code in the file is run.

    A file is read with ``torch.load(weights_only=True)``. It describes the model in plain data. The
    functions, methods and modules that it may name are on a list, and anything else that it names is refused,
    so a file from anybody can be loaded. (What it computes is up to who made it, as with all weights.)

    On the machine where the model was saved it gives the same outputs bit for bit. Elsewhere, on another
    processor, instruction set or version of PyTorch, weights are packed for what is there. A convolution that
    cannot run in the way it was saved with runs in the fastest one that can, and ``report.warnings`` says so.

    Args:
        path: the file's path, or a binary file object.

    Returns:
        The :class:`Frozen`, on the device and in the dtype that it was made for.

    Raises:
        TypeError: ``path`` is neither a path nor a file.
        OSError: the file cannot be opened.
        ArgumentError: it is not a file of a frozen model, is cut off or altered, comes from a newer version
            of this package, or names a function or a device that is not here; the message says which.

    Example:
        >>> import tempfile, torch, pooling_ext
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> x = torch.randn(2, 3, 16, 16)
        >>> frozen = pooling_ext.freeze(model.eval(), x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     frozen.save(f"{folder}/model.pt")
        ...     again = pooling_ext.load(f"{folder}/model.pt")
        >>> torch.equal(again(x), frozen(x))
        True
    """
    name, limit = _name(path), winograd_weights.limit()
    with _reading(path) as stream:
        data = _read(stream, name)
    try:
        with torch.no_grad():
            return _frozen(data["model"], Decoder(data["tensors"]), limit)
    except ArgumentError as error:
        raise ArgumentError(f"path {name} cannot be loaded: {error}") from error
    except Exception as error:  # what no check foresaw in a file that somebody made
        raise ArgumentError(f"path {name} cannot be loaded: {type(error).__name__}: {error}") from error


def _frozen(text: str, decoder: Decoder, winograd_bytes: int) -> Frozen:
    """The model that JSON describes.

    Raises:
        ArgumentError: it describes none.
    """
    from ..frozen import Frozen

    model = Fields(json.loads(text), "model")
    report = reports.decode(Fields(model.get("report"), "report"))
    dtype = decoder.value(model.get("dtype"))
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"model: dtype must be one or None, but got {dtype!r}")
    region, changed = regions.decode(Fields(model.get("region"), "region"), decoder, winograd_bytes)
    for path, why in changed.items():
        report.warnings.append(f"{path} runs in another way than where it was saved: {why}")
        report.details.setdefault(path, []).append(f"since it was loaded {why}")
    report.winograd_bytes = conv_allotment.spent(region)
    return Frozen(region, model.get("name", str), dtype, report)


def _read(stream: IO[bytes], name: str) -> dict[str, Any]:
    """The file's dictionary, whose contents are those that were written."""
    start = stream.read(len(_ZIP))
    if start != _ZIP:
        raise ArgumentError(f"path {name} is not a file that Frozen.save wrote: it does not begin as one")
    stream.seek(-len(_ZIP), os.SEEK_CUR)
    try:
        data = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # by what is wrong, any of a dozen
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ArgumentError(
            f"path {name} is cut off or damaged, or not a file that Frozen.save wrote: {first}"
        ) from error
    if type(data) is not dict or data.get("format") != FORMAT:
        raise ArgumentError(f"path {name} is not a file that Frozen.save wrote: it is not marked as one")
    version = data.get("version")
    if type(version) is int and version > VERSION:
        raise ArgumentError(
            f"path {name} was written by a newer version of pooling_ext (format {version}, and this one "
            f"reads formats up to {VERSION}); update pooling_ext"
        )
    tensors = data.get("tensors")
    kinds = {key: type(value) for key, value in data.items()}
    if kinds != _KINDS or type(tensors) is not dict or not all(map(_is_plain, tensors, tensors.values())):
        raise ArgumentError(f"path {name} is damaged: it does not have the entries that it should have")
    try:
        checksum = _checksum(data["version"], data["model"], tensors)
    except RuntimeError as error:  # tensors that only seem to be larger than memory
        raise ArgumentError(f"path {name} is damaged: {error}") from error
    if checksum != data["checksum"]:
        raise ArgumentError(
            f"path {name} is damaged or was altered: its contents do not have the checksum that it has"
        )
    return data


def _is_plain(name: Any, x: Any) -> bool:
    of_file = type(name) is str and type(x) is Tensor and x.layout is torch.strided and not x.is_quantized
    return of_file and x.device.type == "cpu" and not (x.requires_grad or x.is_conj() or x.is_neg())


def _checksum(version: int, model: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that a file has, tensors as they lie in memory in the order of their dimensions."""
    digest = hashlib.sha256(f"{FORMAT} {version} {len(model)}\n{model}".encode(errors="surrogatepass"))
    for name, x in sorted(tensors.items()):
        facts = name, str(x.dtype), list(x.shape), list(x.stride())
        digest.update(f"\n{facts}\n".encode(errors="surrogatepass"))
        numbers = x.contiguous().reshape(-1).view(torch.uint8).numpy()
        width = x.element_size() // (2 if x.is_complex() else 1)
        if sys.byteorder == "big" and width > 1:  # torch.load gives each machine its own order
            numbers = numbers.reshape(-1, width)[:, ::-1].copy()
        digest.update(numbers.data)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    from ... import __version__

    return {"pooling_ext": __version__, "torch": str(torch.__version__)}


def _refused(frozen: Frozen, problems: list[str]) -> ArgumentError:
    listed = "\n".join(f"  {problem}" for problem in dict.fromkeys(problems))
    return ArgumentError(
        f"the frozen model ({frozen.name}) cannot be saved as data, for what it runs that has no such form:\n"
        f"{listed}\ntorch.save(frozen, path) writes a pickle instead, to be loaded from trusted sources alone"
    )


# --- paths -------------------------------------------------------------------------------------------------


def _name(file: Any) -> str:
    return repr(os.fspath(file)) if isinstance(file, (str, os.PathLike)) else f"({type(file).__name__})"


def _check(file: Any, method: str) -> None:
    if not isinstance(file, (str, os.PathLike)) and not callable(getattr(file, method, None)):
        raise TypeError(f"path must be a path or a binary file object, but got {type(file).__name__}")


@contextmanager
def _reading(file: File) -> Iterator[IO[bytes]]:
    _check(file, "read")
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as stream:
            yield stream
    else:
        yield file


@contextmanager
def _writing(file: File) -> Iterator[IO[bytes]]:
    """A file to write to; a path has all of it, or what was there before."""
    _check(file, "write")
    if not isinstance(file, (str, os.PathLike)):
        yield file
        return
    target = Path(file)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(beside, "xb") as stream:
            yield stream
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
