"""Statements about memory: aliases, views, pieces, writing in place, buffers, constants and branches."""

from __future__ import annotations

from collections.abc import Callable

from .grammar import Impossible, Memory, Scope

_SCALARS = (
    "{} * 2.0",
    "{} + 0.5",
    "1.0 - {}",
    "{} / 3.0",
    "torch.mul({}, 0.5)",
    "{}.mul(1.5)",
    "-{}",
    "{}.neg()",
)
_SCALARS_IN_PLACE = (
    "{} *= 2.0",
    "{} += 0.5",
    "{} -= 0.25",
    "{} /= 2.0",
    "{}.mul_(0.5)",
    "{}.add_(1)",
    "{}.neg_()",
)
_SCALARS_IN_PLACE += ("{}.sub_(0.5)", "{}.div_(2.0)")


def scalar(scope: Scope) -> None:
    if scope.rng.random() < 0.5:
        value = scope.image()
        scope.assign(scope.rng.choice(_SCALARS).format(value.name), value.shape)
    else:
        value = scope.image(writable=True)
        scope.writes(value)
        scope.emit(scope.rng.choice(_SCALARS_IN_PLACE).format(value.name))


def alias(scope: Scope) -> None:
    """One more name for memory that has one."""
    value = scope.image()
    c, h, w = value.shape
    forms = [
        "{}",
        "{}",
        "{}.contiguous()",
        "{}[:]",
        "{}.view({}.shape)",
        "{}.reshape({}.shape)",
        "{}.to({}.dtype)",
    ]
    forms += [
        "{}.expand_as({})",
        f"{{}}.flatten(2).unflatten(2, ({h}, {w}))",
        "{}.unsqueeze(0).squeeze(0)",
    ]
    forms += [
        "{}.transpose(1, 2).transpose(1, 2)",
        "{}.permute(0, 2, 3, 1).permute(0, 3, 1, 2)",
        "{}.view_as({})",
    ]
    forms += [
        f"{{}}.view({{}}.size(0), {c}, -1).view(-1, {c}, {h}, {w})",
        "{}.to(memory_format=torch.channels_last)",
    ]
    forms += [
        "{}.contiguous(memory_format=torch.channels_last)",
        "torch.permute({}, (0, 1, 2, 3))",
        "{}.float().to({}.dtype)",
    ]
    forms += ["{}.type_as({})", f"{{}}.narrow(1, 0, {c})", "torch.reshape({}, {}.shape)"]
    if scope.rng.random() < 0.1:
        forms = ["{}.detach()", "{}.data", "{}.clone()"]
    text = scope.rng.choice(forms).replace("{}", value.name)
    scope.assign(text, value.shape, value.memory, name=scope.fresh("z"))


def turned(scope: Scope) -> None:
    """A view of another shape, which is read and perhaps written."""
    value = scope.image()
    c, h, w = value.shape
    if h == w and scope.rng.random() < 0.5:
        scope.assign(f"{value.name}.transpose(2, 3)", value.shape, value.memory, name=scope.fresh("z"))
        return
    z = scope.fresh("z")
    scope.emit(f"{z} = {value.name}.permute(0, 2, 3, 1)")
    if scope.may_write(value) and scope.rng.random() < 0.5:
        scope.writes(value)
        scope.emit(scope.rng.choice(_SCALARS_IN_PLACE).format(z))
    back = scope.rng.choice(
        ("{}.permute(0, 3, 1, 2)", "{}.permute(0, 3, 1, 2).contiguous()", "{}.movedim(-1, 1)")
    )
    scope.assign(back.format(z), (c, h, w), value.memory, name=z)


