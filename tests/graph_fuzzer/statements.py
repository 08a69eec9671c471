"""Statements that call layers: convolutions, batch norms, activations, additions, pools, nested modules."""

from __future__ import annotations

from dataclasses import replace

from . import layers
from .grammar import Impossible, Layer, Memory, Scope, Value

_FUNCTIONS = (
    "F.relu({})",
    "F.relu({})",
    "torch.relu({})",
    "{}.relu()",
    "F.relu6({})",
    "F.silu({})",
    "F.hardswish({})",
    "F.leaky_relu({}, 0.2)",
    "F.gelu({})",
    "torch.sigmoid({})",
    "{}.sigmoid()",
    "torch.tanh({})",
    "{}.tanh()",
    "F.hardtanh({}, -0.5, 0.75)",
    "F.elu({})",
    "{}.clamp(min=-0.5)",
    "torch.clamp({}, -0.5, 1.0)",
    "F.softplus({})",
    "torch.nn.functional.relu({})",
    "F.relu(input={})",
)
_IN_PLACE = (
    "F.relu({}, inplace=True)",
    "F.relu({}, True)",
    "F.relu_({})",
    "torch.relu_({})",
    "{}.relu_()",
    "F.leaky_relu_({}, 0.1)",
    "F.leaky_relu({}, 0.1, inplace=True)",
    "F.hardtanh_({}, -0.5, 0.5)",
    "F.silu({}, inplace=True)",
    "F.hardswish({}, inplace=True)",
    "F.relu6({}, inplace=True)",
    "F.elu_({})",
    "{}.clamp_(min=-0.5)",
    "{}.clamp_min_(0.0)",
    "{}.sigmoid_()",
    "torch.sigmoid_({})",
    "{}.tanh_()",
)


def conv(scope: Scope) -> None:
    value = scope.image()
    scope.assign(*_conv(scope, value.name, value))


def _conv(scope: Scope, text: str, value: Value, channels: int | None = None, keep: bool = False) -> tuple:
    """A call of a convolution, and the shape it makes."""
    constructor, made = layers.convolution(scope.program, value.shape, channels, keep)
    name = scope.member("conv", constructor)
    value.memory.saved = True
    scope.layers.append(Layer(f"self.{name}", value.shape, made))
    return f"self.{name}({text})", made


def conv_norm_act(scope: Scope) -> None:
    """The chain, written in one expression or in several statements."""
    value = scope.image()
    text, shape = _conv(scope, value.name, value)
    nested = scope.rng.random() < 0.4
    name = value.name if scope.rng.random() < 0.5 else scope.fresh("y")
    memory = Memory()

    def step(expression: str) -> str:
        if scope.rng.random() < 0.12:
            expression = f"self.{scope.member('nothing', layers.nothing(scope.rng))}({expression})"
        if nested:
            return expression
        scope.assign(expression, shape, memory, name)
        disturb(scope, value)
        return name

    text = step(text)
    if scope.rng.random() < 0.9:
        norm = scope.member("norm", layers.norm(scope.program, shape[0]))
        scope.layers.append(Layer(f"self.{norm}", shape, shape))
        text = step(f"self.{norm}({text})")
    if scope.rng.random() < 0.75:
        if scope.rng.random() < 0.5:
            act = scope.member("act", layers.activation(scope.rng, scope.rng.random() < 0.4))
            text = step(f"self.{act}({text})")
        else:
            functions = _IN_PLACE[:6] if scope.rng.random() < 0.4 else _FUNCTIONS
            text = step(scope.rng.choice(functions).format(text))
        memory.saved = True
    if nested:
        scope.assign(text, shape, memory)


def disturb(scope: Scope, *values: Value) -> None:
    """Perhaps write into what a chain has read already, so that the chain may not read it later."""
    if scope.rng.random() > 0.2:
        return
    known = [v for v in scope.values.values() if any(v.memory is value.memory for value in values)]
    known = [v for v in known if scope.may_write(v)]
    if known:
        target = scope.rng.choice(known)
        scope.writes(target)
        form = scope.rng.choice(("{} *= 2.0", "{}.mul_(0.5)", "{} += 1.0", "{}[:, :1].zero_()", "{}.neg_()"))
        scope.emit(form.format(target.name))


def norm(scope: Scope) -> None:
    value = scope.image()
    name = scope.member("norm", layers.norm(scope.program, value.shape[0]))
    scope.layers.append(Layer(f"self.{name}", value.shape, value.shape))
    value.memory.saved = True
    scope.assign(f"self.{name}({value.name})", value.shape)


