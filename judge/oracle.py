"""Expected outputs and the comparison, in a process of its own.

    python -I oracle.py REQUEST.json

The sealed kernel file (the lineage's baseline, or the file itself in a dry run) gives inputs, reference and
tolerances; the candidate's CPU artifact is a pure program that runs on copies of the same inputs. Covered: shape,
dtype and tree of every output, a non-finite value where the oracle has none, error beyond tolerance, to the bit where
the tolerance is 0; a slice of an input changed at random changes what it should and nothing else; two runs agree.
Not covered: races, reads of memory never written (strict.py).
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

# Relative to the value and to the RMS of the output, by the lowest precision among inputs and that output.
DEFAULT_TOLERANCE = {"bfloat16": 2e-2, "float16": 5e-3, "float8": 1e-1, "float32": 1e-3, "float64": 1e-6}
TIMED_SEED = 0
RACES = "races"
SECRET = "secret seed"
TIMED = "timed inputs"
_STRETCH = 1 << 15  # elements
SMALL_INTEGER_BYTES = 16 << 20  # larger integer arrays cannot be scalars of a program


_Job = tuple[str, str, int, dict[str, Any]]  # workload, check set, seed, keyword arguments


class Mismatch(Exception):
    """An output that is not what the oracle says: FAIL_CORRECTNESS."""


class ProgramError(Exception):
    """The candidate's CPU program cannot be loaded, compiled or run: FAIL_CRASH."""


class SealError(Exception):
    """The sealed file itself does not work: the judge cannot judge."""


class Altered(Exception):
    """What is kept of the sealed file, in a folder that anybody may write to, is not what it gives."""


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
        told = f"no workload {', '.join(unknown)}; the file has {', '.join(workloads)}"
        return {"status": "CANNOT_JUDGE", "reason": told}
    described = {}
    for name in chosen or workloads:
        inputs = inputs_of(sealed, TIMED_SEED, workloads[name])
        np.savez(out / f"{name}.npz", **_scalars(inputs))  # type: ignore[arg-type]
        described[name] = _description(sealed, workloads[name], inputs)
    return {"status": "PASS", "workloads": described}


def _description(sealed: ModuleType, arguments: dict[str, Any], inputs: list[np.ndarray]) -> dict[str, Any]:
    return {
        "inputs": [{"shape": list(array.shape), "dtype": str(array.dtype)} for array in inputs],
        "flops": float(sealed.compute_flops(**arguments)),
        "declares_bytes": hasattr(sealed, "compute_bytes"),
        "compulsory_bytes": _compulsory_bytes(sealed, arguments, inputs),
    }


def _check_description(
    sealed: ModuleType, name: str, arguments: dict[str, Any], inputs: list[np.ndarray], folder: Path
) -> None:
    """Raises Altered where a workload's kept description, by which it is timed, is not of these inputs."""
    said = json.loads((folder / "result.json").read_text())["workloads"][name]
    with np.load(folder / f"{name}.npz") as saved:
        scalars = {key: saved[key] for key in saved.files}
    own = _scalars(inputs)
    same = own.keys() == scalars.keys() and all(np.array_equal(own[key], scalars[key]) for key in own)
    if not same or said != _description(sealed, arguments, inputs):
        raise Altered(f"workload {name}: its lengths, FLOPs or bytes")


def _compulsory_bytes(sealed: ModuleType, arguments: dict[str, Any], inputs: list[np.ndarray]) -> float:
    """compute_bytes(), or every input and output once."""
    if hasattr(sealed, "compute_bytes"):
        return float(sealed.compute_bytes(**arguments))
    import jax

    outputs = jax.tree.leaves(jax.eval_shape(sealed.reference_fn, *inputs))
    return float(sum(a.nbytes for a in inputs) + sum(math.prod(o.shape) * np.dtype(o.dtype).itemsize for o in outputs))


def check_sets(sealed: ModuleType, arguments: dict[str, Any], secret: int) -> dict[str, tuple[int, dict[str, Any]]]:
    """Name → (seed, keyword arguments) of the inputs on which one workload is checked.

    CHECKS first, because they are cheap: an argument that is None there is drawn from `secret`, a number that nobody
    knew before the artifacts existed, and so are the values of such a set. Without one, other values of the first set
    are drawn from the secret; a file without CHECKS is checked on secret values of the timed shapes. Last come the
    inputs whose time counts, so that no kernel may treat them otherwise (`timed_inputs` has their values).
    """
    checks = getattr(sealed, "CHECKS", None) or {}
    sets = {}
    for name, changes in checks.items():
        drawn = {key: secret if value is None else value for key, value in changes.items()}
        seed = secret if is_drawn(changes) else int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        sets[name] = (seed, {**arguments, **drawn})
    if not any(map(is_drawn, checks.values())):
        sets[SECRET] = (secret, next(iter(sets.values()))[1] if sets else arguments)
    return {**sets, TIMED: (TIMED_SEED, arguments)}


