"""Python values as JSON, and back.

A number, a string, a bool or None stands for itself. Anything else is a list that begins with the name of its
kind: ``["tuple", 1, 2]``, ``["dtype", "float32"]``, ``["tensor", "t3"]``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from ...errors import ArgumentError
from ...graph.activations import Activation

_PLAIN = (type(None), bool, int, float, str)
_SEQUENCES: dict[type, str] = {tuple: "tuple", list: "list", immutable_list: "list", torch.Size: "size"}
_MAPPINGS: dict[type, str] = {dict: "dict", immutable_dict: "dict", OrderedDict: "ordered_dict"}
# Objects of PyTorch that are attributes of it, by their kinds.
_NAMED: dict[type, str] = {
    torch.dtype: "dtype",
    torch.memory_format: "memory_format",
    torch.layout: "layout",
}
_MAKE_SEQUENCE: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "list": list, "size": torch.Size}
_MAKE_MAPPING: dict[str, Callable[[Any], Any]] = {"dict": dict, "ordered_dict": OrderedDict}
# The numbers and the word that each activation takes.
_SCALARS = {"hardtanh": 2, "leaky_relu": 1}
_ALGORITHMS = {"gelu": ("none", "tanh")}
_ACTIVATIONS = frozenset(
    ("relu", "hardtanh", "hardswish", "hardsigmoid", "swish", "leaky_relu", "gelu", "sigmoid", "tanh")
)


class Unsupported(Exception):
    """What a file has no form for; the message says what that is."""


class Encoder:
    """Turns values into JSON's.

    Attributes:
        tensors: those that came along, on the CPU, by their names in the file.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._alive: list[Tensor] = []  # so that an id stays its tensor's

    def value(self, x: Any) -> Any:
        kind = type(x)
        if kind in _PLAIN:
            return x
        if kind in _SEQUENCES:
            return [_SEQUENCES[kind], *map(self.value, x)]
        if kind in _MAPPINGS:
            return [_MAPPINGS[kind], *([self.value(key), self.value(item)] for key, item in x.items())]
        if kind in _NAMED:
            return [_NAMED[kind], str(x).removeprefix("torch.")]
        if kind is complex:
            return ["complex", x.real, x.imag]
        if kind is slice:
            return ["slice", self.value(x.start), self.value(x.stop), self.value(x.step)]
        if x is Ellipsis:
            return ["ellipsis"]
        if kind is torch.device:
            return ["device", str(x)]
        if kind is fx.Node:
            return ["node", x.name]
        if kind is Activation:
            return ["activation", x.name, list(x.scalars), x.algorithm]
        if kind is Tensor or kind is nn.Parameter:
            return self.tensor(x)
        raise Unsupported(f"it has a {kind.__module__}.{kind.__qualname__}")

    def tensor(self, x: Tensor) -> Any:
        """A tensor's name; the same tensor has one name. Its device is that of a name that has one."""
        if x.layout is not torch.strided or x.is_quantized or x.device.type == "meta":
            raise Unsupported(f"it has a tensor of layout {x.layout}, dtype {x.dtype}, on {x.device}")
        name = self._names.get(id(x))
        if name is None:
            name = self._names[id(x)] = f"t{len(self.tensors)}"
            self._alive.append(x)
            self.tensors[name] = _by_itself(x)
        return ["tensor", name] if x.device.type == "cpu" else ["tensor", name, str(x.device)]


def _by_itself(x: Tensor) -> Tensor:
    """A tensor on the CPU whose memory is no larger than it."""
    own = x.detach().resolve_conj().resolve_neg().cpu()
    if own.untyped_storage().nbytes() > own.numel() * own.element_size():
        own = own.clone()
    return own


