"""Copies, waits and indices on the very scalars whose time counts, followed without the data.

The strict interpreter is slow, so it sees one small check set; a kernel that knows the timed lengths could behave on
that set alone. Here the traced kernels run on the timed integer inputs: scalars, control flow, references and copies
in full, vectors not at all. An error is: an access while a copy that touches the same memory may still be under way,
an index out of bounds (the CPU clamps it, the chip reads what lies there), a block of an output visited again later
than at once, a copy that nobody waits for.

Copies on one semaphore end in any order, so one is over when fewer bytes than its own are still to be waited for there.
Not covered: what depends on values that come from vectors; a program that steers by one is `Unfollowable`, and so is
any primitive that takes a reference and is not known here.
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from judge import jax_shims
from judge.copies import Broken, Buffer, Copies, Found
from judge.races import place_of
from judge.regions import Region
from judge.regions import Unfollowable as Unfollowable

Step = Callable[[list[Any]], None]
_LARGEST_KNOWN = 1 << 22  # elements of an integer array that is computed outside the kernels


def _quotient(a: int, b: int) -> int | None:
    """Rounded towards zero."""
    return None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a: int, b: int) -> int | None:
    """With the sign of the dividend."""
    return None if b == 0 else abs(a) % abs(b) * (-1 if a < 0 else 1)


def _shifted(shift: Callable[[int, int], int]) -> Callable[[int, int], int | None]:
    return lambda a, b: shift(a, b) if 0 <= b < 32 else None  # beyond: whatever the machine does


def _same(a: Any, *_: Any) -> Any:
    return a


_OPERATIONS: dict[str, Callable[..., Any]] = {
    **{"add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg, "abs": abs},
    **{"max": max, "min": min, "div": _quotient, "rem": _remainder, "eq": operator.eq, "ne": operator.ne},
    **{"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "and": operator.and_},
    **{"or": operator.or_, "xor": operator.xor, "sign": lambda a: (a > 0) - (a < 0)},
    "clamp": lambda low, a, high: min(max(a, low), high),
    "shift_left": _shifted(operator.lshift),
    "shift_right_arithmetic": _shifted(operator.rshift),
    "shift_right_logical": _shifted(lambda a, b: (a & 0xFFFFFFFF) >> b),
    **dict.fromkeys(("convert_element_type", "squeeze", "reshape", "broadcast_in_dim", "multiple_of", "copy"), _same),
}
_CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "checkpoint": "jaxpr"}
_CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "pjit": "jaxpr", "remat2": "jaxpr"}
_ORDERS_NOTHING = ("semaphore_signal", "semaphore_wait", "add_dependency", "touch")


def follow(program: Any, integers: dict[int, np.ndarray]) -> None:
    """Follows every Pallas kernel of a closed jaxpr; `integers`: argument → its values. Raises Broken, Unfollowable."""
    arguments = [integers.get(i) for i in range(len(program.jaxpr.invars))]
    _follow_outside(program.jaxpr, program.consts, arguments)


def _follow_outside(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[np.ndarray | None]) -> list[Any]:
    """What is around the kernels: integer arrays that follow from the inputs are computed, all else is unknown."""
    from jax._src import core

    known: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))
    known |= zip(jaxpr.constvars, map(np.asarray, consts), strict=True)

    def value(atom: Any) -> Any:
        return np.asarray(atom.val) if isinstance(atom, core.Literal) else known.get(atom)

    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, [value(atom) for atom in equation.invars]
        results: Sequence[Any] = [None] * len(equation.outvars)
        if name == "pallas_call":
            _Kernel(equation, inputs).run()
        elif name in _CALLS and hasattr(equation.params[_CALLS[name]], "consts"):
            inner = equation.params[_CALLS[name]]
            results = _follow_outside(inner.jaxpr, inner.consts, inputs)
        elif jax_shims.find_primitives(list(equation.params.values()), jax_shims.PALLAS_CALLS):
            raise Unfollowable(f"a Pallas kernel in a {name}")
        elif all(given is not None for given in inputs):
            results = _computed(equation, inputs)
        known |= zip(equation.outvars, results, strict=True)
    return [value(atom) for atom in jaxpr.outvars]


def _computed(equation: Any, inputs: Sequence[np.ndarray]) -> list[Any]:
    unknown: list[Any] = [None] * len(equation.outvars)
    if sum(math.prod(var.aval.shape) for var in equation.outvars) > _LARGEST_KNOWN:
        return unknown
    try:
        results = equation.primitive.bind(*inputs, **equation.params)
        results = results if equation.primitive.multiple_results else [results]
        return [np.asarray(result) for result in results]
    except Exception:  # a primitive that cannot be run by itself
        return unknown


class Routine:
    """A jaxpr as a list of steps over numbered values; None is an unknown value."""

    def __init__(self, kernel: "_Kernel", jaxpr: Any, consts: Sequence[Any] = ()) -> None:
        self.kernel = kernel
        self._slots: dict[Any, int] = {}
        self.template: list[Any] = []
        for var, const in zip(jaxpr.constvars, consts, strict=False):
            self.template[self.slot(var)] = _scalar(const)
        self.constants = [self.slot(var) for var in jaxpr.constvars]
        self.inputs = [self.slot(var) for var in jaxpr.invars]
        self.steps = [step for equation in jaxpr.eqns if (step := self._step(equation)) is not None]
        self.outputs = [self.slot(var) for var in jaxpr.outvars]

    def __call__(self, arguments: Sequence[Any], constants: Sequence[Any] = ()) -> list[Any]:
        env = self.template[:]
        for slot, argument in zip(self.inputs, arguments, strict=True):
            env[slot] = argument
        for slot, constant in zip(self.constants, constants, strict=False):
            env[slot] = constant
        for step in self.steps:
            step(env)
        return [env[slot] for slot in self.outputs]

    def slot(self, atom: Any) -> int:
        """The number of a variable's value; a literal or a number has one of its own."""
        from jax._src import core

        if isinstance(atom, core.Var) and atom in self._slots:
            return self._slots[atom]
        self.template.append(None if isinstance(atom, core.Var) else _scalar(getattr(atom, "val", atom)))
        if isinstance(atom, core.Var):
            self._slots[atom] = len(self.template) - 1
        return len(self.template) - 1

    def _step(self, equation: Any) -> Step | None:
        """What an equation does to scalars, references and copies; None where that is nothing."""
        name = equation.primitive.name
        refs = any(_is_ref(var.aval) for var in equation.invars)
        maker = getattr(self, f"_make_{name}", None) or (self._make_call if name in _CALLS else None)
        if maker is None:
            if refs and name not in _ORDERS_NOTHING:
                raise Unfollowable(f"{name} takes a reference ({place_of(equation.source_info)})")
            return self._make_operation(equation)
        if not refs and name != "run_scoped" and not any(_is_scalar(var.aval) for var in equation.outvars):
            return None
        step: Step | None = maker(equation)
        return step

    # --- scalars ---

    def _make_operation(self, equation: Any) -> Step | None:
        out = equation.outvars[0] if len(equation.outvars) == 1 else None
        operation = _OPERATIONS.get(equation.primitive.name)
        if out is None or operation is None or not _is_scalar(out.aval):
            return None
        inputs, target, wrap = [self.slot(atom) for atom in equation.invars], self.slot(out), _wrapping(out.aval.dtype)

        def step(env: list[Any]) -> None:
            values = [env[slot] for slot in inputs]
            result = None if None in values else operation(*values)
            env[target] = None if result is None else wrap(result)

        return step

    def _make_not(self, equation: Any) -> Step:
        (source,), target = map(self.slot, equation.invars), self.slot(equation.outvars[0])
        wrap, is_bool = _wrapping(equation.outvars[0].aval.dtype), equation.outvars[0].aval.dtype == bool

        def step(env: list[Any]) -> None:
            value = env[source]
            env[target] = None if value is None else (not value) if is_bool else wrap(~value)

        return step

    def _make_select_n(self, equation: Any) -> Step:
        which, *cases = map(self.slot, equation.invars)
        target = self.slot(equation.outvars[0])

        def step(env: list[Any]) -> None:
            env[target] = None if env[which] is None else env[cases[int(env[which])]]

        return step

    def _make_program_id(self, equation: Any) -> Step:
        target, axis = self.slot(equation.outvars[0]), equation.params["axis"]

        def step(env: list[Any]) -> None:
            env[target] = self.kernel.ids[axis]

        return step

    def _make_num_programs(self, equation: Any) -> Step:
        target, axis = self.slot(equation.outvars[0]), equation.params["axis"]

        def step(env: list[Any]) -> None:
            env[target] = self.kernel.grid[axis]

        return step

    # --- control ---

    def _routine(self, closed: Any) -> "Routine":
        return self.kernel.routine(getattr(closed, "jaxpr", closed), getattr(closed, "consts", ()))

    def _bind(self, equation: Any, act: Callable[[list[Any]], Sequence[Any]]) -> Step:
        """A step that hands an equation's inputs to `act` and keeps what that returns."""
        inputs, outputs = [self.slot(v) for v in equation.invars], [self.slot(v) for v in equation.outvars]

        def step(env: list[Any]) -> None:
            for slot, value in zip(outputs, act([env[slot] for slot in inputs]), strict=True):
                env[slot] = value

        return step

    def _make_call(self, equation: Any) -> Step:
        return self._bind(equation, self._routine(equation.params[_CALLS[equation.primitive.name]]))

    def _make_cond(self, equation: Any) -> Step:
        branches = [self._routine(branch) for branch in equation.params["branches"]]
        matters = any(_is_ref(var.aval) for var in equation.invars)

        def act(values: list[Any]) -> Sequence[Any]:
            if values[0] is None:
                if matters:
                    raise Unfollowable(f"a branch on what no scalar gives ({place_of(equation.source_info)})")
                return [None] * len(equation.outvars)
            return branches[min(max(int(values[0]), 0), len(branches) - 1)](values[1:])

        return self._bind(equation, act)

    def _make_while(self, equation: Any) -> Step:
        params = equation.params
        test, body = self._routine(params["cond_jaxpr"]), self._routine(params["body_jaxpr"])
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        matters = any(_is_ref(var.aval) for var in equation.invars)

        def act(values: list[Any]) -> Sequence[Any]:
            carry = values[second:]
            while (goes_on := test([*values[:first], *carry])[0]) is not False:
                if goes_on is None:
                    if matters:
                        raise Unfollowable(f"a loop over what no scalar gives ({place_of(equation.source_info)})")
                    return [None] * len(carry)
                carry = body([*values[first:second], *carry])
            return carry

        return self._bind(equation, act)

    def _make_scan(self, equation: Any) -> Step:
        params, body = equation.params, self._routine(equation.params["jaxpr"])
        consts, carried = params["num_consts"], params["num_consts"] + params["num_carry"]

        def act(values: list[Any]) -> Sequence[Any]:
            carry, unknown = values[consts:carried], [None] * len(values[carried:])
            for _ in range(params["length"]):
                carry = body([*values[:consts], *carry, *unknown])[: len(carry)]
            return [*carry, *[None] * (len(equation.outvars) - len(carry))]

        return self._bind(equation, act)

    def _make_run_scoped(self, equation: Any) -> Step:
        jaxpr = equation.params["jaxpr"]
        body = self._routine(jaxpr)
        return self._bind(equation, lambda values: body([Buffer(var.aval) for var in jaxpr.invars], values))

    # --- memory ---

    def _access(self, equation: Any, ref: Any, transforms: Any, new: Any, *, writes: bool) -> Step:
        region = Region(self, ref, transforms, equation.source_info)
        target = self.slot(equation.outvars[0]) if equation.outvars else None
        source = None if new is None else self.slot(new)
        is_one = bool(equation.outvars) and _is_scalar(equation.outvars[0].aval)

        def step(env: list[Any]) -> None:
            buffer, low, high, known, _ = region.find(env)
            buffer.touch(low, high, region.place, writes=writes)
            if buffer.values is None:
                return
            one = known and is_one
            if target is not None:
                env[target] = buffer.values[buffer.at(low)] if one else None
            if writes and one:
                buffer.values[buffer.at(low)] = None if source is None else env[source]
            elif writes:
                buffer.values = [None] * len(buffer.values)

        return step

    def _make_get(self, equation: Any) -> Step:
        ref, *rest = equation.invars
        return self._access(equation, ref, equation.params["tree"].unflatten(rest), None, writes=False)

    def _make_swap(self, equation: Any) -> Step:
        ref, new, *rest = equation.invars
        return self._access(equation, ref, equation.params["tree"].unflatten(rest), new, writes=True)

    def _make_addupdate(self, equation: Any) -> Step:
        ref, _, *rest = equation.invars
        return self._access(equation, ref, equation.params["tree"].unflatten(rest), None, writes=True)

    def _make_masked_load(self, equation: Any) -> Step:
        ref, transforms, _, _ = equation.params["args_tree"].unflatten(equation.invars)
        return self._access(equation, ref, transforms, None, writes=False)

    def _make_masked_swap(self, equation: Any) -> Step:
        ref, transforms, _, _ = equation.params["args_tree"].unflatten(equation.invars)
        return self._access(equation, ref, transforms, None, writes=True)

    def _copied(self, equation: Any) -> list[Region]:
        """Regions of a copy: source, target, semaphore."""
        *parts, source_semaphore, device = equation.params["tree"].unflatten(equation.invars)
        if source_semaphore is not None or device is not None:
            raise Unfollowable(f"a copy to another chip ({place_of(equation.source_info)})")
        place = equation.source_info
        return [Region(self, getattr(p, "ref", p), getattr(p, "transforms", ()), place) for p in parts]

    def _make_dma_start(self, equation: Any) -> Step:
        source, target, semaphore = self._copied(equation)

        def step(env: list[Any]) -> None:
            regions = source.find(env), target.find(env)
            self.kernel.copies.start(*regions, _flag(semaphore.find(env)), equation.source_info)

        return step

    def _make_dma_wait(self, equation: Any) -> Step:
        _, target, semaphore = self._copied(equation)

        def step(env: list[Any]) -> None:
            size_bytes = target.find(env).size_bytes
            self.kernel.copies.wait(_flag(semaphore.find(env)), size_bytes, equation.source_info)

        return step