def timed_inputs(
    sealed: ModuleType, arguments: dict[str, Any], timed: list[np.ndarray], secret: int
) -> list[np.ndarray]:
    """The scalars whose time counts, with other data than `timed`, which are those of the published seed: whoever
    knows that could bake its answer in. All but the scalars is drawn from the secret, where that is finite."""
    drawn = inputs_of(sealed, secret, arguments)
    if [array.shape for array in timed] != [array.shape for array in drawn]:
        return timed
    return [new if not _is_scalar_data(old) and _is_finite(new) else old for old, new in zip(timed, drawn, strict=True)]


def _scalars(inputs: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {str(i): array for i, array in enumerate(inputs) if _is_scalar_data(array)}


def _is_scalar_data(array: np.ndarray) -> bool:
    """Whether these may be what steers a program."""
    return array.dtype in (np.int32, np.uint32) and array.nbytes <= SMALL_INTEGER_BYTES


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype.kind in "iub" or bool(np.isfinite(array).all())


def is_drawn(changes: Mapping[str, Any]) -> bool:
    """Whether a check set is drawn anew for each judging."""
    return any(value is None for value in changes.values())


def strict_set(sealed: ModuleType, arguments: dict[str, Any], secret: int) -> tuple[str, tuple[int, dict[str, Any]]]:
    """The check set that the strict interpreter runs: the one named `races`, else the first; small ones are fast."""
    sets = check_sets(sealed, arguments, secret)
    name = RACES if RACES in sets else next(iter(sets))
    return name, sets[name]


def check(sealed: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    """Runs every workload's CPU artifact on every check set. Raises Mismatch."""
    from judge import expected

    asked, secret = request["workloads"], request["secret"]
    known, new = request.get("expected"), Path(request["out"])
    # One at a time, in a thread that nothing waits for: a workload is checked while the next one is compiled.
    compiler = ThreadPoolExecutor(1)
    programs = {name: compiler.submit(_Program, name, workload) for name, workload in asked.items()}
    jobs = _jobs(sealed, asked, secret)

    def made(job: _Job) -> list[np.ndarray]:
        name, label, seed, changed = job
        inputs = inputs_of(sealed, seed, changed)
        if label != TIMED:
            return inputs
        if "described" in request:  # by what was kept
            _check_description(sealed, name, changed, inputs, Path(request["described"]))
        return timed_inputs(sealed, changed, inputs, secret)

    with _Beside() as beside:
        for (name, label, seed, changed), inputs in _made_ahead(made, jobs):
            program = programs[name].result()
            program.check_shapes(inputs, label)
            one = _CheckSet(sealed, program, inputs, f"workload {name}, check {label!r}", beside)
            if label == TIMED:
                one.agree()
            elif seed == secret:
                one.agree_and_follow(secret)
            else:
                kept = expected.file_name(name, label, seed, changed)
                one.agree_with_kept(Path(known) / kept if known else None, new / kept)
    return {"status": "PASS", "checks": len(jobs)}


def _jobs(sealed: ModuleType, names: Collection[str], secret: int) -> list[_Job]:
    return [
        (name, label, seed, changed)
        for name, arguments in workloads_of(sealed).items()
        if name in names
        for label, (seed, changed) in check_sets(sealed, arguments, secret).items()
    ]


def confirm(sealed: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    """Runs the reference on every check set whose outputs are kept. Raises Altered where it gives others."""
    from judge import expected

    secret, folder = request["secret"], Path(request["expected"])
    jobs = [job for job in _jobs(sealed, request["workloads"], secret) if job[1] != TIMED and job[2] != secret]
    for (name, label, seed, changed), inputs in _made_ahead(lambda job: inputs_of(sealed, job[2], job[3]), jobs):
        want, tree = reference(sealed, inputs)
        kept = expected.load(folder / expected.file_name(name, label, seed, changed), want, tree)
        if kept is None or any(map(_is_other, kept, want)):
            raise Altered(f"workload {name}, check {label!r}: the reference's outputs")
    return {"status": "PASS", "checks": len(jobs)}


def _is_other(one: np.ndarray, other: np.ndarray) -> bool:
    return (one.shape, one.dtype) != (other.shape, other.dtype) or bool(_differ(one, other).any())


def reference(sealed: ModuleType, inputs: list[np.ndarray]) -> tuple[list[np.ndarray], str]:
    """(outputs, their tree) of the oracle."""
    import jax

    from judge.worker import work

    # What kernel_fn gets on a chip: NumPy's own promotion would make float64 of int32 × float32.
    with work():
        leaves, tree = jax.tree.flatten(sealed.reference_fn(*map(jax.numpy.asarray, inputs)))
        return [np.asarray(leaf) for leaf in leaves], str(tree)


def _made_ahead(make: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """(job, what `make` makes of it) in order, the next one made while this one is in work."""
    with ThreadPoolExecutor(1) as thread:
        coming = [thread.submit(make, job) for job in jobs[:1]]
        for i, job in enumerate(jobs):
            one = coming.pop().result()
            coming += [thread.submit(make, following) for following in jobs[i + 1 : i + 2]]
            yield job, one


class _Beside:
    """Comparisons, one after the other, beside what runs the programs. The first that fails is what is raised."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None

    def __enter__(self) -> "_Beside":
        return self

    def submit(self, compare: Callable[[], None]) -> None:
        """Begins one, when the last has ended: each holds its outputs."""
        self._end()
        self._under_way = self._thread.submit(compare)

    def _end(self) -> None:
        ending, self._under_way = self._under_way, None
        if ending is not None:
            ending.result()

    def __exit__(self, *_: object) -> None:
        """Also where a later program has failed: what was wrong before it comes first."""
        try:
            self._end()
        finally:
            self._thread.shutdown()


class _Program:
    """A workload's CPU artifact: a pure program of the candidate's."""

    def __init__(self, name: str, workload: dict[str, Any]) -> None:
        from jax import export

        from judge import jax_shims
        from judge.worker import work

        self.name, self.tree = name, workload["tree"]
        with _blaming_the_program(f"workload {name}"), work():
            exported = export.deserialize(bytearray(Path(workload["artifact"]).read_bytes()))
            self._run = jax_shims.compile_cpu(exported.call, exported.in_avals, tuple(workload["donated"]))
        self._traced = [(tuple(aval.shape), str(aval.dtype)) for aval in exported.in_avals]

    def check_shapes(self, inputs: list[np.ndarray], label: str) -> None:
        shapes = [(array.shape, str(array.dtype)) for array in inputs]
        if shapes != self._traced:
            told = f"inputs {shapes} are not the timed ones {self._traced}"
            raise SealError(f"workload {self.name}, check {label!r}: {told}")

    def __call__(self, inputs: list[np.ndarray], where: str) -> list[np.ndarray]:
        """Outputs for copies of the inputs, so that the program cannot change what the oracle gets."""
        import jax

        from judge.worker import work

        with _blaming_the_program(where), work():
            got = self._run(*(jax.numpy.array(array, copy=True) for array in inputs))
            return [np.asarray(leaf) for leaf in jax.tree.leaves(got)]


class _CheckSet:
    """One check set of one workload: the program's outputs against the oracle's; where they differ is found beside."""

    def __init__(
        self, sealed: ModuleType, program: _Program, inputs: list[np.ndarray], where: str, beside: _Beside
    ) -> None:
        self._sealed = sealed
        self._program = program
        self._inputs = inputs
        self._where = where
        self._beside = beside

    def agree(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(got, expected)"""
        got, want = self._run(), self._wanted()
        self._compare(got, lambda: want)
        return got, want

    def agree_with_kept(self, known: Path | None, new: Path) -> None:
        """The same against the outputs kept in `known`; those that are not kept yet are left in `new`."""
        got = self._run()
        self._compare(got, lambda: self._kept_outputs(got, known, new))

    def _kept_outputs(self, got: list[np.ndarray], known: Path | None, new: Path) -> list[np.ndarray]:
        from judge import expected

        want = expected.load(known, got, self._program.tree) if known else None
        if want is None:
            want = self._wanted()
            tolerances = tolerances_of(self._sealed, len(want))
            exact = [_is_exact(w, tolerance) for w, tolerance in zip(want, tolerances, strict=True)]
            expected.save(new, self._program.tree, want, exact)
        return want

    def agree_and_follow(self, secret: int) -> None:
        """And with one slice of one input changed: outputs must follow the oracle's, and stay to the bit where its
        stay. Run twice, so that what depends on anything but the inputs shows."""
        before = self.agree()
        changed, what = _perturbed(self._inputs, np.random.default_rng(secret))
        if changed is None:
            return
        where = f"{self._where}, {what} changed"
        other = _CheckSet(self._sealed, self._program, changed, where, self._beside)
        after, again = other.agree(), other._run()
        precision = tolerances_of(self._sealed, len(after[1])), lowest_precision(self._sealed, self._inputs)
        self._beside.submit(lambda: _check_probe(before, after, again, precision, where))

    def _compare(self, got: list[np.ndarray], want: Callable[[], list[np.ndarray]]) -> None:
        self._beside.submit(lambda: compare_all(self._sealed, got, want(), self._inputs, self._where))

    def _run(self) -> list[np.ndarray]:
        return self._program(self._inputs, self._where)

    def _wanted(self) -> list[np.ndarray]:
        """The oracle's outputs. Raises Mismatch where the program's have another tree."""
        want, tree = reference(self._sealed, self._inputs)
        if tree != self._program.tree:
            raise Mismatch(f"{self._where}: kernel_fn returns {self._program.tree}, reference_fn {tree}")
        return want


def compare_all(
    sealed: ModuleType, got: list[np.ndarray], want: list[np.ndarray], inputs: list[np.ndarray], where: str
) -> None:
    """Raises Mismatch for the first output that is not the oracle's."""
    if len(got) != len(want):
        raise Mismatch(f"{where}: {len(got)} outputs, reference_fn has {len(want)}")
    tolerances, lowest = tolerances_of(sealed, len(want)), lowest_precision(sealed, inputs)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        compare(g, w, tolerances[i], lowest, f"{where}, output {i}")


def _check_probe(
    before: tuple[list[np.ndarray], list[np.ndarray]],
    after: tuple[list[np.ndarray], list[np.ndarray]],
    again: list[np.ndarray],
    precision: tuple[list[Any], str],
    where: str,
) -> None:
    """Raises Mismatch where two runs differ, or where an output moved that the oracle's did not."""
    (tolerances, lowest), outputs = precision, zip(after[0], before[0], again, after[1], before[1], strict=True)
    for i, (g, g0, g2, w, w0) in enumerate(outputs):
        if _differ(g, g2).any():
            raise Mismatch(f"{where}, output {i}: two runs on the same inputs differ")
        rtol, atol = limits(tolerances[i], w, lowest)
        moved = _differ(g, g0) & _rows(~_differ(w, w0))
        with np.errstate(invalid="ignore"):
            far = np.abs(np.subtract(g[moved], g0[moved], dtype=np.float64)) > (atol + rtol * np.abs(g0[moved])) / 8
        moved[moved] = far
        if moved.any():
            _report(moved, g, g0, f"{where}, output {i}: changes where the oracle's does not")


def _rows(unchanged: np.ndarray) -> np.ndarray:
    """Where everything along all axes but the first is unchanged: another bit of the same row may round otherwise."""
    if unchanged.ndim < 2:
        return unchanged
    rows = unchanged.reshape(len(unchanged), -1).all(axis=1)
    return np.broadcast_to(rows.reshape(-1, *[1] * (unchanged.ndim - 1)), unchanged.shape)


def _perturbed(inputs: list[np.ndarray], rng: np.random.Generator) -> tuple[list[np.ndarray] | None, str]:
    """The inputs with one random slice of a random floating-point one negated and moved, and which it is."""
    floats = [i for i, array in enumerate(inputs) if array.dtype.kind not in "iubc" and array.size]
    if not floats:
        return None, ""
    which = int(rng.choice(floats))
    changed = list(inputs)
    array = changed[which] = inputs[which].copy()
    if not array.ndim:
        array[...] = -array + 1
        return changed, f"input {which}"
    axis = int(rng.integers(array.ndim))
    index = int(rng.integers(array.shape[axis]))
    view = np.moveaxis(array, axis, 0)
    view[index] = (1 - view[index].astype(np.float32)).astype(array.dtype)
    return changed, f"input {which} at {index} of axis {axis}"


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two arrays of one dtype have other bits, any NaN being like any other."""
    bits = f"u{a.dtype.itemsize}" if a.dtype.itemsize in (1, 2, 4, 8) else a.dtype
    differ: np.ndarray = np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)
    if a.dtype.kind not in "iub":
        differ[differ] = ~((a[differ] != a[differ]) & (b[differ] != b[differ]))
    return differ


@contextmanager
def _blaming_the_program(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).strip()[:2000]}"
        raise ProgramError(f"{where}: running the CPU program raised {message}") from error


def tolerances_of(sealed: ModuleType, count: int) -> list[Any]:
    tolerance = getattr(sealed, "TOLERANCE", None)
    if isinstance(tolerance, list | tuple):
        if len(tolerance) != count:
            raise SealError(f"TOLERANCE has {len(tolerance)} entries for {count} outputs")
        return list(tolerance)
    return [tolerance] * count


def lowest_precision(sealed: ModuleType, inputs: list[np.ndarray]) -> str:
    """The coarsest dtype among the inputs; bfloat16 too where the reference itself leaves float32 products to the
    chip's default precision, which is one pass of bfloat16."""
    names = [str(array.dtype) for array in inputs]
    if "float32" in names and _rounds_operands(sealed, inputs):
        return "bfloat16"
    return next((d for d in ("bfloat16", "float16", "float32") if d in names), "float64")


def _rounds_operands(sealed: ModuleType, inputs: list[np.ndarray]) -> bool:
    import jax

    from judge import jax_shims

    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in inputs]
    try:
        return jax_shims.rounds_operands(jax.make_jaxpr(sealed.reference_fn)(*shapes))
    except Exception:  # written in NumPy, which rounds nothing
        return False


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


def _is_exact(output: np.ndarray, tolerance: Any) -> bool:
    """Whether it must equal the oracle's to the bit."""
    return output.dtype.kind in "iub" or (not isinstance(tolerance, Mapping) and tolerance == 0)


def compare(got: np.ndarray, want: np.ndarray, tolerance: Any, lowest: str, where: str) -> None:
    """Raises Mismatch that names the worst element."""
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Mismatch(
            f"{where}: kernel_fn gives {got.dtype}{list(got.shape)}, reference_fn {want.dtype}{list(want.shape)}"
        )
    if np.array_equal(_in_words(got), _in_words(want)):
        return
    if _is_exact(got, tolerance):
        differ = _differ(got, want)  # -0.0 is not 0.0
        if differ.any():
            _report(differ, got, want, f"{where}: must equal the oracle to the bit")
        return
    rtol, atol = limits(tolerance, want, lowest)
    wide = got.dtype if got.dtype in (np.float64, np.complex64, np.complex128) else np.float32
    if _all_close(got.reshape(-1), want.reshape(-1), rtol, atol, wide):
        return
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


def _in_words(array: np.ndarray) -> np.ndarray:
    """Its bytes, eight at a time where they come so."""
    from judge.expected import flat_bytes

    flat = flat_bytes(array)
    return flat if flat.size % 8 else flat.view(np.uint64)


def _all_close(got: np.ndarray, want: np.ndarray, rtol: float, atol: float, wide: Any) -> bool:
    """Whether nothing is to be reported; a stretch at a time, which stays in the processor's cache."""
    with np.errstate(invalid="ignore"):
        for start in range(0, got.size, _STRETCH):
            g, w = (array[start : start + _STRETCH].astype(wide) for array in (got, want))
            close = np.abs(g - w) <= atol + rtol * np.abs(w)
            finite = np.isfinite(w)
            if not (close & finite).all() and not np.where(finite, close, (g == w) | ((g != g) & (w != w))).all():
                return False
    return True


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
    from judge import containment, jax_shims
    from judge.worker import load_kernel, where, write_result

    jax_shims.set_environment()
    request = json.loads(Path(sys.argv[1]).read_text())
    readable = (str(Path(request["out"]).parent), *filter(None, [request.get("expected")]))
    containment.enter(containment.Need(readable=readable, writable=(request["out"],)))
    path = Path(request["sealed"])
    jax_shims.check_version()
    blame = "FAIL_CRASH"  # the status where the sealed file is the candidate itself, in a dry run
    try:
        sealed = load_kernel(path)
        blame = "FAIL_CONTRACT"
        result = {"describe": describe, "check": check, "confirm": confirm}[request["do"]](sealed, request)
    except Mismatch as mismatch:
        result = {"status": "FAIL_CORRECTNESS", "reason": str(mismatch)}
    except ProgramError as error:
        result = {"status": "FAIL_CRASH", "reason": str(error)}
    except Altered as altered:
        told = "what is kept in .ratchet/expected is not what the sealed file gives; remove it and run again"
        never = "(where that does not help, the file gives something else each time)"
        result = {"status": "CANNOT_JUDGE", "reason": f"{altered}: {told} {never}"}
    except SealError as error:
        result = {"status": "SEAL", "blame": blame, "reason": str(error)}
    except (Exception, SystemExit) as error:
        what = "importing the kernel file raised" if blame == "FAIL_CRASH" else "the problem's definition raised"
        result = {"status": "SEAL", "blame": blame, "reason": f"{what} {where(error, path)}"}
    write_result(request, result)


if __name__ == "__main__":
    main()
