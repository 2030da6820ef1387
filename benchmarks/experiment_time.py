"""Where the time of one experiment goes, stage by stage, with its peak memory.

    .venv/bin/python benchmarks/experiment_time.py [--kernel FILE] [--chip CHIP] [--runs N]

Judges the kernel in a dry run, N times, and prints the median of each stage. "own" is the time in which no program was
traced, lowered, compiled, run or executed: what the judge's processes, inputs, reference and comparisons add. Memory is
the largest sum over the judge's processes at any one moment, sampled from /proc every 50 ms.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(root_pid: int) -> int:
    """Resident memory of a process and all its descendants, in bytes; shared pages count once each process."""
    children: dict[int, list[int]] = {}
    pages: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            pages[int(folder.name)] = int((folder / "statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    total, todo = 0, [root_pid]
    while todo:
        pid = todo.pop()
        total += pages.get(pid, 0) * PAGE_BYTES
        todo += children.get(pid, [])
    return total


def judge_once(kernel: Path, chip: str) -> tuple[dict[str, float], float, int, str]:
    """(seconds by stage, wall seconds, peak bytes, status) of one dry run."""
    command = [sys.executable, str(ROOT / "prepare.py"), "--kernel", str(kernel), "--chip", chip, "--dry-run", "--json"]
    peak, done = 0, threading.Event()
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:

        def sample() -> None:
            nonlocal peak
            while not done.wait(0.05):
                peak = max(peak, resident_bytes(process.pid))

        sampler = threading.Thread(target=sample)
        sampler.start()
        assert process.stdout is not None
        output = process.stdout.read()
        process.wait()
        done.set()
        sampler.join()
    verdict = json.loads(output.splitlines()[-1])
    return (
        verdict["stage_seconds"] | {"own": verdict["own_seconds"]},
        time.monotonic() - started,
        peak,
        verdict["status"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kernel", type=Path, default=ROOT / "kernel.py")
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    if options.runs < 1 or not options.kernel.is_file():
        parser.error("--runs must be at least 1 and --kernel an existing file")
    runs = [judge_once(options.kernel, options.chip) for _ in range(options.runs)]
    if runs[-1][3] != "PASS":
        sys.exit(f"{options.kernel.name} is {runs[-1][3]}: run prepare.py --dry-run on it to see why")
    print(f"{options.kernel.name} on {options.chip}, {options.runs} runs, {os.cpu_count()} cores, status {runs[-1][3]}")
    for stage in runs[-1][0]:
        print(f"  {stage:12} {statistics.median(run[0][stage] for run in runs):6.1f} s")
    print(f"  {'in all':12} {statistics.median(run[1] for run in runs):6.1f} s wall")
    print(f"  {'peak memory':12} {max(run[2] for run in runs) / 2**30:6.2f} GiB")


if __name__ == "__main__":
    main()
