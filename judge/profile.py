"""What a judged kernel leaves for people under profile_data/: an XProf run, the scheduled HLO, the bundle dumps."""

import re
import shutil
from pathlib import Path

from judge.llo.timeline import module_trace
from judge.pipeline import Judging, Verdict
from judge.roofline import Figures
from judge.trace import write_run

KEPT_RUNS = 40  # older ones are removed: dumps are megabytes each
_NOTE = (
    "SIMULATED: no TPU ran this. The TPU compiler's final schedule was executed on a cycle model: bundles in order, "
    "held back by results and units; DMAs by latency, bandwidth and length of runs."
)


def save(folder: Path, name: str, judging: Judging, verdict: Verdict) -> None:
    """Leaves run `name` in `folder`/profile_data, where the judging got as far as figures.

    The profile is for people: what goes wrong with writing it is said, and costs no verdict.
    """
    if verdict.total is None:
        return
    profile_dir = folder / "profile_data"
    try:
        if judging.costs:
            _save_simulated(profile_dir, name, judging, verdict.total)
        else:
            _save_measured(profile_dir, name, judging.folder / "measure" / "profile")
        _prune(profile_dir)
    except (OSError, ValueError) as error:
        judging.progress(f"no profile was written: {error}")


def _save_simulated(profile_dir: Path, name: str, judging: Judging, total: Figures) -> None:
    chip, compiled = judging.task.chip, judging.folder / "compile"
    run = _unused(profile_dir, name)
    modules = [
        module_trace(workload, number, cost, (compiled / workload / "module.pb").read_bytes())
        for number, (workload, cost) in enumerate(judging.costs.items(), 1)
    ]
    write_run(
        profile_dir,
        run,
        device_type=f"TPU {chip.name} (simulated)",
        peak_tflops=chip.peak_flops_per_second["bf16"] / 1e12,
        peak_hbm_gb_per_s=chip.hbm_bytes_per_second / 1e9,
        modules=modules,
        notes=[_NOTE],
        mxu_util_pct=total.mfu_pct,
        hbm_util_pct=total.bw_util_pct,
    )
    for workload in judging.costs:
        dumps = profile_dir / "dumps" / run / workload
        dumps.mkdir(parents=True)
        for path in (compiled / workload).iterdir():
            if path.name == "hlo.txt" or path.name.endswith("final_bundles.txt"):
                shutil.copyfile(path, dumps / re.sub(r"^\d+-", "", path.name))


def _save_measured(profile_dir: Path, name: str, recorded: Path) -> None:
    for run in (recorded / "plugins" / "profile").glob("*"):
        shutil.copytree(run, profile_dir / "plugins" / "profile" / _unused(profile_dir, name))


def _unused(profile_dir: Path, name: str) -> str:
    """`name`, or `name-2` … : XProf goes on serving its caches of a run that is written again."""
    run, number = name, 1
    while (profile_dir / "plugins" / "profile" / run).exists() or (profile_dir / "dumps" / run).exists():
        number += 1
        run = f"{name}-{number}"
    return run


def _prune(profile_dir: Path) -> None:
    for kind in ("plugins/profile", "dumps"):
        runs = sorted((profile_dir / kind).glob("*"), key=lambda path: path.stat().st_mtime)
        for run in runs[:-KEPT_RUNS]:
            shutil.rmtree(run, ignore_errors=True)
