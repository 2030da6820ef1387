"""Append to the ledger and look up the best so far, at ledgers of many sizes.

    .venv/bin/python benchmarks/ledger.py [--rows N ...] [--git]

Makes a ledger of N rows (default: 1,000, 10,000, 100,000 and 1,000,000) and its index in a temporary folder, then
prints the median of 50 of each of these, in milliseconds:

    open       the index, checked against the ledger's file: what an experiment does first
    best       the champion and the baseline of the lineage, each read from the ledger
    program    the rows that have a compiled program
    append     one row, durable, and the index with it

and in seconds what depends on N: `rebuild`, the ledger read and verified from its first line, which happens where the
index is absent or stale; and with --git `hash`, git's copy of the whole file, once an experiment.
"""

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from judge import ledger  # noqa: E402
from judge.ledger_index import LedgerIndex  # noqa: E402

SAMPLES = 50


def row(number: int) -> ledger.Row:
    """One like the recorded ones: about 700 bytes; one in 1000 is kept."""
    text = hashlib.sha256(str(number).encode()).hexdigest()
    empty = dict.fromkeys(("util_pct", "tflops", "bw_util_pct", "mfu_pct", "mbu_pct", "spill_count", "copy_count"))
    return ledger.Row(
        **empty,
        commit=text[:40],
        score=1.0 + number,
        status="PASS" if number % 1000 == 1 else "REGRESSION",
        median_ms=1000.0 / number,
        regime="MEMORY-BOUND",
        note=f"hypothesis {number}: larger tiles, so that fewer blocks wait for their copies",
        number=number,
        lineage=1,
        chip="v5e",
        mode="model",
        workloads="decode:8.59464121:6.429:0.106601:6.429;prefill:16.2718723:5.99975:5.99975:1.51071",
        vmem_mib=11.0,
        seconds=58.8,
        parent_commit=text[20:60],
        artifact_sha256=text,
        judge_sha256=text,
        reason="the score changes by -1.234 %; a win needs more than 0.1 %",
    )


def make(path: Path, count: int) -> None:
    previous = ledger.GENESIS
    with path.open("w") as file:
        file.write(ledger.HEADER + "\n")
        for number in range(1, count + 1):
            line = ledger.format_row(row(number), previous)
            previous = line[-65:-1]
            file.write(line)


def median_ms(act: Callable[[], object]) -> float:
    samples = []
    for _ in range(SAMPLES):
        started = time.perf_counter()
        act()
        samples.append(1e3 * (time.perf_counter() - started))
    return statistics.median(samples)


def append(index: LedgerIndex) -> None:
    line = ledger.next_line(row(index.count + 1), index.last_sha256)
    index.add(ledger.parse_row(line[:-1], "new"), ledger.append(index.path, line), "blob")


def measure(folder: Path, count: int, *, with_git: bool) -> None:
    path, cache = folder / "results.tsv", folder / "cache"
    make(path, count)
    started = time.perf_counter()
    index = LedgerIndex(path, cache, "blob")
    index.rebuild()
    rebuild = time.perf_counter() - started
    program = row(count // 2).artifact_sha256
    os.sync()  # not the writing of the file that was just made
    figures = {
        "open": median_ms(lambda: LedgerIndex(path, cache, "blob").close()),
        "best": median_ms(lambda: (index.champion(1), index.baseline(1))),
        "program": median_ms(lambda: list(index.with_program(1, program))),
        "append": median_ms(lambda: append(index)),
    }
    assert LedgerIndex(path, cache, "blob").is_current
    told = "  ".join(f"{name} {ms:7.3f} ms" for name, ms in figures.items())
    told += f"  rebuild {rebuild:6.2f} s  {path.stat().st_size / 1e6:6.1f} MB"
    if with_git:
        subprocess.run(["git", "init", "-q", folder], check=True)
        started = time.perf_counter()
        command = ["git", "-c", "core.fsync=committed", "hash-object", "-w", "--no-filters", "results.tsv"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        told += f"  hash {time.perf_counter() - started:6.2f} s"
        objects = sum(file.stat().st_size for file in (folder / ".git" / "objects").rglob("*") if file.is_file())
        told += f", {objects / 1e6:.1f} MB stored"
    print(f"{count:9,d} rows: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--git", action="store_true", help="also time git's copy of the file")
    options = parser.parse_args()
    if min(options.rows) < 2:
        parser.error("--rows: 2 or more")
    for count in options.rows:
        with tempfile.TemporaryDirectory(prefix="ratchet-ledger-") as folder:
            measure(Path(folder), count, with_git=options.git)


if __name__ == "__main__":
    main()
