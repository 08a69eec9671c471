"""Statements about several layers or values at once: loops, lists, concatenation, functions."""

from __future__ import annotations

from . import layers
from .grammar import Impossible, Memory, Scope


def loop(scope: Scope) -> None:
    """Layers of a ModuleList one after the other, and perhaps a list of what they made."""
    value = scope.image()
    c = value.shape[0]
    found = [
        layers.chain(scope.program, value.shape, False, True)[0] for _ in range(scope.rng.choice((2, 2, 3)))
    ]
    each = ", ".join(f"nn.Sequential({', '.join(chain)})" for chain in found)
    children = scope.member("layers", f"nn.ModuleList([{each}])")
    now, layer, seen = scope.fresh("now"), scope.fresh("layer"), scope.fresh("seen")
    value.memory.saved = True
    if scope.rng.random() < 0.25:
        each = scope.rng.choice(
            ("{l}({v}) for {l} in self.{c}", "self.{c}[i]({v}) for i in range(len(self.{c}))")
        )
        text = scope.rng.choice(("sum([{}])", "torch.stack([{}], 1).sum(1)", "sum({})"))
        text = text.format(each.format(l=layer, v=value.name, c=children))
        scope.assign(text, value.shape, Memory(saved=True))
        return
    first = scope.rng.choice((value.name, f"{value.name} * 1.0"))
    scope.emit(f"{now}, {seen} = {first}, []")
    owned = "*" in first or (not scope.program.trainable and scope.may_write(value))
    if "*" not in first and owned:
        scope.writes(value)
    grow = scope.rng.choice(("{n} = {l}({n})", "{n} = {n} + {l}({n})", "{n} += {l}({n})"))
    if "+=" in grow and (not owned or scope.program.trainable):
        grow = "{n} = {l}({n})"
    with scope.block(f"for {layer} in self.{children}:"):
        scope.emit(grow.format(n=now, l=layer))
        scope.emit(f"{seen}.append({now})")
    shape = value.shape
    end = scope.rng.choice(("stack", "cat", "sum", "last"))
    if end == "cat":
        scope.assign(f"torch.cat({seen}, {scope.rng.choice(('1', 'dim=1'))})", (c * len(found), *shape[1:]))
    else:
        text = {"stack": f"torch.stack({seen}).mean(0)", "sum": f"sum({seen})", "last": f"{seen}[-1]"}[end]
        scope.assign(text, shape, Memory(saved=True))


_APPLY = """\
def apply_all(x, *layers, add=False):
    for layer in layers:
        x = x + layer(x) if add else layer(x)
    return x
"""


def function(scope: Scope) -> None:
    """Layers are handed to a function outside the class."""
    value = scope.image()
    fits = [x for x in scope.layers if x.takes == x.makes == value.shape and not x.writes]
    if not fits:
        raise Impossible
    chosen = scope.rng.choices(fits, k=scope.rng.choice((1, 2)))
    name = scope.program.helper("apply_all", _APPLY)
    add = scope.rng.choice(("", ", add=True"))
    value.memory.saved = True
    scope.assign(
        f"{name}({value.name}, {', '.join(x.call for x in chosen)}{add})", value.shape, Memory(saved=True)
    )


def collect(scope: Scope) -> None:
    """Concatenate or stack what a list holds."""
    a = scope.image()
    alike = [v for v in scope.values.values() if len(v.shape) == 3 and v.shape[1:] == a.shape[1:]]
    chosen = [a, *(scope.rng.choice(alike) for _ in range(scope.rng.choice((1, 1, 2))))]
    if sum(v.shape[0] for v in chosen) > 16:
        raise Impossible
    names = [v.name for v in chosen]
    if scope.rng.random() < 0.4:
        seen = scope.fresh("seen")
        scope.emit(f"{seen} = [{names[0]}]")
        for name in names[1:]:
            scope.emit(
                scope.rng.choice(
                    (f"{seen}.append({name})", f"{seen} += [{name}]", f"{seen}.extend([{name}])")
                )
            )
        listed = seen
    else:
        listed = scope.rng.choice(("[{}]", "({})")).format(", ".join(names))
    if len({v.shape for v in chosen}) == 1 and scope.rng.random() < 0.4:
        text = scope.rng.choice(
            ("torch.stack({}).sum(0)", "torch.stack({}, 1).mean(1)", "torch.stack({}, dim=0)[0]")
        )
        scope.assign(text.format(listed), a.shape)
    else:
        shape = (sum(v.shape[0] for v in chosen), *a.shape[1:])
        scope.assign(f"torch.cat({listed}, {scope.rng.choice(('1', 'dim=1'))})", shape)
