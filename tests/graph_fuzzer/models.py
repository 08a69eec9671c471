"""Whole programs: classes within classes, and a model with a result."""

from __future__ import annotations

import random
from collections.abc import Callable

from . import aliasing, hazards, lists, statements
from .grammar import Impossible, Layer, Memory, Program, Scope, Shape, Value
from .source import Source


def nested(scope: Scope) -> None:
    """Call a block of a class of its own, perhaps twice."""
    if scope.depth >= 2:
        raise Impossible
    value = scope.image()
    layer = _block(scope, value.shape)
    text, memory = scope.call(layer, value)
    scope.layers.append(layer)
    made = scope.assign(text, layer.makes, memory)
    if (
        layer.makes == layer.takes
        and scope.rng.random() < 0.2
        and not (layer.writes and not scope.may_write(made))
    ):
        text, memory = scope.call(layer, made)
        scope.assign(text, layer.makes, memory)


def method(scope: Scope) -> None:
    """A part of the forward as a method of its own."""
    value = scope.image()
    fits = [layer for layer in scope.layers if layer.takes == value.shape and not layer.writes]
    if not fits:
        raise Impossible
    layer = scope.rng.choice(fits)
    name = scope.fresh("part")
    text = scope.rng.choice(("F.relu({})", "{} + 1.0", "{}", "torch.sigmoid({})"))
    scope.methods.append(f"    def {name}(self, x):\n        return {text.format(f'{layer.call}(x)')}\n")
    value.memory.saved = True
    scope.assign(f"self.{name}({value.name})", layer.makes, Memory(saved=True))


#: Statements and how often they are drawn.
_COMMON: dict[Callable[[Scope], None], float] = {
    statements.conv_norm_act: 5,
    statements.conv: 1.5,
    statements.norm: 1.2,
    statements.other_rank: 0.5,
    statements.activation: 2.5,
    statements.residual: 3,
    statements.fused_residual: 1.5,
    statements.stem: 0.8,
    statements.tail: 0.6,
    statements.pool: 1,
    statements.resize: 0.5,
    statements.nothing: 0.7,
    statements.again: 1,
    statements.sequential: 1.2,
    statements.squeeze_excite: 0.4,
    lists.loop: 0.5,
    lists.collect: 1.2,
    aliasing.scalar: 1.8,
    aliasing.alias: 2,
    aliasing.turned: 0.5,
    aliasing.part: 1,
    aliasing.pieces: 1,
    aliasing.write_part: 0.5,
    aliasing.shuffle: 0.3,
    aliasing.buffer: 0.8,
    aliasing.fresh_constant: 0.5,
    aliasing.branch: 0.8,
    aliasing.optional_child: 0.4,
    aliasing.counted: 0.3,
    lists.function: 0.3,
    method: 0.4,
    nested: 1.2,
}
_HAZARDS: dict[Callable[[Scope], None], float] = {
    hazards.type_test: 3,
    hazards.context: 1,
    hazards.value_branch: 1.5,
    hazards.random_numbers: 1,
    hazards.state: 2,
    hazards.hook: 2,
}


def write(scope: Scope, count: int) -> None:
    """Write about ``count`` statements."""
    rng = scope.rng
    done = tries = 0
    while done < count and tries < 10 * count:
        tries += 1
        table = _HAZARDS if rng.random() < 0.015 else _COMMON
        (statement,) = rng.choices(tuple(table), tuple(table.values()))
        members, lines, layers, methods = map(len, (scope.members, scope.lines, scope.layers, scope.methods))
        try:
            statement(scope)
            done += 1
        except Impossible:
            del scope.members[members:], scope.lines[lines:], scope.layers[layers:], scope.methods[methods:]


def _block(parent: Scope, shape: Shape) -> Layer:
    """A class that takes and returns one image, as a member of ``parent``."""
    program, rng = parent.program, parent.rng
    name = program.fresh("Block")
    scope = Scope(program, name, {"x": shape}, parent.depth + 1)
    before = set(program.helpers), list(program.classes)
    write(scope, rng.choice((1, 2, 3, 4)))
    result: Value = list(scope.values.values())[-1]
    alike = [value for value in scope.unread() if value.shape == result.shape and value is not result]
    if alike and rng.random() < 0.7:
        result = scope.assign(" + ".join(value.name for value in (*alike, result)), result.shape)
    if len(program.classes) > 8:
        program.helpers, program.classes[:] = before
        raise Impossible
    program.classes.append(scope.source(result.name))
    member = parent.member("block", f"{name}()")
    return Layer(
        f"self.{member}",
        shape,
        result.shape,
        writes=scope.writes_input,
        aliases=result.memory.input,
        saves_output=True,
    )


