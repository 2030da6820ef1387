"""Compiles the corpus ahead of time for a chip, with libtpu's own profile of each kernel where it can make one.

    python benchmarks/corpus/build.py --chip v5e [--group micro|published] [--only REGEX] [--profile] [--missing]

Leaves, in `<out>/<chip>/<name>/`: `hlo.txt` and the dumps of every HLO op, as judge/compile.py does; `scalars.npz`
(index of an entry parameter → its values); `kernel.json` (group, kind); with `--profile` also `static_profile.json`
(HLO op → estimated cycles) and, for the kernel itself, `profile/<op>_critical_path.txt` and
`profile/<op>_bundles.txt`, the bundles in the order executed. `<out>/<chip>/failed.json` says which kernels do not
compile, and why. libtpu reads its flags once and its profile can explode, so that workers in processes of their own
do the compiling, within limits of time and memory; what a worker dies of costs that one kernel alone.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent.parent
OUT = PROJECT / ".ratchet" / "corpus"
BATCH = 12  # kernels a process
LIMIT_SECONDS = 180.0  # a kernel
LIMIT_BYTES = 8 << 30  # a process
DIED = "the compiler died: "
PROFILE_LIMIT_BYTES = 64 << 20  # a raw profile file; larger ones are not kept


def main() -> int:
    arguments = parse_arguments()
    if arguments.worker is not None:
        return work(json.loads(arguments.worker))
    set_environment()
    names = chosen(arguments.chip, arguments.group, arguments.only)
    folder = arguments.out / arguments.chip
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.missing:
        names = [name for name in names if not (folder / name).exists()]
    # Only what libtpu can unroll: its profile of thousands of grid steps takes all of the memory.
    profiled = [name for name in names if arguments.profile and registered(name).profiled]
    failures = build(profiled, arguments.chip, folder, profile=True)
    failures |= build([name for name in names if name not in profiled], arguments.chip, folder, profile=False)
    record_failures(folder / "failed.json", names, failures)
    print(f"{arguments.chip}: {len(names) - len(failures)} of {len(names)} kernels built in {folder}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="v5e", choices=("v5e", "v6e", "v5p", "tpu7x"))
    parser.add_argument("--group", choices=("micro", "published", "speed"), help="default: all")
    parser.add_argument("--only", default="", help="regular expression that names must match")
    parser.add_argument("--profile", action="store_true", help="also libtpu's own estimate, where it is feasible")
    parser.add_argument("--missing", action="store_true", help="only those not built yet")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def set_environment() -> None:
    sys.path[:0] = [str(PROJECT)]
    from judge import jax_shims

    jax_shims.set_environment()


def chosen(chip: str, group: str | None, only: str) -> list[str]:
    """Names of the kernels that are made for the chip, of the group, and match."""
    from benchmarks.corpus import kernels

    registries = {"micro": kernels.MICRO, "published": kernels.PUBLISHED, "speed": kernels.SPEED}
    return [
        name
        for label, registry in registries.items()
        if group in (None, label)
        for name, kernel in registry.items()
        if chip in kernel.chips and re.search(only, name)
    ]


def registered(name: str) -> Any:
    """The kernel of that name."""
    from benchmarks.corpus import kernels

    return (kernels.MICRO | kernels.PUBLISHED | kernels.SPEED)[name]


def build(names: list[str], chip: str, folder: Path, profile: bool) -> dict[str, str]:
    """Builds all of them, a batch a process. Returns name → why it failed."""
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="corpus-") as rescued:
        request = {"chip": chip, "folder": str(folder), "profile": profile, "rescued": rescued}
        failures |= build_batches(names, request)
        died = {name: text for name, text in failures.items() if text.startswith(DIED)} if profile else {}
        # The profile ends the process on what it does not know; the kernel itself may well compile.
        failures |= dict.fromkeys(died, "") | build_batches(list(died), {**request, "profile": False})
        for name, text in died.items():
            if not failures[name] and not attach_profile(Path(rescued) / name, folder / name):
                failures[name] = f"compiles, but has no profile: {text}"
    return {name: text for name, text in failures.items() if text}


def build_batches(names: list[str], request: dict[str, Any]) -> dict[str, str]:
    """One process after the other, until each kernel is built or has failed."""
    failures: dict[str, str] = {}
    left = list(names)
    while left:
        reports = run_worker({**request, "names": left[:BATCH]})
        failures |= {name: text for name, text in reports.items() if text}
        left = [name for name in left if name not in reports]
        print(f"{request['chip']}: {len(names) - len(left)} of {len(names)}, {len(failures)} failed", flush=True)
    return failures


def attach_profile(rescued: Path, target: Path) -> bool:
    """Keeps the profile of a worker that died, where it was written before: on tpu7x libtpu dies of what follows."""
    if not target.exists() or not any(rescued.glob("*.textproto")):
        return False
    keep_profile(rescued, target)
    return True


def run_worker(request: dict[str, Any]) -> dict[str, str]:
    """Runs one process. Returns name → "" or its error, for each kernel that it came to; never an empty answer."""
    with tempfile.TemporaryDirectory(prefix="corpus-") as scratch:
        log = Path(scratch) / "log.jsonl"
        log.touch()
        command = [sys.executable, __file__, "--worker", json.dumps({**request, "scratch": scratch})]
        with (Path(scratch) / "stderr").open("w") as errors:
            process = subprocess.Popen(command, stderr=errors, stdout=errors)
            why = watch(process, log)
        reports = dict(json.loads(line) for line in log.read_text().splitlines())
        if len(reports) < len(request["names"]):
            victim = request["names"][len(reports)]
            shutil.copytree(Path(scratch) / "profile", Path(request["rescued"]) / victim)
            reports[victim] = DIED + (why or last_words((Path(scratch) / "stderr").read_text()))
        return reports


def last_words(text: str) -> str:
    """The fatal line of libtpu's log, or the end of it."""
    fatal = re.search(r"^F\d{4} .*", text, re.M)
    return (fatal[0] if fatal else text[-400:])[:600]