def _flag(found: Found) -> tuple[int, int]:
    buffer, low, _, known, _ = found
    if not known:
        raise Unfollowable("a semaphore whose index no scalar gives")
    return id(buffer), buffer.at(low)


class _Kernel:
    """One pallas_call with what is known of its operands."""

    def __init__(self, equation: Any, operands: Sequence[np.ndarray | None]) -> None:
        self.params, self.mapping = equation.params, equation.params["grid_mapping"]
        sizes = iter(operands)
        self.grid = tuple(n if isinstance(n, int) else _scalar(next(sizes)) for n in self.mapping.grid)
        if None in self.grid:
            raise Unfollowable("a grid whose size no scalar gives")
        self.operands = list(sizes)
        self.ids: tuple[int, ...] = ()
        self.copies = Copies()
        self._routines: dict[int, tuple[Any, Routine]] = {}

    def routine(self, jaxpr: Any, consts: Sequence[Any] = ()) -> Routine:
        if id(jaxpr) not in self._routines:
            self._routines[id(jaxpr)] = jaxpr, Routine(self, jaxpr, consts)
        return self._routines[id(jaxpr)][1]

    def run(self) -> None:
        """Every step of the grid in order."""
        buffers = self._buffers()
        body = self.routine(self.params["jaxpr"])
        blocks = self._blocks(buffers)
        for ids in itertools.product(*map(range, self.grid)):
            self.ids = ids
            for block in blocks:
                block.move(ids)
            body(buffers)
        self.copies.check_end()

    def _buffers(self) -> list[Buffer]:
        """A kernel's references; an output that is an input's memory, and not copied by blocks, is the same one."""
        avals, operands = [var.aval for var in self.params["jaxpr"].invars], self.operands
        buffers = [
            Buffer(aval, operands[i] if i < len(operands) and _has_values(aval, operands[i]) else None)
            for i, aval in enumerate(avals)
        ]
        for source, target in jax_shims.shared_memories(self.params):
            buffers[target] = buffers[source]
        return buffers

    def _blocks(self, buffers: list[Buffer]) -> list["_Block"]:
        """The operands that come or go by blocks; outputs first, since a block that is left may overtake a fetch."""
        first, mapping = self.mapping.num_index_operands, self.mapping
        moving = {
            first + i: _Block(self, block, buffers, first + i, is_output=i >= mapping.num_inputs)
            for i, block in enumerate(mapping.block_mappings)
            if not jax_shims.is_whole(self.params["jaxpr"].invars[first + i].aval)
        }
        for source, target in self.params["input_output_aliases"]:
            target += first + mapping.num_inputs
            if target in moving:
                memory = Buffer(moving[target].array) if source in moving else buffers[source]
                for number in {source, target} & moving.keys():
                    moving[number].memory = memory
            elif source in moving:
                raise Unfollowable("an operand that comes by blocks from where the kernel itself puts an output")
        return sorted(moving.values(), key=lambda block: not block.is_output)