def part(scope: Scope) -> None:
    """A slice, which stays a view."""
    value = scope.image()
    c, h, w = value.shape
    if c >= 4 and scope.rng.random() < 0.7:
        half = c // 2
        form = scope.rng.choice(("{}[:, :%d]", "{}[:, %d:]", "{}.narrow(1, 0, %d)", "{}.narrow(1, %d, %d)"))
        if form.count("%d") == 2:
            text, shape = form % (c - half, half), (half, h, w)
        elif form == "{}[:, %d:]":
            text, shape = form % half, (c - half, h, w)
        else:
            text, shape = form % half, (half, h, w)
    elif c >= 4 and c % 2 == 0 and scope.rng.random() < 0.5:
        text, shape = "{}[:, ::2]", (c // 2, h, w)
    elif min(h, w) >= 4:
        text, shape = scope.rng.choice(
            (("{}[..., 1:-1]", (c, h, w - 2)), ("{}[:, :, ::2, ::2]", (c, (h + 1) // 2, (w + 1) // 2)))
        )
    else:
        raise Impossible
    scope.assign(text.format(value.name), shape, value.memory, name=scope.fresh("v"))


def pieces(scope: Scope) -> None:
    """chunk, split and unbind, as names or as a list that grows."""
    value = scope.image()
    c, h, w = value.shape
    if c < 4 or c % 2:
        raise Impossible
    half = c // 2
    forms = ("{}.chunk(2, 1)", "{}.chunk(2, dim=1)", "torch.chunk({}, 2, 1)", f"{{}}.split({half}, 1)")
    forms += (
        f"torch.split({{}}, {half}, dim=1)",
        f"torch.split({{}}, [{half}, {half}], 1)",
        "{}.tensor_split(2, 1)",
    )
    text = scope.rng.choice(forms).format(value.name)
    value.memory.pieces = True
    if scope.rng.random() < 0.5:
        a, b = scope.fresh("a"), scope.fresh("b")
        scope.emit(f"{a}, {b} = {text}")
        for name in (a, b):
            scope.bind(name, (half, h, w), value.memory)
        return
    listed = scope.fresh("ys")
    scope.emit(f"{listed} = list({text})")
    fits = [layer for layer in scope.layers if layer.takes == (half, h, w) and not layer.writes]
    total = c
    if fits and scope.rng.random() < 0.8:
        layer = scope.rng.choice(fits)
        value.memory.saved = True
        if layer.makes[1:] == (h, w):
            scope.emit(f"{listed}.append({layer.call}({listed}[-1]))")
            total += layer.makes[0]
    if scope.rng.random() < 0.5:
        scope.emit(f"{listed}.append({listed}[0] * 2.0)")
        total += half
    if total > 16:
        raise Impossible
    scope.assign(f"torch.cat({listed}, 1)", (total, h, w))


def write_part(scope: Scope) -> None:
    """Write into a part of an image by an index, or through a view without a name."""
    value = scope.image(writable=True)
    c = value.shape[0]
    half = max(1, c // 2)
    forms = [
        "{y}[:, :%d] = 0.5",
        "{y}[:, :%d] *= 2.0",
        "{y}[:, :%d].mul_(0.5)",
        "{y}[:, :%d].zero_()",
        "{y}[..., 0] += 1.0",
    ]
    forms += [
        "{y}[:, 0].add_(1.0)",
        "{y}.view(-1)[:3].zero_()",
        "{y}[:, %d:].relu_()",
        "{y}.select(1, 0).fill_(0.25)",
    ]
    forms += ["{y}.transpose(2, 3).mul_(0.5)", "{y}.flatten(1).add_(0.5)", "{y}.detach().mul_(1.0)"]
    form = scope.rng.choice(forms)
    scope.writes(value)
    scope.emit((form % half if "%d" in form else form).format(y=value.name))
    if "relu" in form:
        value.memory.saved = True


def shuffle(scope: Scope) -> None:
    """Channels in another order, as ShuffleNet does it."""
    c, h, w = (value := scope.image()).shape
    if c % 2:
        raise Impossible
    n = value.name
    scope.assign(
        f"{n}.view({n}.size(0), 2, {c // 2}, {h}, {w}).transpose(1, 2).reshape({n}.size(0), {c}, {h}, {w})",
        value.shape,
    )


def buffer(scope: Scope) -> None:
    """A buffer, a parameter or a plain tensor takes part."""
    value = scope.image()
    c = value.shape[0]
    name = scope.fresh("scale")
    if scope.rng.random() < 0.5:
        scope.members.append(f"self.register_buffer('{name}', torch.rand(1, {c}, 1, 1) + 0.5)")
    else:
        scope.members.append(f"self.{name} = nn.Parameter(torch.rand({c}, 1, 1) + 0.5)")
    forms = (
        "{y} * self.{b}",
        "{y} + self.{b}",
        "self.{b} + {y}",
        "torch.add({y}, self.{b})",
        "self.{b} * {y}",
    )
    if scope.rng.random() < 0.3 and scope.may_write(value):
        scope.writes(value)
        scope.emit(scope.rng.choice(("{y} += self.{b}", "{y}.add_(self.{b})")).format(y=value.name, b=name))
        return
    value.memory.saved = True
    scope.assign(scope.rng.choice(forms).format(y=value.name, b=name), value.shape)


def fresh_constant(scope: Scope) -> None:
    """Tensors made in the forward, perhaps written before they are used."""
    value = scope.image()
    c = value.shape[0]
    y = value.name
    forms = [
        f"{y} + torch.ones({c}, 1, 1, dtype={y}.dtype)",
        f"{y} * {y}.new_ones({c}, 1, 1)",
        f"{y} + torch.zeros_like({y})",
    ]
    forms += [
        f"{y} + torch.full((1, {c}, 1, 1), 0.5, dtype={y}.dtype)",
        f"{y} * torch.arange(1, {c + 1}).view(-1, 1, 1)",
    ]
    forms += [f"{y} + torch.zeros(1, dtype={y}.dtype).add_({y}.mean())", f"{y} + {y}.new_zeros(1).add_(0.5)"]
    scope.assign(scope.rng.choice(forms), value.shape)


def branch(scope: Scope) -> None:
    """An if on a flag, the mode, a child that may be missing, or a number of channels."""
    value = scope.image()
    y, shape = value.name, value.shape
    conditions: list[Callable[[], str]] = [
        scope.flag,
        scope.flag,
        lambda: f"not {scope.flag()}",
        lambda: "self.training",
        lambda: f"{y}.shape[1] == {scope.rng.choice((shape[0], 4))}",
        lambda: f"len({y}.shape) == 4",
        lambda: f"{y}.dim() == 4 and {y}.size(2) > 2",
    ]
    condition = scope.rng.choice(conditions)()
    value.memory.saved = True  # by the conservative view: a branch may keep it

    def body() -> None:
        fits = [layer for layer in scope.layers if layer.takes == layer.makes == shape and not layer.writes]
        forms = [f"{y} = {y} * 2.0", f"{y} = F.relu({y})", f"{y} = {y} + 1.0", f"{y} = torch.tanh({y})"]
        forms += [f"{y} = {layer.call}({y})" for layer in fits] * 2
        scope.emit(scope.rng.choice(forms))

    with scope.block(f"if {condition}:"):
        body()
    if scope.rng.random() < 0.4:
        with scope.block("else:"):
            body()
    scope.bind(y, shape, Memory(saved=True, input=value.memory.input, constant=value.memory.constant))


def optional_child(scope: Scope) -> None:
    """A child that may be None, as the downsample of a residual block."""
    value = scope.image()
    y, c = value.name, value.shape[0]
    if scope.rng.random() < 0.5:
        name = scope.member("down", "None")
    else:
        name = scope.member(
            "down",
            f"nn.Sequential(nn.Conv2d({c}, {c}, 1), nn.BatchNorm2d({c}))",
        )
    value.memory.saved = True
    skip = scope.fresh("skip")
    scope.emit(f"{skip} = {y}")
    with scope.block(f"if self.{name} is not None:"):
        scope.emit(f"{skip} = self.{name}({y})")
    scope.bind(skip, value.shape, Memory(saved=True, input=value.memory.input))


def counted(scope: Scope) -> None:
    """A buffer that training updates, in place or by another tensor."""
    value = scope.image()
    name = scope.fresh("ema")
    scope.members.append(f"self.register_buffer('{name}', torch.zeros(1))")
    forms = (
        "self.{b}.mul_(0.5).add_({y}.detach().mean())",
        "self.{b} += 1.0",
        "self.{b} = self.{b} + {y}.detach().mean()",
    )
    with scope.block("if self.training:"):
        scope.emit(scope.rng.choice(forms).format(b=name, y=value.name))
    if scope.rng.random() < 0.5:
        value.memory.saved = True
        scope.assign(f"{value.name} + self.{name}", value.shape)
