"""Expected outputs and the comparison, in a process of its own.

    python -I oracle.py REQUEST.json

The sealed kernel file (the lineage's baseline, or the file itself in a dry run) gives inputs, reference and
tolerances; the candidate's CPU artifact is a pure program that runs on copies of the same inputs. Covered: shape,
dtype and tree of every output, a non-finite value where the oracle has none, error beyond tolerance, to the bit where
the tolerance is 0. Not covered: races, reads of memory never written.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

# Relative to the value and to the RMS of the output, by the lowest precision among inputs and that output.
DEFAULT_TOLERANCE = {"bfloat16": 2e-2, "float16": 5e-3, "float8": 1e-1, "float32": 1e-3, "float64": 1e-6}
TIMED_SEED = 0
SMALL_INTEGER_BYTES = 16 << 20  # larger integer arrays cannot be scalars of a program


class Mismatch(Exception):
    """An output that is not what the oracle says: FAIL_CORRECTNESS."""


class ProgramError(Exception):
    """The candidate's CPU program cannot be loaded, compiled or run: FAIL_CRASH."""


class SealError(Exception):
    """The sealed file itself does not work: the judge cannot judge."""


def workloads_of(sealed: ModuleType) -> dict[str, dict[str, Any]]:
    """Name → keyword arguments. A file without WORKLOADS has one, named `default`."""
    workloads = getattr(sealed, "WORKLOADS", None)
    if workloads is None:
        return {"default": {}}
    if not isinstance(workloads, Mapping) or not workloads:
        raise SealError("WORKLOADS must map at least one name to keyword arguments")
    for name, arguments in workloads.items():
        if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
            raise SealError(f"WORKLOADS: {name!r} is not a name (letters, digits, - and _)")
        if not isinstance(arguments, Mapping):
            raise SealError(f"WORKLOADS[{name!r}] must be a dict of keyword arguments")
    return {name: dict(arguments) for name, arguments in workloads.items()}


def inputs_of(sealed: ModuleType, seed: int, arguments: dict[str, Any]) -> list[np.ndarray]:
    """The arrays that generate_inputs makes from a seed, on the host."""
    import jax

    made = sealed.generate_inputs(jax.random.key(seed), **arguments)
    if not isinstance(made, tuple | list) or not made:
        raise SealError("generate_inputs must return a tuple of arrays")
    arrays = [np.asarray(array) for array in made]
    if any(array.dtype == object for array in arrays):
        raise SealError("generate_inputs must return a tuple of arrays, not nested containers")
    return arrays