def watch(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Waits for the worker, and ends it where one kernel takes too long or too much. Returns why, or nothing."""
    try:
        while process.poll() is None:
            time.sleep(0.2)
            started = log.stat().st_mtime
            if time.time() - started > LIMIT_SECONDS:
                process.kill()
                return f"took more than {LIMIT_SECONDS:.0f} s"
            if resident_bytes(process.pid) > LIMIT_BYTES:
                process.kill()
                return f"took more than {LIMIT_BYTES >> 30} GiB of memory"
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    return ""


def resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def record_failures(path: Path, names: list[str], failures: dict[str, str]) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    built = {name: text for name, text in known.items() if name not in names and (path.parent / name).exists()}
    known = built | failures
    path.write_text(json.dumps(known, indent=1) + "\n")


# --- in the worker --------------------------------------------------------------------------------------------------


def work(request: dict[str, Any]) -> int:
    """Compiles the batch, and logs a line as each kernel is done."""
    set_environment()
    dump, profile = Path(request["scratch"]) / "dump", Path(request["scratch"]) / "profile"
    dump.mkdir()
    profile.mkdir()
    flags = [
        f"--xla_jf_dump_to={dump}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=final",
    ]
    if request["profile"]:
        flags += [
            f"--xla_jf_dump_static_llo_profile_to={profile}",
            "--xla_tpu_impure_dump_critical_path=true",
            "--xla_tpu_impure_dump_unrolled_bundles=true",
        ]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags)
    for name in request["names"]:
        try:
            compile_kernel(name, request["chip"], dump, profile, Path(request["folder"]))
            error = ""
        except Exception as exception:
            error = f"{type(exception).__name__}: {exception}"[:1500] or "failed"
        for left in (*dump.iterdir(), *profile.iterdir()):
            left.unlink()
        with (Path(request["scratch"]) / "log.jsonl").open("a") as log:
            log.write(json.dumps([name, error]) + "\n")
    return 0


def compile_kernel(name: str, chip: str, dump: Path, profile: Path, folder: Path) -> None:
    """Compiles one and puts its folder in place at once."""
    import jax
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    from benchmarks.corpus import kernels
    from judge import jax_shims
    from judge.chips import load_chip

    kernel = registered(name)
    case = kernel.build()
    device = jax_shims.topology_device(load_chip(chip).topology)
    sharding = SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in case.shapes]
    with jax_shims.on_chip(device):
        compiled = jax.jit(case.function, donate_argnums=case.donated).lower(*shapes).compile()
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as temporary:
        target = Path(temporary) / name
        target.mkdir()
        (target / "hlo.txt").write_text(compiled.as_text() or "")
        scalars: dict[str, Any] = {str(index): values for index, values in case.scalars.items()}
        np.savez(target / "scalars.npz", **scalars)
        group = "micro" if name in kernels.MICRO else "published" if name in kernels.PUBLISHED else "speed"
        (target / "kernel.json").write_text(json.dumps({"group": group, "kind": kernel.kind}))
        keep_dumps(dump, target)
        if any(profile.iterdir()):
            keep_profile(profile, target)
        shutil.rmtree(folder / name, ignore_errors=True)
        target.rename(folder / name)


def keep_dumps(dump: Path, target: Path) -> None:
    from judge.compile import KEPT_DUMPS

    for path in dump.iterdir():
        if path.name.endswith(KEPT_DUMPS) and "schedule-analysis" not in path.name:
            shutil.move(path, target / path.name)


def keep_profile(profile: Path, target: Path) -> None:
    """Estimates of every op as JSON, and the raw files of reasonable size."""
    cycles: dict[str, int] = {}
    shutil.rmtree(target / "profile", ignore_errors=True)
    (target / "profile").mkdir()
    for path in sorted(profile.iterdir()):
        if path.name.endswith(".textproto"):
            text = path.read_text()
            names = re.findall(r'hlo_op_name: "([^"]*)"', text)
            cycles |= dict(zip(names, map(int, re.findall(r"estimated_cycles: (\d+)", text)), strict=True))
        if path.stat().st_size <= PROFILE_LIMIT_BYTES:
            shutil.move(path, target / "profile" / path.name)
    (target / "static_profile.json").write_text(json.dumps(cycles, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