class Decoder:
    """Turns JSON's values back.

    Args:
        tensors: those of the file, by their names.

    Attributes:
        nodes: those of the graph that is being read, by their names.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.nodes: dict[str, fx.Node] = {}
        self._moved: dict[tuple[str, ...], Tensor] = {}

    def value(self, x: Any) -> Any:
        """The value.

        Raises:
            ArgumentError: it is not what an :class:`Encoder` makes.
        """
        if type(x) in _PLAIN:
            return x
        if type(x) is not list or not x or type(x[0]) is not str:
            raise ArgumentError(f"{_shown(x)} stands for no value")
        kind, items = x[0], x[1:]
        if kind in _MAKE_SEQUENCE:
            return _MAKE_SEQUENCE[kind](map(self.value, items))
        if kind in _MAKE_MAPPING and all(type(pair) is list and len(pair) == 2 for pair in items):
            return _MAKE_MAPPING[kind]((self.value(key), self.value(item)) for key, item in items)
        if kind in _NAMED.values() and len(items) == 1 and type(items[0]) is str:
            found = getattr(torch, items[0], None)
            if _NAMED.get(type(found)) == kind:
                return found
            raise ArgumentError(f"this PyTorch ({torch.__version__}) has no {kind} {items[0]!r}")
        if kind == "complex" and [type(item) for item in items] == [float, float]:
            return complex(*items)
        if kind == "slice" and len(items) == 3:
            return slice(*map(self.value, items))
        if kind == "ellipsis" and not items:
            return Ellipsis
        if kind == "device" and len(items) == 1:
            return device(items[0])
        if kind == "node" and len(items) == 1 and type(items[0]) is str and items[0] in self.nodes:
            return self.nodes[items[0]]
        if kind == "activation" and len(items) == 3:
            return _activation(*items)
        if kind == "tensor":
            return self.tensor(x)
        raise ArgumentError(f"{_shown(x)} stands for no value")

    def tensor(self, x: Any) -> Tensor:
        """The tensor that ``x`` names, the same one each time.

        Raises:
            ArgumentError: it names none, or a device that is not here.
        """
        named = type(x) is list and len(x) in (2, 3) and all(type(part) is str for part in x)
        if not named or x[0] != "tensor" or x[1] not in self.tensors:
            raise ArgumentError(f"{_shown(x)} names no tensor of the file")
        key = tuple(x[1:])
        if key not in self._moved:
            found = self.tensors[x[1]]
            self._moved[key] = found.to(device(x[2])) if len(x) == 3 else found
        return self._moved[key]


def device(name: Any) -> torch.device:
    """The device of that name.

    Raises:
        ArgumentError: there is none here.
    """
    problem = "is no device"
    if type(name) is str:
        try:
            found = torch.device(name)
            torch.empty(0, device=found)
            if found.type != "meta":
                return found
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # by whether PyTorch knows it
            problem = f"is not here ({(str(error).splitlines() or [''])[0]}); freeze the model again"
    raise ArgumentError(f"the model was frozen on {name!r}, which {problem}")


def _activation(name: Any, scalars: Any, algorithm: Any) -> Activation:
    known = type(name) is str and name in _ACTIVATIONS
    if (
        not known
        or type(scalars) is not list
        or len(scalars) != _SCALARS.get(name, 0)
        or any(type(number) is not float for number in scalars)
        or algorithm not in _ALGORITHMS.get(name, ("",))
    ):
        raise ArgumentError(f"there is no activation {name!r} with {scalars!r} and {algorithm!r}")
    return Activation(name, tuple(scalars), algorithm)


def _shown(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 80 else text[:77] + "..."


class Fields:
    """The fields of a JSON object, each of which has to have its type.

    Args:
        where: what it describes, for errors.
    """

    def __init__(self, data: Any, where: str) -> None:
        if type(data) is not dict:
            raise ArgumentError(f"{where}: expected an object, but got {_shown(data)}")
        self.data, self.where = data, where

    def get(self, name: str, *types: type) -> Any:
        """A field's value, which is of one of ``types``; of any where none are named.

        Raises:
            ArgumentError: it is missing, or of another type.
        """
        if name not in self.data:
            raise ArgumentError(f"{self.where}: {name} is missing")
        value = self.data[name]
        if types and type(value) not in types:
            names = " or ".join(kind.__name__ for kind in types)
            raise ArgumentError(f"{self.where}: {name} must be {names}, but got {_shown(value)}")
        return value

    def items(self, name: str, kind: type) -> list[Any]:
        """A field that is a list of ``kind``."""
        values = self.get(name, list)
        for value in values:
            if type(value) is not kind:
                raise ArgumentError(
                    f"{self.where}: {name} must be a list of {kind.__name__}, but has {_shown(value)}"
                )
        return values
