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
            position = 0
            while tries > 0:
                text = _changed(source.classes, change, position)
                if text is None:
                    break
                tries -= 1
                candidate = replace(source, classes=text)
                if text != source.classes and fails(candidate):
                    source, improved = candidate, True  # what stands at this position now is the next
                else:
                    position += 1
    return source


def _changed(text: str, change: Callable[[ast.Module, int], bool], position: int) -> str | None:
    """The program with one thing less; None where there is no such position."""
    tree = ast.parse(text)
    if not change(tree, position):
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


def _positions(tree: ast.AST) -> list[tuple[list[ast.stmt], int]]:
    """Statements that may go, from the end, so that what is read later goes first."""
    positions = [(body, position) for body in _bodies(tree) for position in range(len(body))]
    return [(body, position) for body, position in reversed(positions) if not _is_super(body[position])]


def _is_super(statement: ast.stmt) -> bool:
    return "super().__init__" in ast.unparse(statement)


def _without_statement(tree: ast.Module, number: int) -> bool:
    positions = _positions(tree)
    # An if or with may give way to what is in it, too.
    inner = [
        (body, position)
        for body, position in positions
        if isinstance(body[position], (ast.If, ast.With, ast.For))
    ]
    if number < len(positions):
        body, position = positions[number]
        body[position : position + 1] = [] if len(body) > 1 else [ast.Pass()]
        return True
    if number - len(positions) < len(inner):
        body, position = inner[number - len(positions)]
        body[position : position + 1] = body[position].body  # type: ignore[attr-defined]
        return True
    return False


def _without_name(tree: ast.Module, number: int) -> bool:
    """Drop an assignment in favor of a name that it reads."""
    found = []
    for body, position in _positions(tree):
        statement = body[position]
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            names = {n.id for n in ast.walk(statement.value) if isinstance(n, ast.Name)}
            found += [(body, position, name) for name in sorted(names - {"self", "F", "torch", "nn"})]
    if number >= len(found):
        return False
    body, position, name = found[number]
    target = body[position].targets[0].id  # type: ignore[attr-defined]
    for statement in body[position + 1 :]:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id == target:
                node.id = name
    body[position : position + 1] = [] if len(body) > 1 else [ast.Pass()]
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
