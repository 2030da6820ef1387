"""Where the time of one experiment goes, stage by stage, with its peak memory.

    .venv/bin/python benchmarks/experiment_time.py [--chip CHIP] [--runs N]

Judges the committed kernel.py again in a clone that is thrown away, N times after a first one, which finds nothing kept
of the reference's outputs; prints the median of each stage. "own" is the time in which no program was traced, lowered,
compiled, run or executed: what the judge's processes, inputs, reference and comparisons add. Memory is the largest sum
over the judge's processes at any one moment, sampled from /proc every 200 ms.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def resident_bytes(root_pid: int) -> int:
    """Resident memory of a process and all its descendants, in bytes; a page is divided among those that share it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    total, todo = 0, [root_pid]
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError, IndexError, ValueError):
            total += int((Path("/proc") / str(pid) / "smaps_rollup").read_text().split("\nPss:")[1].split()[0]) << 10
        todo += children.get(pid, [])
    return total


def judge_once(folder: Path, chip: str) -> tuple[dict[str, float], int]:
    """(seconds by stage, peak bytes) of one experiment with the champion as it is. Exits where it was not judged."""
    command = [sys.executable, "prepare.py", "--experiment", "where the time goes", "--chip", chip, "--json"]
    peak, done = 0, threading.Event()
    started = time.monotonic()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE) as process:

        def sample() -> None:
            nonlocal peak
            while not done.wait(0.2):
                peak = max(peak, resident_bytes(process.pid))

        sampler = threading.Thread(target=sample)
        sampler.start()
        assert process.stdout is not None
        output = process.stdout.read()
        process.wait()
        done.set()
        sampler.join()
    if process.returncode:
        sys.exit(f"the committed kernel.py was not judged to the end:\n{output.decode()}")
    verdict = json.loads(output.splitlines()[-1])
    seconds = verdict["stage_seconds"] | {"in all": time.monotonic() - started, "own": verdict["own_seconds"]}
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        (folder / ".venv").symlink_to(ROOT / ".venv")
        first, *others = [judge_once(folder, options.chip) for _ in range(options.runs + 1)]
    print(f"kernel.py on {options.chip}, {os.cpu_count()} cores: first experiment, then the median of {options.runs}")
    for stage in others[-1][0]:
        print(f"  {stage:12} {first[0][stage]:6.1f} s {statistics.median(run[0][stage] for run in others):6.1f} s")
    print(f"  {'peak memory':12} {first[1] / 2**30:6.2f}   {max(run[1] for run in others) / 2**30:6.2f} GiB")


if __name__ == "__main__":
    main()
