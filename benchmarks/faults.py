"""Kills the loop at random instants and at every step, starts two at once, and proves that nothing is lost.

    .venv/bin/python benchmarks/faults.py [--kills N] [--candidates N] [--real N] [--pairs N] [--seed N]

`--kills` (default 500) experiments with the tests' fast fake judge are killed with SIGKILL at a random instant, half of
them with every git that they run; `--candidates` (default 150) times four candidates are judged at the same time, and
one of them, the command, or all is killed at a random instant; `--real` (default 20) with the real judge on a small
kernel, as a user runs it; `--pairs` (default 100) pairs of loops start at once in one folder. After each, the next
experiment runs, and the checker proves from git and the ledger alone that no row is lost or doubled, that every row
leads to its commit, that every kept commit is on the branch, and that nothing is left dirty. The first violation ends
it with exit code 1.
"""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]

import fake_judge as fake  # noqa: E402

from judge import ledger  # noqa: E402

PROJECT = ("prepare.py", "ratchet.sh", "setup.sh", "requirements.lock", ".gitignore", ".gitattributes", "judge")
AFRESH = 25  # a new repository after so many kills: the checker reads all rows each time


def outcome(folder: Path, note: str) -> str:
    """What became of a killed experiment."""
    rows = {row.note: row.status for row in ledger.read(folder / "results.tsv")}
    return rows.get(note, "not begun, or undone")


def new_repository(place: Path) -> tuple[Path, dict[str, int], float]:
    """A repository with a baseline, the exit codes that were reported there, and the seconds that it took."""
    folder = fake.make_repository(place)
    started = time.monotonic()
    reported = {"baseline": fake.run(folder, "baseline")}
    return folder, reported, time.monotonic() - started


def random_kills(count: int, draw: random.Random, place: Path) -> None:
    seen: collections.Counter[str] = collections.Counter()
    for number in range(count):
        if number % AFRESH == 0:
            folder, reported, seconds = new_repository(place / f"kills {number}")
        fake.edit(folder, draw.choice([0, 8, 64 + number]), f" {number}")
        pid = fake.start(folder, f"killed {number}")
        time.sleep(draw.uniform(0, 1.2 * seconds))
        fake.kill(pid, with_children=number % 2 == 1)
        code = fake.run(folder, f"next {number}")
        told = fake.said(folder)
        assert code in (0, 1) or "is not what it was when this was asked for" in told, told
        if code < 2:
            reported[f"next {number}"] = code
        fake.check(folder, reported)
        seen[outcome(folder, f"killed {number}")] += 1
        fake.git(folder, "checkout", "-q", "kernel.py")
        show("random kills", number + 1, count)
    print(f"{count} SIGKILLs at random instants, fake judge: nothing lost, doubled or dirty; became {dict(seen)}")


