"""Small changes of a program's meaning, one at a time: what `make mutants` lets the tests find.

for number, mutation in enumerate(mutations(source)):
    tree = mutated(source, number)

Only the bodies of functions and methods are changed, for these can be exchanged in a running process (see `mutants`).
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

EXCLUDED = {
    "annotations": "they are read by mypy and not by the program",
    "docstrings": "nothing reads them",
    "texts for people": "another wording is no fault, and tests ask for the few words that matter; a text is a string "
    "with a space in it, or one that an error or a warning is made of",
    "code outside of functions": "constants and tables are read when modules are imported, and not exchanged later",
    "cached functions": "what they gave before the change would still be there, in one test and not in the next",
}
"""The kinds of code that are left as they are, and why. It goes by kind alone, never by the single place."""

CACHES = ("lru_cache", "cached_property")
REPORTS = ("warning", "info", "warn")
COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    kind: str
    line: int
    statement: int
    """The line at which the statement begins that it is a part of."""
    function: str
    """The qualified name of the outermost function around it: of the module, or of a class of the module."""
    before: str
    after: str


@dataclass(frozen=True)
class _Scope:
    function: str | None = None
    owner: str = ""
    statement: int = 0
    is_text: bool = False


Site = tuple[Callable[[], Mutation], Callable[[], None]]


def mutations(source: str) -> list[Mutation]:
    """All mutations of a module, in the order of their places."""
    return [describe() for describe, _ in _sites(ast.parse(source))]


def mutated(source: str, number: int) -> ast.Module:
    """The module with the mutation of that number, and no other."""
    tree = ast.parse(source)
    _, apply = _sites(tree)[number]
    apply()
    return ast.fix_missing_locations(tree)


def _sites(tree: ast.Module) -> list[Site]:
    """For each mutation what describes it and what makes it in `tree`; only one may be made."""
    return list(_within(tree, _Scope()))


def _within(node: ast.AST, scope: _Scope) -> Iterator[Site]:
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "format_spec"):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST):
                yield from _at(child, _Slot(node, field, index if isinstance(value, list) else None), scope)


@dataclass(frozen=True)
class _Slot:
    """Where a node hangs in the tree."""

    parent: ast.AST
    field: str
    index: int | None

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def _at(node: ast.AST, slot: _Slot, scope: _Scope) -> Iterator[Site]:
    if isinstance(node, ast.ClassDef) and scope.function is None:
        yield from _within(node, _Scope(owner=f"{scope.owner}{node.name}."))
        return
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        if not any(name in ast.unparse(decorator) for decorator in node.decorator_list for name in CACHES):
            inside = scope if scope.function is not None else _Scope(scope.owner + node.name)
            for index, child in enumerate(node.body):
                yield from _at(child, _Slot(node, "body", index), inside)
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
        return
    if isinstance(node, ast.stmt):
        scope = replace(scope, statement=node.lineno)
    if scope.function is not None:
        for kind, changed in _changes(node, slot, scope):
            yield _site(kind, node, changed, slot, scope)
    if isinstance(node, ast.Raise) or _is_report(node) or _is_sentence(node):
        scope = replace(scope, is_text=True)
    yield from _within(node, scope)


def _site(kind: str, node: ast.AST, changed: ast.AST, slot: _Slot, scope: _Scope) -> Site:
    def describe() -> Mutation:
        before, after = ast.unparse(node), "pass" if kind == "statement" else ast.unparse(changed)
        if kind == "return":
            after = "return None"
        if isinstance(
            slot.parent, (ast.BinOp, ast.Compare, ast.keyword, ast.Subscript, ast.Slice)
        ):  # shown in its place
            around = ast.unparse(slot.parent)
            before, after = around, f"{around}, {before} -> {after}"
        return Mutation(kind, node.lineno, scope.statement, scope.function or "", before, after)

    return describe, lambda: slot.put(changed)


def _is_report(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in REPORTS


def _is_sentence(node: ast.AST) -> bool:
    """Whether it is an f-string with a space in it."""
    return isinstance(node, ast.JoinedStr) and any(" " in value.value for value in node.values if _is_string(value))


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _changes(node: ast.AST, slot: _Slot, scope: _Scope) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            swapped = [*node.ops]
            swapped[place] = COMPARISONS[type(operator)]()
            yield "comparison", ast.copy_location(ast.Compare(node.left, swapped, node.comparators), node)
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "boolean", ast.copy_location(ast.BoolOp(other, node.values), node)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "boolean" if isinstance(node.op, ast.Not) else "arithmetic", node.operand
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC and not _is_of_text(node):
        operator = ARITHMETIC[type(node.op)]()
        if isinstance(node, ast.BinOp):
            yield "arithmetic", ast.copy_location(ast.BinOp(node.left, operator, node.right), node)
        else:
            yield "arithmetic", ast.copy_location(ast.AugAssign(node.target, operator, node.value), node)
    elif isinstance(node, ast.Constant):
        changed = _other_constant(node.value, scope)
        if changed is not None:
            yield "constant", ast.copy_location(ast.Constant(changed), node)
    if _is_condition(slot) and not isinstance(node, (ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Constant)):
        yield "condition", ast.copy_location(ast.UnaryOp(ast.Not(), node), node)
    if isinstance(node, ast.Return) and not (node.value is None or _is_none(node.value)):
        yield "return", _instead(node, ast.Return(ast.Constant(None)))
    if _can_be_left_out(node):
        yield "statement", _instead(node, ast.Pass())


def _other_constant(value: object, scope: _Scope) -> object:
    """None: it is left as it is."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, (str, bytes)) and not scope.is_text:
        is_words = (" " if isinstance(value, str) else b" ") in value
        return None if is_words else f"XX{value}XX" if isinstance(value, str) else b"XX" + value + b"XX"
    return None


def _is_of_text(node: ast.BinOp | ast.AugAssign) -> bool:
    """Texts are joined by +: what comes of another operator is a TypeError and tells nothing."""
    sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
    return any(
        isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str | bytes))
        for side in sides
    )


def _is_condition(slot: _Slot) -> bool:
    return (slot.field == "test" and isinstance(slot.parent, (ast.If, ast.While, ast.IfExp))) or (
        slot.field == "ifs" and isinstance(slot.parent, ast.comprehension)
    )


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _can_be_left_out(node: ast.AST) -> bool:
    """What has an effect beyond the names of its function: without the others only a NameError would follow."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        return any(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets)
    return isinstance(node, (ast.AugAssign, ast.Delete, ast.Raise, ast.Break, ast.Continue))


def _instead(node: ast.stmt, other: ast.stmt) -> ast.If:
    """`other`; the names of `node` stay those of the function, so that its code fits the function it is put into."""
    ast.copy_location(other, node)
    return ast.copy_location(ast.If(ast.Constant(0), [node], [other]), node)
