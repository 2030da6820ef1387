"""One candidate through the stages, in order of cost; the first that fails decides.

    contract → worker → compile ∥ correctness → duplicate → cycles or measurement → roofline

The kernel file runs in worker.py's process only, the sealed file in oracle.py's, the compiler in compile.py's. This
process imports none of them.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from judge import channel, contract, decide, expected, identity, roofline, sandbox
from judge.chips import Chip
from judge.llo.execute import ExecutionError
from judge.llo.machine import load_machine
from judge.llo.module import ModuleCost, module_cost
from judge.llo.parse import ParseError
from judge.llo.translate import Untranslatable
from judge.measure import manager
from judge.policy import NO_PALLAS
from judge.sandbox import Process

PROGRAM = "program.jaxpr"
MOSAIC_CALL = 'custom_call_target="tpu_custom_call"'
HERE = Path(__file__).resolve().parent
ROOT = identity.root_of(HERE.parent / "prepare.py")


class CannotJudge(Exception):
    """The tool itself could not judge: exit code 2, with what to do."""


class Failed(Exception):
    """The candidate failed a stage."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Wall-clock seconds that a stage may take; tracing, lowering and the compiler, for each workload.

    One workload alone may have basic blocks of 10,000 bundles, for which the compiler takes minutes each.
    """

    trace_seconds: float = 120.0
    compile_seconds: float = 400.0
    compile_alone_seconds: float = 900.0  # what a file has with two workloads or one
    check_seconds: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to judge, and on what."""

    candidate: contract.Source
    sealed: contract.Source
    chip: Chip
    mode: str  # model or chip
    workloads: tuple[str, ...] = ()  # all of the file's where empty
    limits: Limits = Limits()
    device: str = "tpu"  # chip mode: tpu, or cpu to exercise the measuring path without one
    champion: contract.Source | None = None  # chip mode: timed in turn with the candidate
    deep: bool = False  # chip mode: record synchronisation too
    anew: bool = False  # the reference runs again, whatever is kept of its outputs


@dataclass(kw_only=True)
class Verdict:
    """What the stages found; `status` is PASS for a candidate that nothing failed, before it meets the champion."""

    status: str
    mode: str
    chip: str
    reason: str = ""
    total: roofline.Figures | None = None
    workloads: dict[str, roofline.Figures] = field(default_factory=dict)
    facts: dict[str, dict[str, float]] = field(default_factory=dict)  # workload → bytes, cycles, counts
    vmem_bytes: int | None = None
    spill_count: int | None = None
    copy_count: int | None = None
    program_sha256: str = ""
    champion_ms: dict[str, float] = field(default_factory=dict)  # chip mode: the champion's times in this very run
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    own_seconds: float = 0.0  # in which no program was traced, lowered, compiled, run or executed: the judge's price

    def as_json(self) -> dict[str, Any]:
        """The object that --json prints."""
        total = asdict(self.total) if self.total else dict.fromkeys(roofline.Figures.__dataclass_fields__)
        result: dict[str, Any] = {"status": self.status, "mode": self.mode, "chip": self.chip, **total}
        if self.reason:
            result["reason"] = self.reason
        result |= {
            "vmem_bytes": self.vmem_bytes,
            "spill_count": self.spill_count,
            "copy_count": self.copy_count,
            "program_sha256": self.program_sha256 or None,
            "workloads": {name: asdict(f) | self.facts.get(name, {}) for name, f in self.workloads.items()},
            "stage_seconds": self.stage_seconds,
            "own_seconds": self.own_seconds,
            "seconds": self.seconds,
        }
        return result


