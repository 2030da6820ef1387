"""`prepare.py --explain`: which kernel to explain, against which champion, and the report of it."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from judge import contract, decide, ledger, pipeline
from judge.archive import unpack
from judge.chips import Chip
from judge.explain_text import WIDTH, render
from judge.explanation import Explanation, changes, explain
from judge.lock import Refused
from judge.repository import KERNEL, LEDGER, Repository
from judge.transaction import Transaction


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What to explain, held to the problem `sealed`, and what to compare it with."""

    name: str
    source: contract.Source
    sealed: contract.Source
    champion_name: str = ""
    champion: contract.Source | None = None
    note: str = ""  # why nothing is compared


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is printed: `workloads` is empty where the candidate did not get as far as cycles."""

    subject: Subject
    chip: str
    status: str
    reason: str = ""
    note: str = ""
    workloads: dict[str, Explanation] = field(default_factory=dict)
    champion: dict[str, Explanation] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report on a screen."""
        title = f"{self.subject.name} on {self.chip} (predicted)"
        if self.champion:
            title += f", against {self.subject.champion_name}"
        text = [ledger.escape(title)]
        text += [f"note: {ledger.escape(self.note)}"] if self.note else []
        if not self.workloads:
            return [*text, f"status: {self.status}", f"reason: {ledger.escape(self.reason)}"]
        for name, one in self.workloads.items():
            shown = map(ledger.escape, render(name, one, self.champion.get(name)))
            text += [line.replace('\\"', '"') for line in shown]  # quotes of source lines harm no screen
        return text

    def as_json(self) -> str:
        """One object on one line."""
        compared = {
            name: {figure: {"champion": pair[0], "candidate": pair[1]} for figure, pair in changes(one, before).items()}
            for name, one in self.workloads.items()
            if (before := self.champion.get(name)) is not None
        }
        found: dict[str, Any] = {
            "status": self.status,
            "mode": "model",
            "chip": self.chip,
            "subject": self.subject.name,
        }
        found |= {"reason": self.reason} if self.reason else {}
        found |= {"note": self.note} if self.note else {}
        found["champion"] = self.subject.champion_name if self.champion else None
        found["workloads"] = {name: asdict(one) for name, one in self.workloads.items()}
        return json.dumps(found | {"changes": compared})


def last_experiment(folder: Path, chip: str) -> Subject:
    """The newest row on this chip in model mode, against the champion that it met. Raises Refused or LedgerError."""
    repository = Repository(folder)
    rows = ledger.read(folder / LEDGER)
    row = next((row for row in reversed(rows) if (row.chip, row.mode) == (chip, "model")), None)
    if row is None:
        raise Refused(f"{LEDGER} has no experiment in model mode on {chip}: run ./ratchet.sh first, or name a --kernel")
    if not repository.has_commit(row.commit):
        with repository.exclusive("explain"):
            unpack(Transaction(repository))
    before = [other for other in ledger.kept(rows, row.lineage) if other.number < row.number]
    champion = next((other for other in reversed(before) if other.commit != row.commit), None)
    data = repository.file_at(row.commit, KERNEL)
    if data is None:
        raise Refused(f"the commit of row {row.number}, {row.commit}, is not here: name a --kernel")
    source = contract.check_source(data, f"{KERNEL} of {row.commit[:12]}")
    return Subject(
        name=f"experiment {row.number} ({row.commit[:12]}, {row.status}): {row.note}"[:WIDTH],
        source=source,
        sealed=repository.source_at(before[0].commit) if before else source,
        champion_name=f"row {champion.number} ({champion.commit[:12]})" if champion else "",
        champion=repository.source_at(champion.commit) if champion else None,
        note="" if champion else "no other champion before it: nothing to compare with",
    )


def kernel_file(folder: Path, path: Path, chip: str) -> Subject:
    """The file at `path`, against the newest champion of the same problem on this chip. Raises ContractError."""
    source = contract.read_source(path)
    alone = Subject(name=str(path), source=source, sealed=source)
    try:
        repository, rows = Repository(folder), ledger.read(folder / LEDGER)
        newest = max((row.lineage for row in rows if (row.chip, row.mode) == (chip, "model")), default=None)
        row = next(reversed(ledger.kept(rows, newest)), None)
        champion = repository.source_at(row.commit) if row else None
    except (Refused, ledger.LedgerError) as error:
        return replace(alone, note=f"not compared: {error}")
    if row is None or champion is None:
        return alone
    if champion.text == source.text:
        return replace(alone, note=f"it is the champion of row {row.number} itself: nothing to compare with")
    if any(champion.definitions.get(name) != source.definitions.get(name) for name in ("KERNEL_NAME", "WORKLOADS")):
        return replace(alone, note=f"not compared: row {row.number}'s champion solves another problem")
    name = f"row {row.number} ({row.commit[:12]})"
    return replace(alone, champion_name=name, champion=champion)


def run(
    subject: Subject, chip: Chip, workloads: tuple[str, ...], limits: pipeline.Limits, keep: Path | None = None
) -> Report:
    """Executes the subject's schedule, and its champion's; the subject's files stay in `keep`.

    Raises CannotJudge where the fault is nobody's.
    """
    pipeline.print_progress(f"explaining {ledger.escape(subject.name)}")
    verdict, found = _executed(subject.source, subject.sealed, chip, workloads, limits, keep)
    if not found:
        return Report(subject=subject, chip=chip.name, status=verdict.status, reason=verdict.reason)
    before: dict[str, Explanation] = {}
    note = subject.note
    if subject.champion is not None:
        pipeline.print_progress(f"the champion to compare with: {subject.champion_name}")
        other, before = _executed(subject.champion, subject.champion, chip, workloads, limits)
        note = note if before else f"not compared: the champion is {other.status} now: {other.reason}"
    return Report(subject=subject, chip=chip.name, status=verdict.status, note=note, workloads=found, champion=before)


def _executed(
    source: contract.Source,
    sealed: contract.Source,
    chip: Chip,
    workloads: tuple[str, ...],
    limits: pipeline.Limits,
    keep: Path | None = None,
) -> tuple[pipeline.Verdict, dict[str, Explanation]]:
    task = pipeline.Task(candidate=source, sealed=sealed, chip=chip, mode="model", workloads=workloads, limits=limits)
    with pipeline.private_folder(keep) as folder:
        judging = pipeline.Judging(task, folder, pipeline.print_progress)
        verdict = judging.run_to_cycles()
        if verdict.status != decide.PASS:
            return verdict, {}
        return verdict, {
            name: explain(folder / "compile" / name, cost, verdict.workloads[name], chip, source.text)
            for name, cost in judging.costs.items()
        }
