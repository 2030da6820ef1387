"""Where an experiment stands: .ratchet/journal.json, replaced as a whole before each step, gone when all is done.

Of several that are judged at the same time each has one, journal-1.json and so on; journal.json then names them all.

prepared    the attempt is known, and nothing leads to it yet
committed   the attempt is a commit, and is being judged
judged      the ledger's row is known; it, its commit and the branch may be on their way
recorded    the branch has the row; the files are brought into line with it: kept, or reset
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from judge.ledger import sync_folder, write_durably

JOURNALS = "journal*.json"
STATES = ("prepared", "committed", "judged", "recorded")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """All that recovery needs to know."""

    state: str
    what: str  # experiment, archive, prune, unpack, candidates
    branch: str
    parent: str  # the branch's commit when it began
    number: int = 0
    lineage: int = 0
    chip: str = ""
    mode: str = ""
    note: str = ""
    judge_sha256: str = ""
    keeps_edit: bool = False  # a failed baseline leaves kernel.py alone
    commit: str = ""  # the attempt
    unchanged: bool = False  # the attempt is the branch's own kernel.py
    ref: str = ""  # made for this attempt
    folder: str = ""  # the judging's private one
    row: str = ""  # the ledger's line
    files: tuple[tuple[str, str], ...] = ()  # (name, blob) to commit: the archive's; or of candidates
    message: str = ""
    head: str = ""  # what the branch moves to


class Journal:
    """The file. `entry` is None where nothing is under way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entry: Entry | None = None

    def load(self) -> bool:
        """Reads the file; False where it is there and cannot be read."""
        try:
            fields = json.loads(self.path.read_bytes())
            fields["files"] = tuple((str(name), str(blob)) for name, blob in fields["files"])
            entry = Entry(**fields)
        except FileNotFoundError:
            return True
        except (ValueError, TypeError, KeyError):
            return False
        self.entry = entry
        return entry.state in STATES

    def write(self, entry: Entry) -> None:
        write_durably(self.path, json.dumps(asdict(entry)).encode())
        self.entry = entry

    def advance(self, **changes: object) -> Entry:
        """Replaces fields, durably."""
        assert self.entry is not None
        entry = replace(self.entry, **changes)  # type: ignore[arg-type]
        self.write(entry)
        return entry

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
        sync_folder(self.path.parent)
        self.entry = None
