#!/usr/bin/env python3
"""How long the executor takes, and how much memory: parse, translate and run, each case in a process of its own.

    .venv/bin/python benchmarks/executor_speed.py [--chip CHIP] [--runs N]

Cases: kernel.py on 128 sequences of 8,192 tokens (decode) and on 8,192 new tokens (prefill), and a flash attention of
8,192 grid steps. Compiles them first where they are not in .ratchet/corpus; a changed kernel.py is compiled anew.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.corpus.build import OUT  # noqa: E402

CASES = {"rpa-decode": 2.0, "rpa-prefill": 3.0, "fa-grid": 2.0}  # seconds that each may take
LIMIT_BYTES = 1 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="v5e", choices=("v5e", "v6e", "tpu7x"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(execute(OUT / arguments.chip / arguments.case, arguments.chip)))
        return 0
    compile_cases(arguments.chip)
    print(
        f"{'case':12} {'seconds':>8} {'limit':>6} {'MiB':>6} {'cycles':>10} {'copies':>8}  (median of {arguments.runs})"
    )
    fine = True
    for case, limit in CASES.items():
        command = [sys.executable, __file__, "--chip", arguments.chip, "--case", case]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(arguments.runs)]
        seconds = statistics.median(run["seconds"] for run in runs)
        memory = max(run["bytes"] for run in runs)
        fine &= seconds <= limit and memory <= LIMIT_BYTES
        print(f"{case:12} {seconds:8.2f} {limit:6.1f} {memory >> 20:6} {runs[0]['cycles']:10.0f} {runs[0]['copies']:8}")
    return 0 if fine else 1


def compile_cases(chip: str) -> None:
    for case in CASES:
        hlo = OUT / chip / case / "hlo.txt"
        if case.startswith("rpa") and hlo.exists() and hlo.stat().st_mtime < (PROJECT / "kernel.py").stat().st_mtime:
            shutil.rmtree(hlo.parent)
    build = PROJECT / "benchmarks" / "corpus" / "build.py"
    command = [sys.executable, str(build), "--chip", chip, "--group", "speed", "--missing"]
    subprocess.run(command, check=True, stdout=sys.stderr)


def execute(folder: Path, chip: str) -> dict[str, float]:
    """One run: seconds, peak resident bytes of this process, cycles and copies."""
    import numpy as np

    from judge.llo.machine import load_machine
    from judge.llo.module import module_cost

    with np.load(folder / "scalars.npz") as saved:
        scalars = {int(index): saved[index] for index in saved.files}
    started = time.monotonic()
    cost = module_cost(folder, load_machine(chip), scalars)
    return {
        "seconds": time.monotonic() - started,
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cycles": cost.cycles,
        "copies": sum(op.execution.dma_count for op in cost.ops if op.execution),
    }


if __name__ == "__main__":
    sys.exit(main())
