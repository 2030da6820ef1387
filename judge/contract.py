"""What a kernel file must define, and what an experiment may not change.

Seven symbols make a file valid: KERNEL_NAME, PROBLEM_DESCRIPTION, kernel_fn, reference_fn, generate_inputs(key),
compute_flops(), get_tiling_meta(). Optional ones refine the problem:

  WORKLOADS   name → keyword arguments of generate_inputs, compute_flops, compute_bytes and get_tiling_meta
  CHECKS      name → changes to a workload's arguments that keep every shape: cheap, nasty inputs for correctness
  TOLERANCE   a number, {"rtol": …, "atol": …}, or one of these an output; 0 means equal to the bit
  compute_bytes()  HBM bytes that any kernel must move
  TUNABLES    name → allowed values of a module-level constant

This module reads the file as text. Nothing here runs it.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

REQUIRED = (
    "KERNEL_NAME",
    "PROBLEM_DESCRIPTION",
    "kernel_fn",
    "reference_fn",
    "generate_inputs",
    "compute_flops",
    "get_tiling_meta",
)
SEALED = ("reference_fn", "generate_inputs", "compute_flops", "compute_bytes", "WORKLOADS", "CHECKS", "TOLERANCE")
MAX_SOURCE_BYTES = 1 << 20


class ContractError(Exception):
    """The file does not follow the contract: FAIL_CONTRACT, with what to do."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A kernel file that parses and defines the required symbols."""

    text: str
    name: str  # for messages
    definitions: dict[str, str]  # top-level name → its definition, without layout and comments


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
        definitions = _definitions(ast.parse(text, filename=name))
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
    return Source(text=text, name=name, definitions=definitions)


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
            'a new lineage on the new problem with ./ratchet.sh --new-baseline "why"'
        )
