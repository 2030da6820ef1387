"""Cheats rejected for their own reason, honest kernels accepted, and the time that takes.

    .venv/bin/python benchmarks/integrity.py [--class NAME] [--jobs N] [--honest-only]

Judges every case of tests/cheats/ and prints a line a class. Exit code 0: all as they should be; 1: the cases that
are not are named.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import cheats  # noqa: E402


def judged(case: cheats.Case) -> tuple[str, str, float]:
    """(class, what is wrong or nothing, seconds)"""
    started = time.monotonic()
    try:
        problem = case.problem(case.judge())
    except Exception as error:
        problem = f"{case.group}/{case.name}: the judge failed: {type(error).__name__}: {error}"
    return case.group, problem, time.monotonic() - started


def run(cases: list[cheats.Case], jobs: int) -> list[str]:
    """Judges the cases, `jobs` at a time, and prints a line a class. Returns the problems."""
    results = []
    with ThreadPoolExecutor(jobs) as pool:
        for number, result in enumerate(pool.map(judged, cases), 1):
            results.append(result)
            print(f"\r{number}/{len(cases)} {result[0]:20}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for group in dict.fromkeys(case.group for case in cases):
        mine = [result for result in results if result[0] == group]
        good = sum(not problem for _, problem, _ in mine)
        verb = "accepted" if group == "honest" else "rejected"
        print(f"  {group:20} {good:3} / {len(mine):3} {verb}   {sum(s for *_, s in mine):7.1f} s")
    return [problem for _, problem, _ in results if problem]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--class", dest="classes", action="append", choices=(*cheats.CLASSES, "honest"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    chosen = options.classes or [*cheats.CLASSES, "honest"]
    started = time.monotonic()
    bad = [case for name in chosen if name != "honest" for case in cheats.load(name)]
    good = cheats.load("honest") if "honest" in chosen else []
    problems = run(bad + good, options.jobs)
    wrong_good = sum(problem.startswith("honest/") for problem in problems)
    wrong_bad = len(problems) - wrong_good
    print(f"cheats rejected for their reason: {len(bad) - wrong_bad} / {len(bad)}")
    print(f"honest kernels accepted: {len(good) - wrong_good} / {len(good)}")
    print(f"in all: {time.monotonic() - started:.0f} s, {options.jobs} at a time, {os.cpu_count()} cores")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