class _Block:
    """An operand that comes or goes block by block."""

    def __init__(self, kernel: _Kernel, block: Any, buffers: list[Buffer], number: int, *, is_output: bool) -> None:
        self.array = block.array_aval
        self.memory: Buffer | None = None  # of an input and an output
        self._map = kernel.routine(block.index_map_jaxpr.jaxpr, block.index_map_jaxpr.consts)
        self._block, self._buffer, self.is_output = block, buffers[number], is_output
        self._indices = buffers[: kernel.mapping.num_index_operands]
        self._values = None if is_output else kernel.operands[number]
        self._visited: set[tuple[Any, ...]] = set()
        self._last: tuple[Any, ...] | None = None
        self._box: tuple[list[int], list[int]] | None = None

    def move(self, ids: Sequence[int]) -> None:
        """To the block of a step. Raises Broken where it lies outside, is an output's that was left before, or comes
        from where an output's was left."""
        at = tuple(self._map([*ids, *self._indices]))
        if at == self._last:
            return
        self._last = at
        if self.is_output and None not in at:
            if at in self._visited:
                raise Broken(f"block {at} of {self._block.origin} is visited again, but what it held is not fetched")
            self._visited.add(at)
        starts = []
        for index, dimension, size in zip(at, self._block.block_shape, self.array.shape, strict=False):
            blocked = type(dimension).__name__ == "Blocked"
            starts.append(None if index is None else index * (dimension.block_size if blocked else 1))
            if starts[-1] is not None and type(dimension).__name__ != "Element" and not 0 <= starts[-1] < max(size, 1):
                raise Broken(f"block {at} of {self._block.origin} lies outside {list(self.array.shape)}")
        self._share(at, starts)
        self._fill(starts)

    def _share(self, at: tuple[Any, ...], starts: list[int | None]) -> None:
        """In memory that is an input and an output, what an output's block leaves there must not be fetched."""
        if self.memory is None:
            return
        low = [start or 0 for start in starts]
        high = [
            size if start is None else start + getattr(dimension, "block_size", 1)
            for start, dimension, size in zip(starts, self._block.block_shape, self.array.shape, strict=True)
        ]
        if not self.is_output and self.memory.brought.overlapping(low, high) is not None:
            raise Broken(
                f"block {at} of {self._block.origin} is fetched from where a block of the output was put before"
            )
        if self.is_output and self._box is not None:
            self.memory.brought.add(*self._box, None)
        self._box = low, high

    def _fill(self, starts: list[int | None]) -> None:
        """The scalars of a block in SMEM."""
        buffer = self._buffer
        if "smem" not in buffer.space or self.is_output:
            return
        buffer.values = [None] * len(buffer.values or ())
        shape = self._block.block_shape
        known = [start for start in starts if start is not None]
        if self._values is None or self._values.dtype.kind not in "iub" or len(known) != len(shape):
            return
        sizes = (getattr(dimension, "block_size", 1) for dimension in shape)
        part = self._values[tuple(slice(start, start + size) for start, size in zip(known, sizes, strict=True))]
        if part.size == len(buffer.values):
            buffer.values = part.reshape(-1).tolist()