def generate(seed: int, attempt: int = 0) -> Source:
    """The program of ``seed``; the next ``attempt`` where PyTorch does not run it."""
    rng = random.Random(f"{seed} {attempt}")
    program = Program(rng, trainable=rng.random() < 0.55)
    size = rng.choice((6, 8, 8, 8, 8, 16))  # patch folds where the output is much larger than the weights
    shapes: dict[str, Shape] = {"x": (rng.choice((3, 4, 4, 6)), size, size)}
    if rng.random() < 0.12:
        shapes["z"] = rng.choice((shapes["x"], (4, size, size)))
    scope = Scope(program, "Model", shapes, 0)
    # First something to fuse, then anything.
    opening = (
        statements.conv_norm_act,
        statements.conv_norm_act,
        statements.sequential,
        lists.loop,
        nested,
    )
    if rng.random() < 0.15:
        write(scope, 1)
    for _ in range(rng.choice((1, 1, 2))):
        try:
            rng.choice(opening)(scope)
        except Impossible:
            statements.conv_norm_act(scope)
    write(scope, rng.choice((2, 3, 4, 5, 6, 8)))
    defaults = _default_argument(scope)
    result = _result(scope)
    program.classes.append(scope.source(result, defaults=defaults))
    dtype = rng.choice(("float64", "float32"))
    return Source(
        "\n\n".join(program.classes),
        tuple(shapes.values()),
        dtype,
        program.trainable,
        frozenset(program.tags),
    )


def _default_argument(scope: Scope) -> str:
    if scope.rng.random() > 0.06:
        return ""
    value = scope.image()
    scope.assign(f"{value.name} * scale", value.shape)
    value.memory.saved = True
    return ", scale=1.5"


def _result(scope: Scope) -> str:
    """What the model returns: an image, features of a head, or a nest of several values."""
    rng = scope.rng
    last = list(scope.values.values())[-1]
    unread = [value for value in scope.unread() if value is not last]
    draw = rng.random()
    if unread and rng.random() < 0.4:
        means = [f"{value.name}.mean((2, 3))" for value in (*unread, last)]
        text = f"torch.cat([{', '.join(means)}], 1)"
        unread = []
    else:
        text = last.name if rng.random() < 0.55 else _head(scope, last)
    # What was written through another name shows in the values that are returned beside.
    others = [value.name for value in scope.values.values() if value is not last]
    more = [value.name for value in unread] if rng.random() < 0.8 else []
    if draw < 0.45 and not more:
        return text
    more = more or rng.sample(others, min(len(others), rng.choice((1, 1, 2))))
    if draw < 0.7 or not more:
        return f"({', '.join([text, *more])},)" if rng.random() < 0.8 else f"[{', '.join([text, *more])}]"
    items = [f"'out': {text}", *(f"'{name}': {name}" for name in more)]
    if draw < 0.93:
        return "{" + ", ".join(items) + "}"
    if draw < 0.96:
        return (
            "OrderedDict("
            + ", ".join(f"{item.partition(':')[0][1:-1]}={item.partition(': ')[2]}" for item in items)
            + ")"
        )
    return f"{{'out': {text}, 'more': ({', '.join(more)},)}}"


def _head(scope: Scope, value: Value) -> str:
    c, h, w = value.shape
    y = value.name
    forms = (
        "{}.mean((2, 3))",
        "{}.mean([2, 3])",
        "F.adaptive_avg_pool2d({}, 1).flatten(1)",
        "self.gap({}).flatten(1)",
    )
    forms += (
        "torch.flatten(F.adaptive_avg_pool2d({}, (1, 1)), 1)",
        "{}.flatten(1)",
        "{}.view({}.size(0), -1)",
        "{}.mean(dim=(-2, -1))",
    )
    form = scope.rng.choice(forms)
    if "gap" in form:
        form = form.replace("gap", scope.member("gap", "nn.AdaptiveAvgPool2d(1)"))
    if form in ("{}.flatten(1)", "{}.view({}.size(0), -1)"):
        c *= h * w
    features = form.replace("{}", y)
    if scope.rng.random() < 0.3:
        return features
    if scope.rng.random() < 0.25:
        head = f"nn.Sequential(nn.Linear({c}, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))"
    else:
        head = f"nn.Linear({c}, 5)"
    linear = scope.member("linear", head)
    text = f"self.{linear}({features})"
    if scope.rng.random() < 0.3:
        text = scope.rng.choice(("F.relu({})", "torch.sigmoid({})", "{}.softmax(1)", "{}.relu()")).format(
            text
        )
    return text
