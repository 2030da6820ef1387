"""results.tsv: append-only, one row an experiment, each row chained to the one before by its hash.

Columns are tab-separated with a header; an empty cell is a figure that does not exist. Text is escaped (`\\t`, `\\n`,
`\\"`, `\\\\`, `\\xNN`, `\\uNNNN`), so that `pandas.read_csv(path, sep="\\t")` and line tools read it alike. Whatever
does not fit is an error with the line number; a bad ledger is never written to.

`frame` is the ledger as a typed DataFrame, for everyone who only reads. A row is appended in place, so a kill may leave
a torn last line, one without its line end: whoever runs the next experiment sets it aside.
"""

import csv
import hashlib
import io
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from judge.decide import PASS, STATUSES

if TYPE_CHECKING:
    import pandas

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
_TYPES = {field.name: field.type.__name__ if isinstance(field.type, type) else str(field.type) for field in fields(Row)}
HEADER = "\t".join(COLUMNS)
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", '"': '\\"'}
_UNESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|(.))")
_HASH = re.compile(r"^[0-9a-f]{64}$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


# Control characters, what has a meaning to a table reader, lone surrogates, and what moves or hides text on a screen:
# separators, joiners, direction marks, the BOM.
_SPECIAL = re.compile('[\x00-\x1f\x7f-\x9f\\\\"\ud800-\udfff\u2028\u2029\ufeff\u200b-\u200f\u202a-\u202e\u2066-\u2069]')


def escape(text: str) -> str:
    """Text on one line, in one cell, with nothing that a terminal or a table reader would act on."""

    def replace(match: re.Match[str]) -> str:
        code = ord(match[0])
        return _ESCAPES.get(match[0]) or (f"\\x{code:02x}" if code < 0xA0 else f"\\u{code:04x}")

    return _SPECIAL.sub(replace, text)


def unescape(text: str) -> str:
    """Inverse of escape."""
    if "\\" not in text:
        return text
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
    return f"{body}\t{_chained(previous_sha256, body)}\n"


def parse(text: str, name: str = "results.tsv") -> list[Row]:
    """Every row, checked: columns, types, numbering, hash chain. Raises LedgerError with the line number."""
    return list(_verified(io.BytesIO(text.encode(errors="surrogatepass")), name))


def read(path: Path) -> list[Row]:
    """The rows of the ledger at `path`, checked; none where there is no file. Raises LedgerError."""
    return [row for row, _ in located(path)]


def located(path: Path) -> Iterator[tuple[Row, int]]:
    """Each row, checked, with its line's offset, one at a time. Raises LedgerError."""
    if not path.exists():
        return
    with path.open("rb") as file:
        offset = len(HEADER.encode()) + 1
        for row in _verified(file, path.name):
            yield row, offset
            offset = file.tell()


def _verified(lines: IO[bytes], name: str) -> Iterator[Row]:
    header = lines.readline()
    if header and header != f"{HEADER}\n".encode():
        raise LedgerError(f"{name}:1: not the header that the judge writes; restore the file from git")
    previous, number = GENESIS, 0
    while data := lines.readline():
        number += 1
        where = f"{name}:{number + 1}"
        if not data.endswith(b"\n"):
            raise LedgerError(f"{where}: the last line is cut off; restore the file from git")
        try:
            line = data[:-1].decode()
        except UnicodeDecodeError:
            raise LedgerError(f"{where}: not UTF-8; restore the file from git") from None
        row = parse_row(line, where)
        if row.row_sha256 != _chained(previous, line[: -len(row.row_sha256) - 1]):
            raise LedgerError(
                f"{where}: the row's hash does not follow from it and the row before: one was edited, or "
                "a row between them is missing; restore the file from git"
            )
        if row.number != number:
            raise LedgerError(f"{where}: row number {row.number} where {number} was expected")
        yield row
        previous = row.row_sha256


def _chained(previous_sha256: str, body: str) -> str:
    return hashlib.sha256(f"{previous_sha256}\t{body}".encode()).hexdigest()


def parse_row(line: str, where: str) -> Row:
    """One line's row, without its place in the chain. Raises LedgerError."""
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


def frame(path: Path) -> "pandas.DataFrame":
    """The ledger at `path` as a DataFrame, a row an experiment: float64 figures, NaN where there is none; `number` and
    `lineage` int64; the counts Int64; `status`, `regime`, `chip` and `mode` categories; text unescaped. Reads whole
    lines only, so a row that is just being written is not there yet, and does not verify the chain: `read` does.

    Raises LedgerError where the file is not a ledger.
    """
    import pandas

    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1] or f"{HEADER}\n".encode()
    if whole[: whole.index(b"\n")] != HEADER.encode():
        raise LedgerError(f"{path.name}:1: not the header that the judge writes; restore the file from git")
    options: Any = {"dtype": _dtypes(), "keep_default_na": False, "na_values": _NO_FIGURE, "quoting": csv.QUOTE_NONE}
    try:
        table = pandas.read_csv(io.BytesIO(whole), sep="\t", **options)
    except (ValueError, UnicodeDecodeError) as error:
        raise LedgerError(f"{path.name}: {error}; restore the file from git") from None
    for name in ("note", "reason", "workloads"):
        table[name] = table[name].map(unescape).astype(object)
    return table


_CATEGORIES = ("status", "regime", "chip", "mode")
_NO_FIGURE = {name: [""] for name, kind in _TYPES.items() if "None" in kind}


def _dtypes() -> dict[str, str]:
    kinds = {"int": "int64", "int | None": "Int64", "float | None": "float64", "str": "object"}
    return {name: "category" if name in _CATEGORIES else kinds[kind] for name, kind in _TYPES.items()}


def next_line(row: Row, previous_sha256: str) -> str:
    """The line to append after the row with that hash. Raises LedgerError for a row that could not be read back."""
    line = format_row(row, previous_sha256)
    parse_row(line[:-1], f"row {row.number}")
    return line


def append(path: Path, line: str) -> int:
    """Appends a line durably, the header first where there is no ledger yet; returns the line's offset."""
    with path.open("ab", buffering=0) as file:
        start = file.tell()
        header = "" if start else f"{HEADER}\n"
        try:
            _write_all(file, (header + line).encode())
            os.fsync(file.fileno())
        except OSError:
            file.truncate(start)
            raise
    return start + len(header)


def _write_all(file: io.FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def torn_tail(path: Path) -> bytes:
    """What follows the last line end: nothing, where every line is whole. Reads the end of the file only."""
    tail = b""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        while position and b"\n" not in tail:
            start = max(0, position - (1 << 16))
            file.seek(start)
            tail = file.read(position - start) + tail
            position = start
    return tail[tail.rfind(b"\n") + 1 :]


def write_durably(path: Path, data: bytes) -> None:
    """Replaces the file as a whole: a reader sees the old content or the new, and so does one after a power cut.

    The file keeps its permissions.
    """
    partial = path.with_name(f".{path.name}.part")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        partial.chmod(path.stat().st_mode)
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def kept(rows: Iterable[Row], lineage: int | None) -> list[Row]:
    """The lineage's kept rows: the first is its baseline and seals the problem, the last is the champion."""
    return [row for row in rows if row.lineage == lineage and row.status == PASS]