def describe(sealed: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    """Shapes, integer inputs (saved beside), FLOPs and compulsory bytes of each workload's timed inputs."""
    out = Path(request["out"])
    chosen = request["workloads"]
    workloads = workloads_of(sealed)
    unknown = sorted(set(chosen) - set(workloads))
    if unknown:
        return {"status": "UNKNOWN", "reason": f"no workload {', '.join(unknown)}; the file has {', '.join(workloads)}"}
    described = {}
    for name in chosen or workloads:
        arguments = workloads[name]
        inputs = inputs_of(sealed, TIMED_SEED, arguments)
        integers = {
            str(i): array
            for i, array in enumerate(inputs)
            if array.dtype.kind in "iub" and array.nbytes <= SMALL_INTEGER_BYTES
        }
        np.savez(out / f"{name}.npz", **integers)  # type: ignore[arg-type]
        described[name] = {
            "inputs": [{"shape": list(array.shape), "dtype": str(array.dtype)} for array in inputs],
            "flops": float(sealed.compute_flops(**arguments)),
            "compulsory_bytes": _compulsory_bytes(sealed, arguments, inputs),
        }
    return {"status": "PASS", "workloads": described}


def _compulsory_bytes(sealed: ModuleType, arguments: dict[str, Any], inputs: list[np.ndarray]) -> float:
    """compute_bytes(), or every input and output once."""
    if hasattr(sealed, "compute_bytes"):
        return float(sealed.compute_bytes(**arguments))
    import jax

    outputs = jax.tree.leaves(jax.eval_shape(sealed.reference_fn, *inputs))
    return float(sum(a.nbytes for a in inputs) + sum(math.prod(o.shape) * np.dtype(o.dtype).itemsize for o in outputs))


def check_sets(sealed: ModuleType, arguments: dict[str, Any]) -> dict[str, tuple[int, dict[str, Any]]]:
    """Name → (seed, keyword arguments) of the inputs on which one workload is checked.

    CHECKS first, because they are cheap; last the very inputs whose time counts, so that no kernel may treat them
    otherwise. A file without CHECKS is checked on other values of the timed shapes instead.
    """
    checks = getattr(sealed, "CHECKS", None)
    if not checks:
        sets = {"seed 1": (1, arguments)}
    else:
        sets = {
            name: (int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"), {**arguments, **changes})
            for name, changes in checks.items()
        }
    return {**sets, "timed inputs": (TIMED_SEED, arguments)}


def check(sealed: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    """Runs every workload's CPU artifact on every check set. Raises Mismatch."""
    import jax
    from jax import export

    from judge import jax_shims

    count = 0
    for name, arguments in workloads_of(sealed).items():
        if name not in request["workloads"]:
            continue
        workload = request["workloads"][name]
        with _blaming_the_program(f"workload {name}"):
            exported = export.deserialize(bytearray(Path(workload["artifact"]).read_bytes()))
            run = jax_shims.compile_cpu(exported.call, exported.in_avals, tuple(workload["donated"]))
        for label, (seed, changed) in check_sets(sealed, arguments).items():
            inputs = inputs_of(sealed, seed, changed)
            shapes = [(array.shape, str(array.dtype)) for array in inputs]
            traced = [(tuple(aval.shape), str(aval.dtype)) for aval in exported.in_avals]
            if shapes != traced:
                raise SealError(f"workload {name}, check {label!r}: inputs {shapes} are not the timed ones {traced}")
            where = f"workload {name}, check {label!r}"
            with _blaming_the_program(where):
                got = run(*(jax.numpy.array(array, copy=True) for array in inputs))
                got_leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(got)]
            # What kernel_fn gets on a chip: NumPy's own promotion would make float64 of int32 × float32.
            want = sealed.reference_fn(*map(jax.numpy.asarray, inputs))
            want_leaves, want_tree = jax.tree.flatten(want)
            if str(want_tree) != workload["tree"]:
                raise Mismatch(f"{where}: kernel_fn returns {workload['tree']}, reference_fn {want_tree}")
            if len(got_leaves) != len(want_leaves):
                raise Mismatch(f"{where}: {len(got_leaves)} outputs, reference_fn has {len(want_leaves)}")
            tolerances = _tolerances(sealed, len(want_leaves))
            lowest = _lowest_precision(inputs)
            for i, (g, w) in enumerate(zip(got_leaves, want_leaves, strict=True)):
                compare(g, np.asarray(w), tolerances[i], lowest, f"{where}, output {i}")
            count += 1
    return {"status": "PASS", "checks": count}


@contextmanager
def _blaming_the_program(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).strip()[:2000]}"
        raise ProgramError(f"{where}: running the CPU program raised {message}") from error


def _tolerances(sealed: ModuleType, count: int) -> list[Any]:
    tolerance = getattr(sealed, "TOLERANCE", None)
    if isinstance(tolerance, list | tuple):
        if len(tolerance) != count:
            raise SealError(f"TOLERANCE has {len(tolerance)} entries for {count} outputs")
        return list(tolerance)
    return [tolerance] * count


def _lowest_precision(inputs: list[np.ndarray]) -> str:
    names = [str(array.dtype) for array in inputs]
    return next((d for d in ("bfloat16", "float16", "float32") if d in names), "float64")


def limits(tolerance: Any, want: np.ndarray, lowest: str) -> tuple[float, float]:
    """(rtol, atol) of |got - want| ≤ atol + rtol × |want|: declared, or by precision, atol in units of the RMS."""
    if isinstance(tolerance, Mapping):
        return float(tolerance.get("rtol", 0)), float(tolerance.get("atol", 0))
    if tolerance is not None:
        return float(tolerance), float(tolerance)
    own = "float8" if str(want.dtype).startswith("float8") else str(want.dtype)
    relative = max(DEFAULT_TOLERANCE.get(lowest, 0.0), DEFAULT_TOLERANCE.get(own, 0.0))
    finite = np.abs(want[np.isfinite(want)]).astype(np.float64)
    rms = float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
    return relative, relative * rms


def compare(got: np.ndarray, want: np.ndarray, tolerance: Any, lowest: str, where: str) -> None:
    """Raises Mismatch that names the worst element."""
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Mismatch(
            f"{where}: kernel_fn gives {got.dtype}{list(got.shape)}, reference_fn {want.dtype}{list(want.shape)}"
        )
    bits = f"u{got.dtype.itemsize}" if got.dtype.itemsize in (1, 2, 4, 8) else got.dtype
    if np.array_equal(np.ascontiguousarray(got).view(bits), np.ascontiguousarray(want).view(bits)):
        return
    if got.dtype.kind in "iub" or tolerance == 0:
        same = got == want
        if got.dtype.kind not in "iub":
            same |= (got != got) & (want != want)  # NaN where the oracle has NaN
        if not same.all():
            _report(~same, got, want, f"{where}: must equal the oracle to the bit")
        return
    rtol, atol = limits(tolerance, want, lowest)
    wide = got.dtype if got.dtype in (np.float64, np.complex64, np.complex128) else np.float32
    g, w = got.astype(wide), want.astype(wide)
    finite = np.isfinite(w)
    bad = ~finite & ~((g == w) | (np.isnan(g) & np.isnan(w)))
    if bad.any():
        _report(bad, got, want, f"{where}: differs where the oracle is not finite")
    bad = finite & ~np.isfinite(g)
    if bad.any():
        _report(bad, got, want, f"{where}: not finite where the oracle is")
    with np.errstate(invalid="ignore"):
        bad = finite & (np.abs(g - w) > atol + rtol * np.abs(w))
    if bad.any():
        _report(bad, got, want, f"{where}: off by more than {atol:.3g} + {rtol:.3g} × |expected|")


def _report(bad: np.ndarray, got: np.ndarray, want: np.ndarray, what: str) -> None:
    wide = np.complex128 if got.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(bad, np.nan_to_num(np.abs(got.astype(wide) - want.astype(wide)), nan=np.inf), -1)
    worst = np.unravel_index(int(error.argmax()), error.shape)
    share = 100 * np.count_nonzero(bad) / bad.size
    raise Mismatch(
        f"{what} in {np.count_nonzero(bad)} of {bad.size} elements ({share:.3g} %); worst at "
        f"{[int(i) for i in worst]}: got {got[worst]}, expected {want[worst]}"
    )


def main() -> None:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from judge import jax_shims
    from judge.worker import load_kernel, where, write_result

    jax_shims.set_environment()
    request = json.loads(Path(sys.argv[1]).read_text())
    path = Path(request["sealed"])
    jax_shims.check_version()
    blame = "FAIL_CRASH"  # the status where the sealed file is the candidate itself, in a dry run
    try:
        sealed = load_kernel(path)
        blame = "FAIL_CONTRACT"
        result = {"describe": describe, "check": check}[request["do"]](sealed, request)
    except Mismatch as mismatch:
        result = {"status": "FAIL_CORRECTNESS", "reason": str(mismatch)}
    except ProgramError as error:
        result = {"status": "FAIL_CRASH", "reason": str(error)}
    except SealError as error:
        result = {"status": "SEAL", "blame": blame, "reason": str(error)}
    except (Exception, SystemExit) as error:
        what = "importing the kernel file raised" if blame == "FAIL_CRASH" else "the problem's definition raised"
        result = {"status": "SEAL", "blame": blame, "reason": f"{what} {where(error, path)}"}
    write_result(request, result)


if __name__ == "__main__":
    main()