def _has_values(aval: Any, operand: np.ndarray | None) -> bool:
    return operand is not None and tuple(operand.shape) == tuple(aval.shape)


def _is_ref(aval: Any) -> bool:
    return type(aval).__name__ == "AbstractRef"


def _is_scalar(aval: Any) -> bool:
    """One integer or truth value, whatever its rank."""
    dtype = getattr(aval, "dtype", None)
    return not _is_ref(aval) and getattr(dtype, "kind", "") in ("i", "u", "b") and math.prod(aval.shape) == 1


def _scalar(value: Any) -> Any:
    """As Python's own number; None where it is no single integer or truth value."""
    if isinstance(value, bool | int):
        return int(value) if not isinstance(value, bool) else value
    array = np.asarray(value) if hasattr(value, "dtype") else None
    return array.item() if array is not None and array.dtype.kind in "iub" and array.size == 1 else None


def _wrapping(dtype: Any) -> Callable[[int], Any]:
    """To the numbers that the type has."""
    if dtype.kind == "b":
        return bool
    bits = 8 * dtype.itemsize
    low, high = (-(1 << bits - 1), 1 << bits - 1) if dtype.kind == "i" else (0, 1 << bits)
    return lambda value: value if low <= value < high else (int(value) - low) % (1 << bits) + low
