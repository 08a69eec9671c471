"""A forward that is being written: its values, their shapes, and which of them may be overwritten.

Each statement picks values by shape and knows the shape of what it makes, so that nearly every program runs.
What autograd would refuse (memory that it saved is written) is left out of programs that are to be trained.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

#: The shape of one image (channels, height, width), or of its features (count,).
Shape = tuple[int, ...]


@dataclass
class Memory:
    """What values that may be aliases of each other share.

    Attributes:
        saved: whether autograd keeps it for the backward pass.
        pieces: whether chunk or split gave views of it, through which autograd lets nobody write.
        input: whether the caller owns it.
        constant: whether it is a buffer or a parameter.
    """

    saved: bool = False
    pieces: bool = False
    input: bool = False
    constant: bool = False


@dataclass
class Value:
    """What a name means; ``read`` once a statement has picked it."""

    name: str
    shape: Shape
    memory: Memory
    read: bool = False


@dataclass
class Layer:
    """A member of a class that is called with one tensor.

    Attributes:
        call: the expression to call, such as ``self.conv1``.
        takes, makes: the shapes of its argument and its result.
        writes: whether it overwrites its argument.
        aliases: whether its result may share memory with its argument.
        saves_input, saves_output: what autograd keeps.
    """

    call: str
    takes: Shape
    makes: Shape
    writes: bool = False
    aliases: bool = False
    saves_input: bool = True
    saves_output: bool = False


@dataclass
class Program:
    """The classes that were written so far, and what the program as a whole is allowed.

    Attributes:
        trainable: autograd runs through it, so it writes nothing that autograd needs.
        tags: what in it explains a refusal or a wider tolerance, such as "random".
    """

    rng: random.Random
    trainable: bool
    classes: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    helpers: set[str] = field(default_factory=set)
    count: int = 0

    def fresh(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def helper(self, name: str, source: str) -> str:
        """The name of a class or function that many share, written once."""
        if name not in self.helpers:
            self.helpers.add(name)
            self.classes.append(source)
        return name


class Scope:
    """One class whose ``__init__`` and forward are being written."""

    def __init__(self, program: Program, name: str, inputs: dict[str, Shape], depth: int) -> None:
        self.program, self.name, self.depth = program, name, depth
        self.rng = program.rng
        self.members: list[str] = []
        self.lines: list[str] = []
        self.methods: list[str] = []
        self.indent = 0
        self.layers: list[Layer] = []
        self.flags: list[str] = []
        self.inputs = dict(inputs)
        self.values = {key: Value(key, shape, Memory(input=True)) for key, shape in inputs.items()}
        self.may_write_input = self.rng.random() < 0.25
        self.writes_input = False
        self.returns_input = False
        self.count = 0

    # --- writing -------------------------------------------------------------------------------

    def fresh(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def emit(self, line: str) -> None:
        self.lines.append("    " * self.indent + line)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        self.emit(head)
        self.indent += 1
        try:
            yield
        finally:
            self.indent -= 1

    def member(self, stem: str, constructor: str) -> str:
        """Add a member in ``__init__``; returns its name."""
        name = self.fresh(stem)
        self.members.append(f"self.{name} = {constructor}")
        return name

    def flag(self) -> str:
        if not self.flags or self.rng.random() < 0.5:
            self.flags.append(self.member("flag", str(self.rng.random() < 0.5)))
        return f"self.{self.rng.choice(self.flags)}"

    # --- values --------------------------------------------------------------------------------

    def may_write(self, value: Value) -> bool:
        memory = value.memory
        if memory.constant or (memory.input and not self.may_write_input):
            return False
        return not (self.program.trainable and (memory.saved or memory.pieces))

    def writes(self, value: Value) -> None:
        """Note that ``value`` is overwritten."""
        self.writes_input |= value.memory.input

    def image(self, shape: Shape | None = None, channels: int | None = None, writable: bool = False) -> Value:
        """An image among the values, rather a late one or one that nobody has read.

        Raises:
            Impossible: there is none.
        """
        found = [
            value
            for value in self.values.values()
            if len(value.shape) == 3
            and shape in (None, value.shape)
            and channels in (None, value.shape[0])
            and not (writable and not self.may_write(value))
        ]
        if not found:
            raise Impossible
        unread = [value for value in found if not value.read and not value.memory.input]
        if unread and self.rng.random() < 0.4:
            found = unread
        back = min(int(self.rng.expovariate(0.7)), len(found) - 1)
        found[-1 - back].read = True
        return found[-1 - back]

    def unread(self) -> list[Value]:
        return [value for value in self.values.values() if not value.read and not value.memory.input]

    def assign(self, expression: str, shape: Shape, memory: Memory | None = None, name: str = "") -> Value:
        """``name = expression``, with a name of its own or one that is there, which then means this."""
        if not name:
            known = [key for key, value in self.values.items() if value.read]
            rebind = known and len(self.values) > 1 and self.rng.random() < 0.4
            name = self.rng.choice(known[-3:]) if rebind else self.fresh("y")
        self.emit(f"{name} = {expression}")
        return self.bind(name, shape, memory)

    def bind(self, name: str, shape: Shape, memory: Memory | None = None) -> Value:
        self.values.pop(name, None)  # the latest stands last
        self.values[name] = Value(name, shape, Memory() if memory is None else memory)
        return self.values[name]

    def call(self, layer: Layer, value: Value) -> tuple[str, Memory]:
        """The expression that calls ``layer`` with ``value``, and the memory of the result."""
        if layer.writes:
            if not self.may_write(value):
                raise Impossible
            self.writes(value)
        memory = value.memory if layer.aliases else Memory()
        value.memory.saved |= layer.saves_input
        memory.saved |= layer.saves_output
        return f"{layer.call}({value.name})", memory

    # --- the class -----------------------------------------------------------------------------

    def source(self, result: str, base: str = "nn.Module", defaults: str = "") -> str:
        body = "".join(f"        {line}\n" for line in self.members)
        lines = "".join(f"        {line}\n" for line in self.lines)
        arguments = ", ".join(self.inputs)
        return (
            f"class {self.name}({base}):\n"
            f"    def __init__(self):\n        super().__init__()\n{body}\n"
            f"    def forward(self, {arguments}{defaults}):\n{lines}        return {result}\n"
            + "".join(f"\n{method}" for method in self.methods)
        )


class Impossible(Exception):
    """A statement finds no value that it could take."""
