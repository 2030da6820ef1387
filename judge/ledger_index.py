"""Lookups in the ledger that do not read it whole: an index in .ratchet/, which is a cache and never the truth.

It is used while the ledger's file and its blob in the branch are those that it was built from (inode, size and both
times of the file, as git does for its own index), and every row that it finds is read from the ledger itself. In any
other case the ledger is read and verified from its first line, and the index built anew. The audit does not use it.
"""

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from judge import ledger
from judge.decide import PASS

_LAYOUT = """
CREATE TABLE state (ledger TEXT, count INTEGER, sha256 TEXT);
CREATE TABLE row (
    number INTEGER PRIMARY KEY, offset INTEGER, lineage INTEGER, chip TEXT, mode TEXT, status TEXT, program TEXT
);
"""
_LOOKUPS = {
    "by_place": "chip, mode, status, lineage",
    "by_lineage": "lineage, status, number",
    "by_status": "status, lineage, number",
    "by_program": "program, lineage, number",
}


class LedgerIndex:
    """The ledger at `path`, whose blob in the branch is `blob`; every lookup is O(log rows)."""

    def __init__(self, path: Path, cache: Path, blob: str) -> None:
        self.path = path
        self._cache = cache
        self._blob = blob
        self._database = self._open()
        self.count, self.last_sha256 = 0, ledger.GENESIS
        self._signature = ""
        self.is_current = self._load()

    def _open(self) -> sqlite3.Connection:
        try:
            database = sqlite3.connect(self._cache)
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error:
            self._remove()
            database = sqlite3.connect(":memory:")  # a folder that cannot be written to costs time, not the lookup
        return database

    def _remove(self) -> None:
        for suffix in ("", "-journal"):
            Path(f"{self._cache}{suffix}").unlink(missing_ok=True)

    def _load(self) -> bool:
        try:
            found = self._database.execute("SELECT ledger, count, sha256 FROM state").fetchone()
        except sqlite3.Error:
            return False
        if found is None or found[0] != signature(self.path, self._blob):
            return False
        self._signature, self.count, self.last_sha256 = found
        try:
            return self.count == 0 or self._last_line_is_known()
        except ledger.LedgerError:
            return False

    def _last_line_is_known(self) -> bool:
        end = self._offset(self.count) + len(self._line(self.count)) + 1
        return self.row(self.count).row_sha256 == self.last_sha256 and end == self.path.stat().st_size

    def rebuild(self) -> None:
        """Makes the index anew from the ledger, read and verified from its first line. Raises LedgerError."""
        try:
            self._fill()
        except sqlite3.Error:
            if self._in_memory():
                raise
            self._database.close()
            self._remove()
            self._database = sqlite3.connect(":memory:")
            self._fill()
        self.is_current = True

    def _fill(self) -> None:
        self._start_anew()
        self.count, self.last_sha256 = 0, ledger.GENESIS
        with self._database:
            for row, offset in ledger.located(self.path):
                self._insert(row, offset)
                self.count, self.last_sha256 = row.number, row.row_sha256
            for name, columns in _LOOKUPS.items():  # after the rows: sorting once is faster
                self._database.execute(f"CREATE INDEX {name} ON row ({columns})")
            self._seal()

    def _in_memory(self) -> bool:
        return self._database.execute("PRAGMA database_list").fetchone()[2] == ""

    def _start_anew(self) -> None:
        if not self._in_memory():
            self._database.close()
            self._remove()
            self._database = sqlite3.connect(self._cache)
        self._database.executescript(_LAYOUT)

    def _insert(self, row: ledger.Row, offset: int) -> None:
        values = (row.number, offset, row.lineage, row.chip, row.mode, row.status, row.artifact_sha256[:16])
        self._database.execute("INSERT INTO row VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def _seal(self) -> None:
        self._database.execute("DELETE FROM state")
        self._signature = signature(self.path, self._blob)
        values = (self._signature, self.count, self.last_sha256)
        self._database.execute("INSERT INTO state VALUES (?, ?, ?)", values)

    def add(self, row: ledger.Row, offset: int, blob: str) -> None:
        """Takes in a row that was appended at `offset`, with the blob that now has it. A failure costs a rebuild."""
        self._blob, self.count, self.last_sha256 = blob, row.number, row.row_sha256
        try:
            with self._database:
                self._insert(row, offset)
                self._seal()
        except sqlite3.Error:
            self.close()
            self._remove()

    def is_at(self, blob: str) -> bool:
        """Whether the file is still as it was taken in, with that blob."""
        return self._signature == signature(self.path, blob)

    def close(self) -> None:
        self._database.close()

    # --- lookups ---

    def row(self, number: int) -> ledger.Row:
        """Raises LedgerError where the ledger does not have that row where the index says."""
        row = ledger.parse_row(self._line(number).decode(errors="replace"), f"{self.path.name}: row {number}")
        if row.number != number:
            raise ledger.LedgerError(f"{self.path.name}: row {number} is not where it was; remove {self._cache}")
        return row

    def _offset(self, number: int) -> int:
        found = self._one("SELECT offset FROM row WHERE number = ?", number)
        if found is None:
            raise ledger.LedgerError(f"{self.path.name}: no row {number} is known; remove {self._cache}")
        return found

    def _line(self, number: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self._offset(number))
            return file.readline().removesuffix(b"\n")

    def _one(self, query: str, *values: object) -> int | None:
        found = self._database.execute(query, values).fetchone()
        return None if found is None else found[0]

    def _row(self, number: int | None) -> ledger.Row | None:
        return None if number is None else self.row(number)

    def newest_lineage(self, chip: str, mode: str) -> int | None:
        """The newest one on this chip in this mode that has a baseline; where none has, the newest."""
        query = "SELECT max(lineage) FROM row WHERE chip = ? AND mode = ?"
        based = self._one(f"{query} AND status = ?", chip, mode, PASS)
        return self._one(query, chip, mode) if based is None else based

    @property
    def last_lineage(self) -> int:
        """The highest lineage number in use; 0 where there is none."""
        return self._one("SELECT max(lineage) FROM row") or 0

    @property
    def newest_based_lineage(self) -> int | None:
        """The newest lineage of any chip and mode that has a baseline."""
        return self._one("SELECT max(lineage) FROM row WHERE status = ?", PASS)

    def baseline(self, lineage: int | None) -> ledger.Row | None:
        """The lineage's first kept row, which seals the problem."""
        return self._row(self._one("SELECT min(number) FROM row WHERE lineage = ? AND status = ?", lineage, PASS))

    def champion(self, lineage: int | None) -> ledger.Row | None:
        """The lineage's last kept row: the best so far."""
        return self._row(self._one("SELECT max(number) FROM row WHERE lineage = ? AND status = ?", lineage, PASS))

    def with_program(self, lineage: int, program_sha256: str) -> Iterator[ledger.Row]:
        """The lineage's rows of a compiled program, newest first."""
        query = "SELECT number FROM row WHERE program = ? AND lineage = ? ORDER BY number DESC"
        for (number,) in self._database.execute(query, (program_sha256[:16], lineage)):
            row = self.row(number)
            if row.artifact_sha256 == program_sha256:
                yield row


def signature(path: Path, blob: str) -> str:
    """What changes whenever the ledger's file or its blob in the branch does."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return f"none {blob}"
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {blob}"
