"""Races between copies and computation, found by running the traced program in the strict interpreter.

    python -I strict.py REQUEST.json

The same jaxpr that is timed runs once more with every DMA held back until it is waited for, every memory filled with
NaN, reads out of bounds an error, and each access checked against the others with vector clocks. What is read before
its copy is waited for is then wrong as well as a race. Covered: DMAs, semaphores, VMEM, SMEM and HBM accesses of every
Pallas kernel in the program, on one small check set of each workload in the timed shapes; and, without the data, on the
scalars of the timed inputs (follow.py). What cannot be followed so runs in the strict interpreter on the timed inputs.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# What a kernel does that the compiler does not order by itself.
MANUAL = ("dma_start", "dma_wait", "semaphore_signal", "semaphore_wait")
# How XLA passes on what the interpreter, Python that it calls back, has raised.
_FROM_INTERPRETER = "CpuCallback error"


class Race(Exception):
    """FAIL_RACE, with what was seen."""


class NotRun(Exception):
    """XLA's own failure on this machine, such as memory that it did not get: nothing is said about the program."""


def strictly(program: Any, inputs: list[Any], where: str) -> list[Any] | None:
    """Outputs of the program in the strict interpreter; None where it knows the program not, which copies nothing by
    hand either, so has no wait to forget. Raises Race, NotRun."""
    import jax
    from jax.extend import core

    from judge import jax_shims
    from judge.worker import work

    try:
        with work():
            lowered = jax.jit(core.jaxpr_as_fun(jax_shims.strict(program))).lower(*inputs)
            run = lowered.compile(compiler_options=jax_shims.in_haste(inputs))
    except Exception as error:
        if not jax_shims.find_primitives(program, MANUAL):
            return None
        told = _last_line(error)
        raise Race(
            f"{where}: the strict interpreter, which looks for races, does not know this program: {told}"
        ) from error
    try:
        with work():
            outputs = run(*inputs)
            jax.block_until_ready(outputs)
    except Exception as error:
        told = _last_line(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and _FROM_INTERPRETER not in str(error):
            raise NotRun(
                f"{where}: XLA could not run the strict interpreter on this machine: {told} (more free memory may help)"
            ) from error
        raise Race(f"{where}: the strict interpreter stops: {told}") from error
    finally:
        race = jax_shims.race_found()
        jax_shims.reset_strict()
    if race:
        raise Race(f"{where}: {race} touch the same memory with no wait between them")
    return list(outputs)


def _compare(sealed: ModuleType, inputs: list[Any], got: list[Any], where: str) -> None:
    """Raises Race where the strict interpreter's outputs are not the oracle's."""
    import numpy as np

    from judge import oracle

    want, _ = oracle.reference(sealed, inputs)
    try:
        oracle.compare_all(sealed, list(map(np.asarray, got)), want, inputs, where)
    except oracle.Mismatch as mismatch:
        raise Race(f"{mismatch}; right when copies are instant, wrong when each ends as late as it may") from None


def _follow(sealed: ModuleType, arguments: dict[str, Any], program: Any, integers: Path, name: str) -> None:
    """The program on the timed scalars; on the timed inputs where they do not tell what it does. Raises as strictly."""
    import jax
    import numpy as np

    from judge import copies, follow, oracle

    where = f"workload {name}, timed inputs"
    try:
        with np.load(integers) as saved:
            follow.follow(program, {int(key): saved[key] for key in saved.files})
    except copies.Broken as broken:
        raise Race(f"{where}: {broken}") from None
    except follow.Unfollowable as reason:
        inputs = oracle.inputs_of(sealed, oracle.TIMED_SEED, arguments)
        if strictly(program, [jax.numpy.array(array, copy=True) for array in inputs], where) is None:
            raise Race(f"{where}: neither interpreter knows this program: {reason}") from None


def _last_line(error: Exception) -> str:
    """The line of a long message that names the error."""
    told = str(error).strip().splitlines() or [type(error).__name__]
    return next((text for text in reversed(told) if "Error" in text or "ut-of-bounds" in text), told[0]).strip()[:400]


def check(request: dict[str, Any]) -> dict[str, Any]:
    """One check set a workload. Raises Race, NotRun."""
    import jax

    from judge import jax_shims, oracle, wire
    from judge.worker import load_kernel

    sealed = load_kernel(Path(request["sealed"]))
    device = jax_shims.topology_device(request["topology"])
    count = 0
    for name, arguments in oracle.workloads_of(sealed).items():
        if name not in request["workloads"]:
            continue
        with jax_shims.on_chip(device):
            program = wire.loads(Path(request["workloads"][name]["program"]).read_bytes())
        if not jax_shims.find_primitives(program, jax_shims.PALLAS_CALLS):
            continue
        label, (seed, changed) = oracle.strict_set(sealed, arguments, request["secret"])
        where = f"workload {name}, check {label!r}"
        inputs = oracle.inputs_of(sealed, seed, changed)
        with jax_shims.on_chip(device):
            got = strictly(program, [jax.numpy.array(array, copy=True) for array in inputs], where)
        if got is not None:
            _compare(sealed, inputs, got, where)
            count += 1
        with jax_shims.on_chip(device):
            _follow(sealed, arguments, program, Path(request["workloads"][name]["integers"]), name)
    return {"status": "PASS", "checks": count}


def main() -> None:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from judge import containment, jax_shims, views
    from judge.worker import write_result

    jax_shims.set_environment()
    request = json.loads(Path(sys.argv[1]).read_text())
    containment.enter(containment.Need(readable=(str(Path(request["out"]).parent),), writable=(request["out"],)))
    jax_shims.check_version()
    jax_shims.patch_interpreter()
    jax_shims.patch_detector()
    views.patch()
    try:
        result = check(request)
    except Race as race:
        result = {"status": "FAIL_RACE", "reason": str(race)}
    except NotRun as failure:
        result = {"status": "CANNOT_JUDGE", "reason": str(failure)}
    write_result(request, result)


if __name__ == "__main__":
    main()
