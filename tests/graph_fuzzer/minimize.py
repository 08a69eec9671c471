"""Makes a failing program smaller: statements and calls go as long as the failure stays.

It works on the syntax tree, so it knows nothing of the grammar. The test refuses what PyTorch does not run.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace

from .source import Source


def minimize(source: Source, fails: Callable[[Source], bool], tries: int = 2000) -> Source:
    """The smallest program found in which ``fails`` is still true.

    Args:
        fails: is called with programs that may not even run; False for these.
        tries: how often it may be called.
    """
    improved = True
    while improved:
        improved = False
        for change in (_without_class, _without_statement, _without_name, _simpler_expression):
            place = 0
            while tries > 0:
                text = _changed(source.classes, change, place)
                if text is None:
                    break
                tries -= 1
                candidate = replace(source, classes=text)
                if text != source.classes and fails(candidate):
                    source, improved = candidate, True  # what stands at this place now is the next
                else:
                    place += 1
    return source


def _changed(text: str, change: Callable[[ast.Module, int], bool], place: int) -> str | None:
    """The program with one thing less; None where there is no such place."""
    tree = ast.parse(text)
    if not change(tree, place):
        return None
    ast.fix_missing_locations(tree)
    return _unparse(tree)


def _unparse(tree: ast.Module) -> str:
    return "\n\n".join(ast.unparse(node) for node in tree.body) + "\n"


def _without_class(tree: ast.Module, number: int) -> bool:
    if number >= len(tree.body) - 1:
        return False
    del tree.body[number]
    return True


def _bodies(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for name in ("body", "orelse"):
            body = getattr(node, name, None)
            if isinstance(body, list) and not isinstance(node, ast.Module):
                yield body


def _places(tree: ast.AST) -> list[tuple[list[ast.stmt], int]]:
    """Statements that may go, from the end, so that what is read later goes first."""
    places = [(body, place) for body in _bodies(tree) for place in range(len(body))]
    return [(body, place) for body, place in reversed(places) if not _is_super(body[place])]


def _is_super(statement: ast.stmt) -> bool:
    return "super().__init__" in ast.unparse(statement)


def _without_statement(tree: ast.Module, number: int) -> bool:
    places = _places(tree)
    # An if or with may give way to what is in it, too.
    inner = [(body, place) for body, place in places if isinstance(body[place], (ast.If, ast.With, ast.For))]
    if number < len(places):
        body, place = places[number]
        body[place : place + 1] = [] if len(body) > 1 else [ast.Pass()]
        return True
    if number - len(places) < len(inner):
        body, place = inner[number - len(places)]
        body[place : place + 1] = body[place].body  # type: ignore[attr-defined]
        return True
    return False


def _without_name(tree: ast.Module, number: int) -> bool:
    """Drop an assignment in favor of a name that it reads."""
    found = []
    for body, place in _places(tree):
        statement = body[place]
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            names = {n.id for n in ast.walk(statement.value) if isinstance(n, ast.Name)}
            found += [(body, place, name) for name in sorted(names - {"self", "F", "torch", "nn"})]
    if number >= len(found):
        return False
    body, place, name = found[number]
    target = body[place].targets[0].id  # type: ignore[attr-defined]
    for statement in body[place + 1 :]:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id == target:
                node.id = name
    body[place : place + 1] = [] if len(body) > 1 else [ast.Pass()]
    return True


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def _simpler_expression(tree: ast.Module, number: int) -> bool:
    """Replace an expression by a part of it."""
    choices: list[tuple[ast.AST, ast.AST]] = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            parts: list[ast.AST] = []
            if isinstance(node, ast.Call):
                is_method = (
                    isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) not in _MODULES
                )
                parts = [*node.args, *([node.func.value] if is_method else [])]  # type: ignore[attr-defined]
                if len(node.args) > 1:
                    shorter = ast.Call(node.func, node.args[:-1], node.keywords)
                    parts.append(shorter)
                if node.keywords:
                    parts.append(ast.Call(node.func, node.args, node.keywords[:-1]))
            elif isinstance(node, ast.BinOp):
                parts = [node.left, node.right]
            elif isinstance(node, (ast.Tuple, ast.List)) and isinstance(node.ctx, ast.Load) and node.elts:
                parts = [
                    *node.elts,
                    type(node)(node.elts[:-1], node.ctx),
                    type(node)(node.elts[1:], node.ctx),
                ]
            elif isinstance(node, ast.Dict):
                parts = list(node.values)
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                parts = [node.value]
            choices += [(node, part) for part in parts]
    if number >= len(choices):
        return False
    _Replace(*choices[number]).visit(tree)
    return True


_MODULES = ("torch", "F", "nn", "self", "super()", "torch.nn.functional")
