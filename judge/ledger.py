"""results.tsv: append-only, one row an experiment, each row chained to the one before by its hash.

Columns are tab-separated with a header; an empty cell is a figure that does not exist. Text is escaped (`\\t`, `\\n`,
`\\"`, `\\\\`, `\\xNN`, `\\uNNNN`), so that `pandas.read_csv(path, sep="\\t")` and line tools read it alike. Whatever
does not fit is an error with the line number; a bad ledger is never written to.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from judge.decide import PASS, STATUSES

GENESIS = "0" * 64


class LedgerError(Exception):
    """results.tsv is not what the judge wrote; the message names the line."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One experiment. The order of the fields is that of the columns; the first nine are the article's."""

    commit: str
    score: float | None
    status: str
    median_ms: float | None  # geometric mean over the workloads; predicted in model mode
    util_pct: float | None
    tflops: float | None
    regime: str
    bw_util_pct: float | None
    note: str
    number: int
    lineage: int
    chip: str
    mode: str
    mfu_pct: float | None
    mbu_pct: float | None
    workloads: str  # name:median_ms:util_pct:mfu_pct:mbu_pct, joined by ;
    vmem_mib: float | None
    spill_count: int | None
    copy_count: int | None
    seconds: float | None
    parent_commit: str
    artifact_sha256: str
    judge_sha256: str
    reason: str
    row_sha256: str = ""

    @property
    def workload_ms(self) -> dict[str, float]:
        """Each workload's time in milliseconds."""
        parts = (entry.split(":") for entry in self.workloads.split(";") if entry)
        return {part[0]: float(part[1]) for part in parts}


COLUMNS = tuple(field.name for field in fields(Row))
_TYPES = {field.name: str(field.type) for field in fields(Row)}
HEADER = "\t".join(COLUMNS)
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", '"': '\\"'}
_UNESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|(.))")
_HASH = re.compile(r"^[0-9a-f]{64}$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


# Lone surrogates, and what moves or hides text on a screen: separators, joiners, direction marks, the BOM.
_HIDDEN = re.compile("[\ud800-\udfff\u2028\u2029\ufeff\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


def escape(text: str) -> str:
    """Text on one line, in one cell, with nothing that a terminal or a table reader would act on."""
    out = []
    for character in text:
        code = ord(character)
        if character in _ESCAPES:
            out.append(_ESCAPES[character])
        elif code < 0x20 or 0x7F <= code < 0xA0:
            out.append(f"\\x{code:02x}")
        else:
            out.append(f"\\u{code:04x}" if _HIDDEN.match(character) else character)
    return "".join(out)


def unescape(text: str) -> str:
    """Inverse of escape."""
    plain = {"t": "\t", "n": "\n", "r": "\r"}

    def replace(match: re.Match[str]) -> str:
        code = match[1] or match[2]
        return chr(int(code, 16)) if code else plain.get(match[3], match[3])

    return _UNESCAPE.sub(replace, text)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.9g}" if isinstance(value, float) else escape(str(value))


def format_row(row: Row, previous_sha256: str) -> str:
    """The row's line: row_sha256 is SHA-256 of the previous row's hash and this row's other cells."""
    cells = [_cell(getattr(row, name)) for name in COLUMNS[:-1]]
    body = "\t".join(cells)
    return body + "\t" + hashlib.sha256(f"{previous_sha256}\t{body}".encode()).hexdigest() + "\n"


def parse(text: str, name: str = "results.tsv") -> list[Row]:
    """Every row, checked: columns, types, numbering, hash chain. Raises LedgerError with the line number."""
    if not text:
        return []
    lines = text.split("\n")
    if lines[0] != HEADER:
        raise LedgerError(f"{name}:1: not the header that the judge writes; restore the file from git")
    if lines.pop() != "":
        raise LedgerError(f"{name}:{len(lines) + 1}: the last line is cut off; restore the file from git")
    rows: list[Row] = []
    previous = GENESIS
    for number, line in enumerate(lines[1:], 2):
        row = _parse_row(line, f"{name}:{number}")
        expected = format_row(row, previous)
        if expected != line + "\n":
            raise LedgerError(
                f"{name}:{number}: the row's hash does not follow from it and the row before: one was edited, or "
                "a row between them is missing; restore the file from git"
            )
        if row.number != len(rows) + 1:
            raise LedgerError(f"{name}:{number}: row number {row.number} where {len(rows) + 1} was expected")
        rows.append(row)
        previous = row.row_sha256
    return rows


def _parse_row(line: str, where: str) -> Row:
    cells = line.split("\t")
    if len(cells) != len(COLUMNS):
        raise LedgerError(f"{where}: {len(cells)} cells where {len(COLUMNS)} were expected; restore the file from git")
    values: dict[str, object] = {}
    for column, cell in zip(COLUMNS, cells, strict=True):
        kind = _TYPES[column]
        if "str" in kind:
            values[column] = unescape(cell)
            continue
        try:
            value = None if cell == "" and "None" in kind else (int(cell) if "int" in kind else float(cell))
        except ValueError:
            raise LedgerError(f"{where}: {column} is {cell!r}, not a number; restore the file from git") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise LedgerError(f"{where}: {column} is {cell!r}, not finite; restore the file from git")
        values[column] = value
    row = Row(**values)  # type: ignore[arg-type]
    if row.status not in STATUSES:
        raise LedgerError(f"{where}: unknown status {row.status!r}; restore the file from git")
    if not _COMMIT.match(row.commit) or not _HASH.match(row.row_sha256):
        raise LedgerError(f"{where}: commit or row_sha256 is not a hash; restore the file from git")
    return row


def read(path: Path) -> list[Row]:
    """The rows of the ledger at `path`; none where there is no file. Raises LedgerError."""
    try:
        return parse(path.read_bytes().decode(), path.name)
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise LedgerError(f"{path.name}:{line}: not UTF-8; restore the file from git") from None


def appended(text: str, row: Row) -> str:
    """The ledger's text with `row` added: header first where there is none. Raises LedgerError for either."""
    rows = parse(text)
    previous = rows[-1].row_sha256 if rows else GENESIS
    result = (text or HEADER + "\n") + format_row(row, previous)
    parse(result)  # a row that cannot be read back would lock the ledger
    return result


def write(path: Path, text: str) -> None:
    """Replaces the file as a whole, durably: a reader sees the old text or the new."""
    partial = path.with_name(f".{path.name}.part")
    with partial.open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def lineage_of(rows: Iterable[Row], chip: str, mode: str) -> int | None:
    """The newest lineage on this chip in this mode."""
    return max((row.lineage for row in rows if (row.chip, row.mode) == (chip, mode)), default=None)


def kept(rows: Iterable[Row], lineage: int | None) -> list[Row]:
    """The lineage's kept rows: the first is its baseline and seals the problem, the last is the champion."""
    return [row for row in rows if row.lineage == lineage and row.status == PASS]
