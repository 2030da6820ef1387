"""What a kernel file must define, and what an experiment may not change.

Seven symbols make a file valid: KERNEL_NAME, PROBLEM_DESCRIPTION, kernel_fn, reference_fn, generate_inputs(key),
compute_flops(), get_tiling_meta(). Optional ones refine the problem:

  WORKLOADS   name → keyword arguments of generate_inputs, compute_flops, compute_bytes and get_tiling_meta
  CHECKS      name → changes to a workload's arguments that keep every shape: cheap, nasty inputs for correctness
  TOLERANCE   a number, {"rtol": …, "atol": …}, or one of these an output; 0 means equal to the bit
  compute_bytes()  HBM bytes that any kernel must move
  TUNABLES    name → allowed values of a module-level constant
  NEEDS       what a baseline asks for beyond judge/policy.py: modules to import, "no pallas" for a plain XLA program

This module reads the file as text. Nothing here runs it.
"""

import ast
import difflib
from dataclasses import dataclass
from pathlib import Path

from judge import policy

REQUIRED = (
    "KERNEL_NAME",
    "PROBLEM_DESCRIPTION",
    "kernel_fn",
    "reference_fn",
    "generate_inputs",
    "compute_flops",
    "get_tiling_meta",
)
SEALED = (
    *("reference_fn", "generate_inputs", "compute_flops", "compute_bytes"),
    *("WORKLOADS", "CHECKS", "TOLERANCE", policy.NEEDS),
)
MAX_SOURCE_BYTES = 1 << 20
MAX_DIFF_LINES = 12
MAX_VIOLATIONS = 3  # that a message names


class ContractError(Exception):
    """The file does not follow the contract: FAIL_CONTRACT, with what to do."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A kernel file that parses and defines the required symbols."""

    text: str
    name: str  # for messages
    definitions: dict[str, str]  # top-level name → its definition, without layout and comments
    needs: tuple[str, ...]  # NEEDS


def read_source(path: Path) -> Source:
    """Reads and checks a kernel file. Raises ContractError."""
    try:
        if path.exists() and not path.is_file():
            raise ContractError(f"{path}: not a file")
        with path.open("rb") as file:
            data = file.read(MAX_SOURCE_BYTES + 1)
    except FileNotFoundError:
        raise ContractError(f"{path}: no such file; the kernel to judge lives there") from None
    except OSError as error:
        raise ContractError(f"{path}: cannot be read: {error.strerror}") from None
    return check_source(data, path.name)


def check_source(data: bytes, name: str) -> Source:
    """Parses a kernel file's bytes. Raises ContractError that names line and symbol."""
    if len(data) > MAX_SOURCE_BYTES:
        raise ContractError(f"{name}: too large; a kernel file has at most {MAX_SOURCE_BYTES} bytes")
    try:
        text = data.decode()
        tree = ast.parse(text, filename=name)
        definitions, needs = _definitions(tree), policy.needs_of(tree)
    except SyntaxError as error:
        line = "" if error.lineno is None else f":{error.lineno}"
        raise ContractError(f"{name}{line}: syntax error: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ContractError(f"{name}: not Python source: {error or 'too deeply nested'}") from None
    missing = [symbol for symbol in REQUIRED if symbol not in definitions]
    if missing:
        raise ContractError(
            f"{name}: missing {', '.join(missing)}; a kernel file defines {', '.join(REQUIRED)} at its top level"
        )
    return Source(text=text, name=name, definitions=definitions, needs=needs)


def _definitions(tree: ast.Module) -> dict[str, str]:
    """Top-level name → dump of everything that defines it; imports count as definitions."""
    found: dict[str, str] = {}

    def add(name: str, node: ast.AST) -> None:
        found[name] = found.get(name, "") + ast.dump(node)

    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            add(node.name, node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                add(alias.asname or alias.name.split(".")[0], node)
        else:
            for child in ast.walk(node):
                if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                    add(child.id, node)
    return found


def changed_symbols(candidate: Source, sealed: Source) -> list[str]:
    """Sealed symbols that the candidate defines otherwise than the lineage's baseline."""
    return [name for name in SEALED if candidate.definitions.get(name) != sealed.definitions.get(name)]


def check_seal(candidate: Source, sealed: Source) -> None:
    """Raises ContractError where the candidate changes the problem instead of the kernel."""
    changed = changed_symbols(candidate, sealed)
    if changed:
        raise ContractError(
            f"{candidate.name} changes {', '.join(changed)}, which the lineage's baseline seals: put it back, or start "
            'a new lineage on the new problem with ./ratchet.sh --new-baseline "why"\n'
            + "\n".join(seal_diff(candidate, sealed, changed))
        )


def seal_diff(candidate: Source, sealed: Source, changed: list[str]) -> list[str]:
    """What differs in those symbols, as a unified diff, layout and comments aside; at most MAX_DIFF_LINES lines."""
    lines: list[str] = []
    for name in changed:
        before, after = (_readable(source, name) for source in (sealed, candidate))
        lines += difflib.unified_diff(before, after, f"sealed {name}", f"{candidate.name} {name}", n=0, lineterm="")
    cut = len(lines) - MAX_DIFF_LINES
    return [line[:200] for line in lines[:MAX_DIFF_LINES]] + ([f"… and {cut} more lines"] if cut > 0 else [])


def _readable(source: Source, symbol: str) -> list[str]:
    """Every top-level statement that defines the symbol, written out anew."""
    tree = ast.parse(source.text)
    defining = (node for node in tree.body if symbol in _definitions(ast.Module(body=[node], type_ignores=[])))
    return [line for node in defining for line in ast.unparse(node).splitlines()]


def check_policy(candidate: Source, sealed: Source) -> None:
    """Raises ContractError with line and rule where the file says what it may not (judge/policy.py)."""
    try:
        found = policy.violations(ast.parse(candidate.text), sealed.needs)
    except RecursionError:
        raise ContractError(f"{candidate.name}: too deeply nested") from None
    if found:
        told = [f"{candidate.name}:{violation.line}: {violation.rule}" for violation in found[:MAX_VIOLATIONS]]
        rest = f"; and {len(found) - MAX_VIOLATIONS} more" if len(found) > MAX_VIOLATIONS else ""
        raise ContractError("; ".join(told) + rest)