def other_rank(scope: Scope) -> None:
    """A batch norm of one or three dimensions, perhaps with an activation."""
    value = scope.image()
    c, h, w = value.shape
    rank = scope.rng.choice((1, 3))
    name = scope.member("norm", f"nn.BatchNorm{rank}d({c})")
    there, back = (
        (".flatten(2)", f".view(-1, {c}, {h}, {w})") if rank == 1 else (".unsqueeze(2)", ".squeeze(2)")
    )
    text = f"self.{name}({value.name}{there})"
    if scope.rng.random() < 0.7:
        text = scope.rng.choice(("F.relu({})", "{}.relu_()", "F.silu({})", "{}.sigmoid()")).format(text)
    value.memory.saved = True
    scope.assign(text + back, value.shape, Memory(saved=True))


def activation(scope: Scope) -> None:
    if scope.rng.random() < 0.5:
        value = scope.image()
        value.memory.saved = True
        memory = Memory(saved=True)
        if scope.rng.random() < 0.5:
            name = scope.member("act", layers.activation(scope.rng, False))
            scope.layers.append(Layer(f"self.{name}", value.shape, value.shape, saves_output=True))
            scope.assign(f"self.{name}({value.name})", value.shape, memory)
        else:
            scope.assign(scope.rng.choice(_FUNCTIONS).format(value.name), value.shape, memory)
        return
    value = scope.image(writable=True)
    scope.writes(value)
    if scope.rng.random() < 0.4:
        name = scope.member("act", layers.activation(scope.rng, True))
        layer = Layer(f"self.{name}", value.shape, value.shape, writes=True, aliases=True, saves_output=True)
        scope.layers.append(layer)
        text = f"self.{name}({value.name})"
    else:
        text = scope.rng.choice(_IN_PLACE).format(value.name)
    if scope.rng.random() < 0.6:
        scope.assign(text, value.shape, value.memory)
    else:
        scope.emit(text)
    value.memory.saved = True


def residual(scope: Scope) -> None:
    """An addition of two images, also after a batch norm and before an activation."""
    a = scope.image()
    others = [v for v in scope.values.values() if v.shape == a.shape and v is not a]
    if not others:
        raise Impossible
    b = scope.rng.choice(others)
    b.read = True
    if scope.rng.random() < 0.35 and scope.may_write(a) and a.memory is not b.memory:
        _add_in_place(scope, a, b)
    else:
        forms = ("{a} + {b}", "{a} + {b}", "torch.add({a}, {b})", "{a}.add({b})", "{a} - {b}")
        forms += ("torch.add({a}, {b}, alpha=0.5)", "{a}.add({b}, alpha=2.0)", "torch.sub({a}, {b})")
        forms += ("torch.add(input={a}, other={b})", "sum([{a}, {b}])")
        a = scope.assign(scope.rng.choice(forms).format(a=a.name, b=b.name), a.shape)
    if scope.rng.random() < 0.5:
        forms = _IN_PLACE[:5] if scope.rng.random() < 0.4 and scope.may_write(a) else _FUNCTIONS[:4]
        memory = a.memory if forms[0] == _IN_PLACE[0] else Memory()
        if memory is a.memory:
            scope.writes(a)
        a.memory.saved = memory.saved = True
        scope.assign(scope.rng.choice(forms).format(a.name), a.shape, memory)


def _add_in_place(scope: Scope, a: Value, b: Value) -> None:
    scope.writes(a)
    forms = ["{a} += {b}", "{a} += {b}", "{a}.add_({b})", "{a} -= {b}", "{a}.add_({b}, alpha=0.5)"]
    if not scope.program.trainable:
        forms += [
            "torch.add({a}, {b}, out={a})",
            "torch.sub({a}, {b}, out={a})",
            "{a} *= {b}",
            "{a}.mul_({b})",
        ]
        forms += ["{a}.copy_({b})"]
    scope.emit(scope.rng.choice(forms).format(a=a.name, b=b.name))


def fused_residual(scope: Scope) -> None:
    """``act(norm(conv(x)) + y)`` and its like, as in residual networks."""
    value = scope.image()
    skip = scope.image()
    if skip.shape[1:] != value.shape[1:]:
        raise Impossible
    text, shape = _conv(scope, value.name, value, skip.shape[0], keep=True)
    norm = scope.member("norm", layers.norm(scope.program, shape[0]))
    out = scope.fresh("out")
    scope.emit(f"{out} = self.{norm}({text})")
    disturb(scope, value, skip)
    form = scope.rng.choice(
        ("{o} += {s}", "{o} += {s}", "{o} = {o} + {s}", "{o} = {s} + {o}", "{o}.add_({s})")
    )
    scope.emit(form.format(o=out, s=skip.name))
    disturb(scope, value, skip)
    memory = Memory(saved=scope.rng.random() < 0.8)
    if memory.saved:
        form = scope.rng.choice(
            ("F.relu({o})", "self.{a}({o})", "torch.relu_({o})", "F.relu({o}, inplace=True)")
        )
        if "self" in form:
            act = scope.member("act", layers.activation(scope.rng, scope.rng.random() < 0.5))
            form = form.replace("{a}", act)
        scope.emit(f"{out} = {form.format(o=out)}")
    scope.bind(out, shape, memory)


