"""Statements after which no trace may be trusted: types, state, random numbers, contexts, hooks.

What makes two correct runs differ, or a refusal right, is noted in the program's tags.
"""

from __future__ import annotations

from .grammar import Impossible, Memory, Scope

_HOOK = """\
def double(module, args, output):
    return output * 2.0
"""
_PRE_HOOK = """\
def shift(module, args):
    return (args[0] + 0.5,)
"""


def type_test(scope: Scope) -> None:
    value = scope.image()
    y = value.name
    tests = (
        "isinstance({}, torch.Tensor)",
        "type({}) is torch.Tensor",
        "torch.is_tensor({})",
        "not hasattr({}, 'node')",
    )
    tests += (
        "torch.jit.isinstance({}, torch.Tensor)",
        "isinstance({}, (list, tuple))",
        "isinstance({}, nn.Module)",
    )
    tests += (
        "{}.is_floating_point()",
        "{}.dtype == torch.float64",
        "not {}.requires_grad",
        "{} is not None",
        "torch.is_grad_enabled()",
    )
    value.memory.saved = True
    with scope.block(f"if {scope.rng.choice(tests).format(y)}:"):
        scope.emit(f"{y} = {y} * 2.0")
    scope.bind(y, value.shape, Memory(saved=True, input=value.memory.input))


def context(scope: Scope) -> None:
    value = scope.image()
    y = value.name
    contexts = ["torch.no_grad()", "torch.enable_grad()", "torch.autocast('cpu', dtype=torch.bfloat16)"]
    contexts += ["torch.autocast('cpu', enabled=False)"]
    chosen = scope.rng.choice(contexts)
    if "bfloat16" in chosen:
        scope.program.tags.add("autocast")
    fits = [layer for layer in scope.layers if layer.takes == value.shape and not layer.writes]
    if not fits:
        raise Impossible
    layer = scope.rng.choice(fits)
    z = scope.fresh("y")
    with scope.block(f"with {chosen}:"):
        text, memory = scope.call(layer, value)
        scope.emit(f"{z} = {text}")
    back = f"{z}.to({y}.dtype)"
    if "bfloat16" in chosen:
        scope.emit(f"{z} = {back}")
    memory.saved = True
    scope.bind(z, layer.makes, memory)


def value_branch(scope: Scope) -> None:
    """A branch on what a tensor holds."""
    value = scope.image()
    y = value.name
    value.memory.saved = True
    test = scope.rng.choice(("{y}.mean() > 0.1", "bool(({y} > -1e6).all())", "float({y}.sum()) > 0.0"))
    with scope.block(f"if {test.format(y=y)}:"):
        scope.emit(f"{y} = {y} * 0.5")
    scope.bind(y, value.shape, Memory(saved=True, input=value.memory.input))


def random_numbers(scope: Scope) -> None:
    value = scope.image()
    y = value.name
    scope.program.tags.add("random")
    forms = ("{y} + torch.rand(1, dtype={y}.dtype)", "{y} * torch.rand({y}.shape, dtype={y}.dtype)")
    forms += (
        "F.dropout({y}.contiguous(), 0.25, True)",
        "{y} + torch.randn({y}.size(0), 1, 1, 1, dtype={y}.dtype)",
    )
    scope.assign(scope.rng.choice(forms).format(y=y), value.shape)


def state(scope: Scope) -> None:
    """Something that the model keeps from one call to the next."""
    value = scope.image()
    y = value.name
    scope.program.tags.add("state")
    kind = scope.rng.choice(("counter", "buffer", "buffer", "list", "last", "constant"))
    if kind == "counter":
        name = scope.member("calls", "0")
        scope.emit(f"self.{name} += 1")
        scope.assign(f"{y} + float(self.{name})", value.shape)
    elif kind == "buffer":
        name = scope.fresh("seen")
        scope.members.append(f"self.register_buffer('{name}', torch.zeros(1))")
        forms = ("self.{b}.add_(1.0)", "self.{b} += 1.0", "self.{b}[0] += 0.5", "self.{b} = self.{b} + 1.0")
        forms += ("self.{b}.mul_(0.5).add_({y}.detach().mean())", "self.{b}.copy_({y}.detach().mean())")
        scope.emit(scope.rng.choice(forms).format(b=name, y=y))
        scope.assign(f"{y} + self.{name}", value.shape)
    elif kind == "list":
        name = scope.member("history", "[]")
        scope.emit(f"self.{name}.append(len(self.{name}))")
        scope.assign(f"{y} * float(len(self.{name}))", value.shape)
    elif kind == "last":
        name = scope.member("last", "None")
        old = scope.fresh("old")
        scope.emit(f"{old} = 0.0 if self.{name} is None else self.{name}")
        scope.emit(f"self.{name} = {y}.detach().mean()")
        scope.assign(f"{y} + {old}", value.shape)
    else:
        name = scope.member("constant", "torch.ones(1)")
        scope.emit(f"self.{name}.mul_(2.0)")
        scope.assign(f"{y} * self.{name}", value.shape)


def hook(scope: Scope) -> None:
    """A hook on a layer."""
    if not scope.layers:
        raise Impossible
    name = scope.rng.choice(scope.layers).call.removeprefix("self.")
    if "." in name or "[" in name:
        raise Impossible
    if scope.rng.random() < 0.5:
        scope.members.append(f"self.{name}.register_forward_hook({scope.program.helper('double', _HOOK)})")
    else:
        scope.members.append(
            f"self.{name}.register_forward_pre_hook({scope.program.helper('shift', _PRE_HOOK)})"
        )