class Judging:
    """One run of the stages in a private folder, `folder`, which is gone afterwards unless it is kept."""

    def __init__(self, task: Task, folder: Path, progress: Callable[[str], None]) -> None:
        self.task = task
        self.folder = folder
        self.progress = progress
        self.stage_seconds: dict[str, float] = {}
        self.costs: dict[str, ModuleCost] = {}
        self._work: list[tuple[float, float]] = []  # from, to
        self._secret = 0
        self._platforms: tuple[str, ...] = ("tpu", "cpu")
        self.champion_ms: dict[str, float] = {}  # chip mode: the champion's times in this very run
        self._is_dry = task.sealed is task.candidate  # the file is its own oracle: nothing of it is kept
        self._kept_folder = expected.folder_of(ROOT, task.sealed.text)
        self._uses_kept = False  # outputs of the reference
        self._uses_kept_description = False
        sandbox.prepare()

    def run(self, is_known: Callable[[str], str | None] = lambda program: None) -> Verdict:
        """Runs every stage. `is_known(program_sha256)` says why a program need not be judged again, or None.

        Raises CannotJudge where the fault is not the candidate's.
        """
        return self._run(lambda traced, verdict: self._compile_and_check(traced, verdict, is_known))

    def run_to_cycles(self) -> Verdict:
        """The stages that give figures, without the check of correctness: to explain a program, never to keep it."""
        self._platforms = ("tpu",)
        return self._run(self._compile_stage)

    def _run(self, middle: Callable[[dict[str, Any], Verdict], None]) -> Verdict:
        started = time.monotonic()
        task = self.task
        verdict = Verdict(status=decide.PASS, mode=task.mode, chip=task.chip.name)
        try:
            contract.check_seal(task.candidate, task.sealed)
            contract.check_policy(task.candidate, task.sealed)
            described = self._describe()
            traced = self._trace(described)
            middle(traced, verdict)
            if verdict.status == decide.PASS:
                self._time(described, traced, verdict)
        except contract.ContractError as error:
            verdict.status, verdict.reason = "FAIL_CONTRACT", str(error)
        except Failed as failure:
            verdict.status, verdict.reason = failure.status, str(failure)
        verdict.seconds = time.monotonic() - started
        verdict.stage_seconds = self.stage_seconds
        verdict.own_seconds = verdict.seconds - _covered(self._work)
        return verdict

    # --- stages ---

    @contextmanager
    def _stage(self, name: str, what: str) -> Iterator[None]:
        self.progress(what)
        started = time.monotonic()
        try:
            yield
        finally:
            self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + time.monotonic() - started

    @contextmanager
    def _working(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._work.append((started, time.monotonic()))

    def _describe(self) -> dict[str, Any]:
        folder = self._subfolder("describe")
        is_kept = not self._is_dry and not self.task.workloads  # a dry run imports the kernel file here first
        with self._stage("inputs", "inputs: shapes, lengths and bounds"):
            result = None
            if is_kept and not self.task.anew and expected.kept_description(self._kept_folder, folder):
                result = _read_result(folder / "result.json")
            self._uses_kept_description = result is not None and "workloads" in result
            if result is None or not self._uses_kept_description:  # not kept, or torn
                request = {"do": "describe", "workloads": list(self.task.workloads)}
                limit = self.task.limits.trace_seconds if self._is_dry else self.task.limits.check_seconds
                result = self._finish(self._start_oracle("describe", request), limit)
                if is_kept:
                    expected.keep_description(folder, self._kept_folder)
            described: dict[str, Any] = result["workloads"]
            return described

    def _trace(self, described: dict[str, Any]) -> dict[str, Any]:
        with self._stage("trace", "trace: one jaxpr a workload, lowered for the TPU and for the CPU"):
            return self._trace_source(self.task.candidate, "trace", described)

    def _trace_source(self, source: contract.Source, label: str, described: dict[str, Any]) -> dict[str, Any]:
        """Each workload in a worker of its own, and lowered while the next one is traced."""
        trees: dict[str, str] = {}
        lowering: dict[str, tuple[Process, Path]] = {}
        traced: dict[str, Any] = {}
        try:
            for name, workload in described.items():
                folder = self._subfolder(f"{label}-{name}")
                kernel = folder / "kernel.py"
                kernel.write_text(source.text)
                request = {
                    "kernel": str(kernel),
                    "topology": self.task.chip.topology,
                    "workload": name,
                    "inputs": workload["inputs"],
                }
                message = self._handed_over(folder, request)
                trees[name] = message.tree
                lowering[name] = self._lower(
                    self._subfolder(f"{folder.name}-lowered"), message.program, request | {"flops": workload["flops"]}
                )
            for name, started in lowering.items():
                donated = self._finish(started, self.task.limits.trace_seconds)["donated"]
                lowered = {platform: str(started[1] / platform) for platform in self._platforms}
                program = str(started[1] / PROGRAM)
                traced[name] = {"tree": trees[name], "donated": donated, "program": program, **lowered}
        finally:
            for process, _ in lowering.values():
                process.kill()
        return traced

    def _lower(self, folder: Path, program: bytes, request: dict[str, Any]) -> tuple[Process, Path]:
        """Starts the lowering of one workload's program, in a folder that no kernel file has a way to write."""
        (folder / PROGRAM).write_bytes(program)
        asked = request | {
            "program": str(folder / PROGRAM),
            "needs_pallas": NO_PALLAS not in self.task.sealed.needs,
            "platforms": self._platforms,
        }
        return self._start("lower.py", folder, asked)

    def _handed_over(self, folder: Path, request: dict[str, Any]) -> channel.Message:
        """What the worker reports. Raises Failed where there is nothing, or it is not what worker.py sends."""
        pipe = os.pipe()
        process, _ = self._start("worker.py", folder, {**request, "channel": pipe[1]}, pipe)
        with self._working():
            finished = process.wait(self.task.limits.trace_seconds)
        stage = _STAGE_OF["worker.py"]
        if finished.timed_out:
            limit = self.task.limits.trace_seconds
            raise Failed("FAIL_TIMEOUT", f"worker.py took more than {limit:g} s: {stage}")
        try:
            message = channel.parse(finished.handed_over)
        except channel.ChannelError as error:
            tail = finished.log_tail.strip().splitlines()[-1:] or ["it printed nothing"]
            told = f"{stage}: worker.py ended with code {finished.returncode} and no result ({error}): {tail[0][:500]}"
            raise Failed("FAIL_CRASH", told) from None
        if message.status != decide.PASS:
            known = message.status in ("FAIL_CRASH", "FAIL_CONTRACT")
            reason = message.reason if known else "worker.py reports no verdict"
            raise Failed(message.status if known else "FAIL_CRASH", reason)
        return message

    def _compile_and_check(
        self, traced: dict[str, Any], verdict: Verdict, is_known: Callable[[str], str | None]
    ) -> None:
        """Both at once, on two cores: the compiler's verdict comes first, and a known program is not checked again."""
        # Drawn now that the artifacts exist, so that nothing in them can depend on it.
        self._secret = secrets.randbits(31)
        request = {"do": "check", "workloads": self._artifacts(traced, "cpu"), "secret": self._secret}
        if self._uses_kept_description:
            request["described"] = str(self._subfolder("describe"))
        self._uses_kept = self._kept_folder.is_dir() and not self.task.anew
        if self._uses_kept:
            request["expected"] = str(self._kept_folder)
        checking = self._start_oracle("check", request)
        try:
            if self.task.mode == "model" or self.task.device == "tpu":
                self._compile_stage(traced, verdict)
                known = is_known(verdict.program_sha256)
                if known is not None:
                    verdict.status, verdict.reason = decide.DUPLICATE, known
                    return
            # The strict run is on the other core, and says more exactly what is wrong: but a wrong result comes first.
            racing = self._start_strict(traced)
            try:
                with self._stage("correctness", "correctness: the CPU program against the oracle"):
                    self._finish(checking, self.task.limits.check_seconds)
                if not self._is_dry:
                    expected.install(checking[1], self._kept_folder)
                with self._stage("races", "races: the strict interpreter on one small check set a workload"):
                    self._finish(racing, self.task.limits.check_seconds)
            finally:
                racing[0].kill()
        finally:
            checking[0].kill()

    def confirm(self, verdict: Verdict) -> None:
        """Before a candidate is kept: whether the outputs that were kept, with which it agreed, are the reference's.

        Raises CannotJudge.
        """
        if not self._uses_kept:
            return
        request = {
            "do": "confirm",
            "workloads": list(verdict.workloads),
            "secret": self._secret,
            "expected": str(self._kept_folder),
        }
        try:
            with self._stage("confirm", "kept outputs: the reference once more, before this is kept"):
                self._finish(self._start_oracle("confirm", request), self.task.limits.check_seconds)
        except Failed as failure:
            raise CannotJudge(f"the lineage's baseline cannot be used as the oracle: {failure}") from failure

    def _start_strict(self, traced: dict[str, Any]) -> tuple[Process, Path]:
        described = self.folder / "describe"
        programs = {
            name: {"program": workload["program"], "integers": str(described / f"{name}.npz")}
            for name, workload in traced.items()
        }
        request: dict[str, Any] = {
            "topology": self.task.chip.topology,
            "workloads": programs,
            "sealed": str(self._sealed_file()),
        }
        request["secret"] = self._secret
        return self._start("strict.py", self._subfolder("strict"), request)

    def _compile_stage(self, traced: dict[str, Any], verdict: Verdict) -> None:
        with self._stage("compile", f"compile: the TPU compiler for {self.task.chip.name}"):
            self._compile(traced, verdict)

    def _compile(self, traced: dict[str, Any], verdict: Verdict) -> None:
        folder = self._subfolder("compile")
        request = {
            "topology": self.task.chip.topology,
            "workloads": self._artifacts(traced, "tpu"),
            "dump": "dump",  # relative to the process's folder: libtpu splits its flags at spaces
        }
        limits = self.task.limits
        seconds = max(len(traced) * limits.compile_seconds, limits.compile_alone_seconds)
        self._finish(self._start("compile.py", folder, request), seconds)
        hashes = []
        for name in traced:
            if NO_PALLAS not in self.task.sealed.needs and MOSAIC_CALL not in (folder / name / "hlo.txt").read_text():
                reason = "the compiled program has no Pallas kernel: nothing that kernel_fn returns depends on one"
                raise Failed("FAIL_CONTRACT", f"workload {name}: {reason}")
            facts = json.loads((folder / name / "facts.json").read_text())
            hashes.append(f"{name}={facts.pop('program_sha256')}")
            peak = facts["argument_bytes"] + facts["output_bytes"] - facts["alias_bytes"] + facts["temporary_bytes"]
            verdict.facts[name] = {"hbm_peak_bytes": peak}
            if peak > self.task.chip.hbm_bytes:
                raise Failed(
                    "FAIL_COMPILE",
                    f"workload {name} needs {peak} bytes of HBM, the chip has {self.task.chip.hbm_bytes}",
                )
        verdict.program_sha256 = hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def _time(self, described: dict[str, Any], traced: dict[str, Any], verdict: Verdict) -> None:
        if self.task.mode == "model":
            with self._stage("cycles", "cycles: executing the final schedule"), self._working():
                seconds = self._predict(traced, verdict)
        else:
            with self._stage("measure", "measure: timed calls on the device"), self._working():
                seconds = self._measure(described, traced)
        for name, workload in described.items():
            self._account(name, seconds[name], workload, verdict)
        verdict.total = roofline.combine(verdict.workloads.values())
        if not verdict.total.finite():
            raise Failed("FAIL_CRASH", "a figure is not finite")

    def _predict(self, traced: dict[str, Any], verdict: Verdict) -> dict[str, float]:
        machine = load_machine(self.task.chip.name)
        for name in traced:
            with np.load(self.folder / "describe" / f"{name}.npz") as saved:
                integers = {int(key): saved[key] for key in saved.files}
            try:
                cost = module_cost(self.folder / "compile" / name, machine, integers)
            except (ExecutionError, ParseError, Untranslatable) as error:
                raise Failed("FAIL_COMPILE", f"workload {name}: the schedule cannot be timed: {error}") from error
            self.costs[name] = cost
            verdict.facts[name] |= {
                "cycles": cost.cycles,
                "hbm_bytes": cost.hbm_bytes,
                "vmem_bytes": cost.vmem_bytes,
                "spill_count": cost.spill_slots,
                "copy_count": cost.copy_count,
                "dma_count": sum(op.execution.dma_count for op in cost.ops if op.execution),
                "dma_wait_cycles": sum(op.execution.dma_wait_cycles for op in cost.ops if op.execution),
            }
        verdict.vmem_bytes = max(cost.vmem_bytes for cost in self.costs.values())
        verdict.spill_count = sum(cost.spill_slots for cost in self.costs.values())
        verdict.copy_count = sum(cost.copy_count for cost in self.costs.values())
        return {name: cost.seconds for name, cost in self.costs.items()}

    def _measure(self, described: dict[str, Any], traced: dict[str, Any]) -> dict[str, float]:
        platform = "cpu" if self.task.device == "cpu" else "tpu"
        programs = {"candidate": self._artifacts(traced, platform)}
        if self.task.champion is not None:
            champion = self._trace_source(self.task.champion, "champion", described)
            programs["champion"] = self._artifacts(champion, platform)
        try:
            seconds = manager.measure(
                self._subfolder("measure"),
                programs,
                sealed=self._sealed_file(),
                secret=self._secret,
                device=self.task.device,
                device_kind=self.task.chip.device_kind,
                deep=self.task.deep,
            )
            self.champion_ms = {name: 1e3 * s for name, s in seconds.get("champion", {}).items()}
            return seconds["candidate"]
        except manager.MeasureError as error:
            if error.candidate:
                raise Failed(error.status, str(error)) from error
            raise CannotJudge(str(error)) from error

    def _account(self, name: str, seconds: float, workload: dict[str, Any], verdict: Verdict) -> None:
        """Figures of one workload; faster than physics fails with both numbers."""
        chip = self.task.chip
        flops, compulsory = workload["flops"], workload["compulsory_bytes"]
        peak = roofline.peak_flops_per_second(chip, [array["dtype"] for array in workload["inputs"]])
        bound = max(roofline.bounds_seconds(flops, compulsory, peak, chip))
        if not (bound > 0 and seconds > 0):
            raise Failed("FAIL_CRASH", f"workload {name}: time {seconds} s, roofline {bound} s")
        if seconds < bound:
            raise Failed(
                "FAIL_ROOFLINE",
                f"workload {name} takes {seconds * 1e3:.6g} ms, faster than physics allows: {flops:.6g} FLOPs and "
                f"{compulsory:.6g} bytes take at least {bound * 1e3:.6g} ms on {chip.name}",
            )
        moved = verdict.facts.get(name, {}).get("hbm_bytes")
        if moved is not None and workload["declares_bytes"] and moved < compulsory:
            raise Failed(
                "FAIL_ROOFLINE",
                f"workload {name} moves {moved:.6g} bytes to and from HBM, but its inputs and outputs need at least "
                f"{compulsory:.6g}",
            )
        verdict.workloads[name] = roofline.figures(
            seconds=seconds,
            flops=flops,
            compulsory_bytes=compulsory,
            moved_bytes=moved,
            peak_flops=peak,
            chip=chip,
        )

    # --- processes ---

    def _artifacts(self, traced: dict[str, Any], platform: str) -> dict[str, Any]:
        return {
            name: {"artifact": workload[platform], "donated": workload["donated"], "tree": workload["tree"]}
            for name, workload in traced.items()
        }

    def _subfolder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder

    def _sealed_file(self) -> Path:
        sealed = self._subfolder("sealed") / "kernel.py"
        sealed.write_text(self.task.sealed.text)
        return sealed

    def _start_oracle(self, label: str, request: Mapping[str, Any]) -> tuple[Process, Path]:
        return self._start("oracle.py", self._subfolder(label), {**request, "sealed": str(self._sealed_file())})

    def _start(
        self, script: str, folder: Path, request: Mapping[str, Any], pipe: tuple[int, int] | None = None
    ) -> tuple[Process, Path]:
        path = folder / "request.json"
        path.write_text(json.dumps({**request, "out": str(folder)}))
        return Process(HERE / script, [str(path)], folder=folder, pipe=pipe), folder

    def _finish(self, started: tuple[Process, Path], limit_seconds: float) -> dict[str, Any]:
        """The stage's result; raises Failed or CannotJudge where there is none or it is bad."""
        process, folder = started
        script, stage = process.name, _STAGE_OF[process.name]
        finished = process.wait(limit_seconds)
        # Before the candidate's programs exist, oracle.py runs the sealed file alone.
        blameless = script == "oracle.py" and folder.name == "describe" and not self._is_dry
        if finished.timed_out:
            message = f"{script} took more than {limit_seconds:g} s: {stage}"
            raise CannotJudge(message) if blameless else Failed("FAIL_TIMEOUT", message)
        result = _read_result(folder / "result.json")
        if result is None:
            tail = finished.log_tail.strip().splitlines()[-1:] or ["it printed nothing"]
            message = f"{stage}: {script} ended with code {finished.returncode} and no result: {tail[0][:500]}"
            # compile.py: a signal is the compiler's own abort, an exit code a fault of the installation.
            if blameless or (script == "compile.py" and finished.returncode in (*range(256), -signal.SIGKILL)):
                raise CannotJudge(f"{message} (full log in the folder that --keep names)")
            raise Failed("FAIL_CRASH", message)
        status, reason = result.get("status"), str(result.get("reason", ""))
        if status == "CANNOT_JUDGE" and script in ("oracle.py", "strict.py"):
            raise CannotJudge(reason)
        if status == "SEAL" and script == "oracle.py":
            if self._is_dry:
                raise Failed(result["blame"], reason)
            raise CannotJudge(f"the lineage's baseline cannot be used as the oracle: {reason}")
        if status != decide.PASS:
            known = status in decide.FAILURES
            raise Failed(str(status) if known else "FAIL_CRASH", reason if known else f"{script} reports no verdict")
        self._work += [(start, end) for start, end in result["work"]]
        return result


def _covered(spans: list[tuple[float, float]]) -> float:
    """Seconds in at least one of the spans (from, to)."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _read_result(path: Path) -> dict[str, Any] | None:
    """What a stage reports; None where it is missing or no JSON object."""
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) else None


_STAGE_OF = {
    "worker.py": "importing and tracing the kernel file",
    "lower.py": "lowering the traced programs",
    "strict.py": "looking for races in the strict interpreter",
    "compile.py": "compiling for the chip",
    "oracle.py": "importing the problem's file, its inputs, its reference or the check of the CPU program",
}


@contextmanager
def private_folder(keep: Path | None = None) -> Iterator[Path]:
    """A folder for one judging, removed afterwards; with `keep`, that one, emptied first and left in place.

    Raises CannotJudge where `keep` holds what no judging has left there.
    """
    if keep is not None:
        if keep.exists() and not (keep.is_dir() and ((keep / "sealed").is_dir() or not any(keep.iterdir()))):
            raise CannotJudge(f"--keep {keep}: it holds something else; name a new or an empty folder")
        shutil.rmtree(keep, ignore_errors=True)
        keep.mkdir(parents=True)
        yield keep.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="ratchet-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def print_progress(text: str) -> None:
    """One line a stage, to stderr."""
    print(f"judge: {text}", file=sys.stderr, flush=True)