def stem(scope: Scope) -> None:
    """A batch norm, an activation and max pooling, as at the start of residual networks."""
    value = scope.image()
    if min(value.shape[1:]) < 3:
        raise Impossible
    text, shape = (value.name, value.shape) if scope.rng.random() < 0.3 else _conv(scope, value.name, value)
    if min(shape[1:]) < 3:
        raise Impossible
    norm = scope.member("norm", layers.norm(scope.program, shape[0]))
    act = scope.rng.choice(("F.relu({})", "torch.relu_({})", "self.{a}({{}})"))
    if "self" in act:
        act = act.format(a=scope.member("act", layers.activation(scope.rng, scope.rng.random() < 0.5)))
    module, function, made = layers.pool(scope.rng, shape)
    pooled = f"self.{scope.member('pool', module)}({{}})" if scope.rng.random() < 0.5 else function
    value.memory.saved = True
    scope.assign(pooled.format(act.format(f"self.{norm}({text})")), made)


def tail(scope: Scope) -> None:
    """An addition, ReLU and the mean of each plane, as at the end of residual networks."""
    a = scope.image()
    others = [v for v in scope.values.values() if v.shape == a.shape and v is not a]
    if not others:
        raise Impossible
    b = scope.rng.choice(others)
    b.read = True
    if scope.rng.random() < 0.3 and scope.may_write(a):
        scope.writes(a)
        scope.emit(f"{a.name} += {b.name}")
        added = a.name
        a.memory.saved = True
    else:
        added = scope.rng.choice(("{a} + {b}", "torch.add({a}, {b})")).format(a=a.name, b=b.name)
    mean = scope.rng.choice(("F.adaptive_avg_pool2d({}, 1)", "{}.mean((2, 3), keepdim=True)", "self.gap({})"))
    if "gap" in mean:
        mean = mean.replace("gap", scope.member("gap", "nn.AdaptiveAvgPool2d(1)"))
    scope.assign(
        mean.format(scope.rng.choice(("F.relu({})", "({}).relu()")).format(added)), (a.shape[0], 1, 1)
    )


def pool(scope: Scope) -> None:
    value = scope.image()
    module, function, shape = layers.pool(scope.rng, value.shape)
    if scope.rng.random() < 0.5:
        text = f"self.{scope.member('pool', module)}({value.name})"
    else:
        text = function.format(value.name)
    value.memory.saved = True
    scope.assign(text, shape)


def resize(scope: Scope) -> None:
    c, h, w = (value := scope.image()).shape
    if max(h, w) <= 4:
        text = scope.rng.choice(("F.interpolate({}, scale_factor=2)", "self.up({})"))
        if "self" in text:
            name = scope.member("up", "nn.Upsample(scale_factor=2)")
            text = text.replace("up", name)
        scope.assign(text.format(value.name), (c, 2 * h, 2 * w))
    else:
        scope.assign(f"F.pad({value.name}, (1, 0, 1, 0))[:, :, :-1, :-1]", (c, h, w))


def nothing(scope: Scope) -> None:
    value = scope.image()
    if scope.rng.random() < 0.3:
        text = f"F.dropout({value.name}, 0.25, self.training)"
    else:
        text = f"self.{scope.member('drop', layers.nothing(scope.rng))}({value.name})"
    scope.assign(text, value.shape, value.memory)


def again(scope: Scope) -> None:
    """Call a layer once more."""
    fits = [
        (layer, value)
        for layer in scope.layers
        for value in scope.values.values()
        if layer.takes == value.shape and not (layer.writes and not scope.may_write(value))
    ]
    if not fits:
        raise Impossible
    layer, value = scope.rng.choice(fits)
    if scope.rng.random() < 0.2:  # by another name
        layer = replace(layer, call=f"self.{scope.member('twin', layer.call)}")
    value.read = True
    text, memory = scope.call(layer, value)
    scope.assign(text, layer.makes, memory)


def sequential(scope: Scope) -> None:
    value = scope.image()
    layer = layers.sequential(scope, value.shape)
    text, memory = scope.call(layer, value)
    scope.layers.append(layer)
    scope.assign(text, layer.makes, memory)


def squeeze_excite(scope: Scope) -> None:
    value = scope.image()
    c = value.shape[0]
    name = scope.member("gate", f"nn.Sequential(nn.Conv2d({c}, 4, 1), nn.ReLU(), nn.Conv2d(4, {c}, 1))")
    mean = scope.rng.choice(("F.adaptive_avg_pool2d({}, 1)", "{}.mean((2, 3), keepdim=True)"))
    gate = scope.fresh("gate")
    scope.emit(f"{gate} = torch.sigmoid(self.{name}({mean.format(value.name)}))")
    value.memory.saved = True
    scope.assign(f"{value.name} * {gate}", value.shape)
