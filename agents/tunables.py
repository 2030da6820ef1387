"""kernel.py's TUNABLES, read and rewritten without running it."""

import ast
import dataclasses
import hashlib
import warnings
from collections.abc import Mapping, Sequence

import libcst as cst

from agents import CannotSearchError

Combination = tuple[str, ...]  # one value per searched tunable, each as Python source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tunable:
    """A module-level constant of kernel.py and its allowed values, each as Python source."""

    name: str
    values: tuple[str, ...]


def read_tunables(source: bytes) -> tuple[Tunable, ...]:
    """The entries of kernel.py's TUNABLES, in its order. Raises CannotSearchError if there are none or they are bad."""
    node = _constant(_parse(source), "TUNABLES", missing="kernel.py has no TUNABLES at module level: nothing to search")
    if not isinstance(node, ast.Dict) or not node.keys:
        raise CannotSearchError('TUNABLES must be a dict literal like {"BLOCK": (8, 16, 32)} with at least one entry')
    tunables = tuple(_tunable(key, values) for key, values in zip(node.keys, node.values, strict=True))
    names = [tunable.name for tunable in tunables]
    for name in names:
        if names.count(name) > 1:
            raise CannotSearchError(f"TUNABLES names {name} {names.count(name)} times")
    return tunables


def _tunable(key: ast.expr | None, values: ast.expr) -> Tunable:
    name = key.value if isinstance(key, ast.Constant) else None
    if not isinstance(name, str) or not name.isidentifier():
        raise CannotSearchError(f"a key of TUNABLES is not the name of a constant: {ast.unparse(key) if key else '**'}")
    if not isinstance(values, ast.Tuple | ast.List) or not values.elts:
        raise CannotSearchError(f"TUNABLES[{name!r}] must be a tuple with at least one value")
    texts = tuple(_literal(value, f"TUNABLES[{name!r}]") for value in values.elts)
    if len(set(texts)) < len(texts):
        raise CannotSearchError(f"TUNABLES[{name!r}] lists a value twice: ({', '.join(texts)})")
    return Tunable(name=name, values=texts)


def present_values(source: bytes, tunables: Sequence[Tunable]) -> Combination:
    """The value of each tunable's constant in ``source``. Raises CannotSearchError unless each is an allowed one."""
    tree = _parse(source)
    return tuple(_present_value(tree, tunable) for tunable in tunables)


def _present_value(tree: ast.Module, tunable: Tunable) -> str:
    name = tunable.name
    missing = f"TUNABLES names {name}, but kernel.py has no module-level constant {name}"
    text = _literal(_constant(tree, name, missing=missing), name)
    if text not in tunable.values:
        raise CannotSearchError(f"{name} = {text} is not among its TUNABLES values ({', '.join(tunable.values)})")
    return text


def rewrite(source: bytes, values: Mapping[str, str]) -> bytes:
    """``source`` with each named module-level constant set to the given expression, every other byte as it was.

    Raises CannotSearchError if LibCST cannot parse ``source`` or would lose some of it.
    """
    try:
        module = cst.parse_module(source)
    except cst.ParserSyntaxError as error:
        raise CannotSearchError(f"LibCST cannot parse kernel.py: {error}") from error
    if module.bytes != source:
        raise CannotSearchError("kernel.py has characters that LibCST would lose, perhaps a form feed: remove them")
    return module.visit(_Rewriter(values)).bytes


def body_hash(source: bytes, tunables: Sequence[Tunable]) -> str:
    """SHA-256 of kernel.py without the values of ``tunables``; equal while a search changes nothing else."""
    return hashlib.sha256(rewrite(source, {tunable.name: "..." for tunable in tunables})).hexdigest()


def _parse(source: bytes) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the kernel's style is not this program's business
            return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise CannotSearchError(f"kernel.py cannot be parsed: {error}") from error


def _literal(node: ast.expr, what: str) -> str:
    """The canonical source of a literal. Raises CannotSearchError for an expression, nan or an infinity."""
    try:
        text = repr(ast.literal_eval(node))
        ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError) as error:
        raise CannotSearchError(f"{what}: {ast.unparse(node)} is not a finite literal") from error
    return text


def _constant(tree: ast.Module, name: str, *, missing: str) -> ast.expr:
    """The value of the statement ``name = value``, if that is the only thing in the module that binds ``name``."""
    lines = sorted(getattr(node, "lineno", 0) for node in ast.walk(tree) if _binds(node, name))
    if not lines:
        raise CannotSearchError(missing)
    if len(lines) > 1:
        raise CannotSearchError(f"kernel.py binds {name} {len(lines)} times (lines {lines}), it must be once")
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                return value
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value) if target == name:
                return value
    raise CannotSearchError(f"kernel.py line {lines[0]}: {name} must be a plain module-level {name} = value")


def _binds(node: ast.AST, name: str) -> bool:
    """Whether ``node`` binds ``name``; in a function too, where it would only confuse."""
    match node:
        case ast.Name(id=bound, ctx=ast.Store() | ast.Del()):
            return bound == name
        case ast.FunctionDef(name=bound) | ast.AsyncFunctionDef(name=bound) | ast.ClassDef(name=bound):
            return bound == name
        case ast.alias(name=imported, asname=bound):
            return (bound or imported.split(".")[0]) == name
        case ast.Global(names=names):
            return name in names
    return False


class _Rewriter(cst.CSTTransformer):
    def __init__(self, values: Mapping[str, str]) -> None:
        super().__init__()
        self._values = values

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:
        return False  # nothing in there, and most of the file

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        return updated_node.with_changes(value=self._new(updated_node.targets[0].target, updated_node.value))

    def leave_AnnAssign(self, original_node: cst.AnnAssign, updated_node: cst.AnnAssign) -> cst.AnnAssign:
        return updated_node.with_changes(value=self._new(updated_node.target, updated_node.value))

    def _new(self, target: cst.BaseExpression, value: cst.BaseExpression | None) -> cst.BaseExpression | None:
        if value is None or not isinstance(target, cst.Name) or target.value not in self._values:
            return value
        # Parentheses stay: comments may stand inside them.
        new = cst.parse_expression(self._values[target.value])
        return new.with_changes(lpar=[*value.lpar, *new.lpar], rpar=[*new.rpar, *value.rpar])