def every_step(place: Path) -> None:
    total = 0
    for kind, dies, steps in (("journal", fake.dies_at_journal, 7), ("git", fake.dies_at_git, 60)):
        for block in (64, 8):
            folder = fake.make_repository(place / f"{kind} {block}")
            reported = {"baseline": fake.run(folder, "baseline")}
            for step in range(2 * steps):
                fake.edit(folder, block + 100 * step if block == 64 else block, f" {step}")
                code = fake.run(folder, f"killed {step}", before=dies(step // 2, afterwards=step % 2 == 1))
                if code != -signal.SIGKILL:
                    break
                code = fake.run(folder, f"next {step}")
                if code < 2:
                    reported[f"next {step}"] = code
                fake.check(folder, reported)
                fake.git(folder, "checkout", "-q", "kernel.py")
                total += 1
            show(f"every step, {kind}", total, total)
    print(f"{total} SIGKILLs before and after every journal write and git command: nothing lost, doubled or dirty")


def candidates_killed(count: int, draw: random.Random, place: Path) -> None:
    """Kills one candidate's process, the command's, or every process of it."""
    seen: collections.Counter[str] = collections.Counter()
    for number in range(count):
        if number % AFRESH == 0:
            folder, reported, seconds = new_repository(place / f"candidates {number}")
        blocks = {name: draw.choice([0, 8, 64 + number, 65 + number]) for name in "abcd"}
        texts = {f"{number} {name}": fake.kernel(block, f" {number} {name}") for name, block in blocks.items()}
        pid = fake.start_several(folder, texts, jobs=draw.choice([1, 2, 4]))
        time.sleep(draw.uniform(0, 4 * seconds))
        if number % 3 == 0 and (begun := fake.children(pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(begun), signal.SIGKILL)
            fake.end(pid)
        elif number % 3 == 1:
            fake.kill(pid, with_children=False)
        else:
            fake.kill_session(pid)
        settle(folder, f"next {number}", texts, reported)
        seen.update(outcome(folder, name) for name in texts)
        show("kills of candidates", number + 1, count)
    print(f"{count} SIGKILLs while 4 candidates are judged: nothing lost, doubled or dirty; they became {dict(seen)}")


def settle(folder: Path, note: str, texts: dict[str, str], reported: dict[str, int]) -> None:
    """Runs the next experiment and checks what is there. Candidates with a row were `reported`, or recovered."""
    told = fake.said(folder)
    reported |= fake.reported(folder)
    code = fake.run(folder, note)
    assert code == 0 or "is not what it was when this was asked for" in fake.said(folder), fake.said(folder)
    if code == 0:
        reported[note] = code
    fake.check(folder, reported)
    fake.check_candidates(folder, texts, told + fake.said(folder))


def candidates_at_every_step(place: Path) -> None:
    """Each process of four candidates is killed at the same journal write, or git command."""
    total = 0
    for kind, dies, steps in (("journal", fake.dies_at_journal, 8), ("git", fake.dies_at_git, 70)):
        folder = fake.make_repository(place / f"candidates {kind}")
        reported = {"baseline": fake.run(folder, "baseline")}
        for step in range(2 * steps):
            blocks = {"a": 64 + 100 * step, "b": 65 + 100 * step, "c": 8, "d": 0}
            texts = {f"{step} {name}": fake.kernel(block, f" {step} {name}") for name, block in blocks.items()}
            before = dies(step // 2, afterwards=step % 2 == 1)
            fake.end(fake.start_several(folder, texts, before=before))
            settle(folder, f"next {step}", texts, reported)
            total += 1
            show(f"candidates at every step, {kind}", total, 2 * 78)
    print(f"4 candidates killed at {total} steps and git commands: nothing lost, doubled or dirty")


def pairs(count: int, place: Path) -> None:
    refused = 0
    for number in range(count):
        if number % AFRESH == 0:
            folder, reported = fake.make_repository(place / f"pairs {number}"), {}
            reported["baseline"] = fake.run(folder, "baseline")
        refused += fake.two_at_once(folder, number, reported)
        show("two loops at once", number + 1, count)
    print(f"two loops at once {count} times: {2 * count - refused} rows, {refused} told that kernel.py had changed")


def real_kills(count: int, draw: random.Random, place: Path) -> None:
    """./ratchet.sh on tests/kernels/scaled_add.py, killed with all that it runs, like a machine that dies."""
    folder = place / "real"
    folder.mkdir()
    for name in PROJECT:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
    shutil.copyfile(ROOT / "tests" / "kernels" / "scaled_add.py", folder / "kernel.py")
    (folder / "mine.txt").write_text("tracked\n")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    (folder / ".git").mkdir()
    fake.git(folder, "init", "-q", "-b", "main")
    (folder / ".git" / "info" / "exclude").write_text("/.venv\n")
    fake.git(folder, "add", "-A")
    fake.git(folder, "commit", "-q", "-m", "start")
    text = (folder / "kernel.py").read_text()
    started = time.monotonic()
    assert ratchet(folder, "baseline").wait() == 0
    span, reported, seen = time.monotonic() - started, {"baseline": 0}, collections.Counter()
    for number in range(count):
        block = draw.choice([8, 16, 64, 128])
        (folder / "kernel.py").write_text(text.replace("BLOCK = 32 ", f"BLOCK = {block} ") + f"# {number}\n")
        running = ratchet(folder, f"killed {number}")
        # Mostly near the end, where more than the judging can be hit.
        time.sleep(draw.uniform(0, span) if number % 2 else draw.uniform(0.8, 1.05) * span)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        code = ratchet(folder, f"next {number}").wait()
        if code < 2:
            reported[f"next {number}"] = 0 if outcome(folder, f"next {number}") == "DUPLICATE" else code
        check_real(folder, set(reported))
        seen[outcome(folder, f"killed {number}")] += 1
        fake.git(folder, "checkout", "-q", "kernel.py")
        show("kills with the real judge", number + 1, count)
    print(f"{count} SIGKILLs with the real judge: nothing lost, doubled or dirty; became {dict(seen)}")


def check_real(folder: Path, reported: set[str]) -> None:
    rows = ledger.read(folder / "results.tsv")
    notes = [row.note for row in rows]
    assert len(set(notes)) == len(notes), "a row is doubled"
    assert reported <= set(notes), "a row is lost"
    fake.check(folder, {})


def ratchet(folder: Path, note: str) -> "subprocess.Popen[bytes]":
    with (folder.parent / "said").open("wb") as said:
        return subprocess.Popen(
            ["./ratchet.sh", note],
            cwd=folder,
            env=fake.ENVIRONMENT,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


def show(what: str, done: int, count: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{what}: {done}/{count}", end="\n" if done == count else "", file=sys.stderr, flush=True)
    elif done % 50 == 0:
        print(f"{what}: {done}/{count}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("kills", 500), ("candidates", 150), ("real", 20), ("pairs", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ratchet-faults-") as folder:
        place = Path(folder)
        try:
            random_kills(options.kills, draw, place)
            every_step(place)
            candidates_killed(options.candidates, draw, place)
            candidates_at_every_step(place)
            pairs(options.pairs, place)
            real_kills(options.real, draw, place)
        except AssertionError as error:
            sys.exit(f"violated: {error}")
    print(f"seed {options.seed}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
