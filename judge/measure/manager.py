"""Starts the runner on the attached chip and turns its samples into one time a workload."""

import glob
import json
from pathlib import Path
from typing import Any

from judge.measure.statistics import median_seconds
from judge.sandbox import Process

RUNNER = Path(__file__).resolve().parent / "runner.py"
LIMIT_SECONDS = 900.0


class MeasureError(Exception):
    """The measurement failed; `candidate` says whether that is the candidate's fault."""

    def __init__(self, status: str, reason: str, *, candidate: bool) -> None:
        super().__init__(reason)
        self.status = status
        self.candidate = candidate


def chip_attached() -> bool:
    """Whether this machine shows a TPU's device files; cheap, and never starts libtpu."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def measure(
    folder: Path, programs: dict[str, Any], *, sealed: Path, secret: int, device: str, device_kind: str, deep: bool
) -> dict[str, dict[str, float]]:
    """Program (candidate, champion) → workload → median seconds; `folder`/profile has XProf's recording of each.

    Raises MeasureError.
    """
    path = folder / "request.json"
    request = {"programs": programs, "sealed": str(sealed), "secret": secret, "device": device}
    path.write_text(json.dumps(request | {"out": str(folder), "profile": str(folder / "profile"), "deep": deep}))
    process = Process(RUNNER, [str(path)], folder=folder, own_interpreter=True)
    finished = process.wait(LIMIT_SECONDS)
    if finished.timed_out:
        raise MeasureError("FAIL_TIMEOUT", f"the timed calls took more than {LIMIT_SECONDS:g} s", candidate=True)
    try:
        result = json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        tail = finished.log_tail.strip().splitlines()[-1:] or ["it printed nothing"]
        raise MeasureError("FAIL_CRASH", f"the runner died: {tail[0][:500]}", candidate=True) from None
    if result["status"] == "NO_DEVICE":
        raise MeasureError("FAIL_CRASH", f"{result['reason']}; use --mode model, which needs none", candidate=False)
    if result["status"] != "PASS":
        raise MeasureError(result["status"], result["reason"], candidate=True)
    if device == "tpu" and result["device_kind"] != device_kind:
        raise MeasureError(
            "FAIL_CRASH",
            f"the attached chip is {result['device_kind']!r}, --chip names a {device_kind!r}",
            candidate=False,
        )
    samples = result["samples"]
    try:
        return {
            label: {name: median_seconds(by_program[label]) for name, by_program in samples.items()}
            for label in programs
        }
    except ValueError as error:
        raise MeasureError("FAIL_CRASH", str(error), candidate=True) from error
