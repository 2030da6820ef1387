"""Kernels that cheat, and kernels that are honest but unusual, each with what the judge must say of it.

One file a class of cheats (and `honest.py`); a case is ragged paged attention in its plain form, which experiments do
not edit (`tests/kernels/rpa.py`), or another base, with passages replaced. It is judged on a small workload with a quarter
of the heads, so that one case takes seconds.
`benchmarks/integrity.py` runs them all, `tests/test_cheats.py` those that are decided early and one of each class.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from judge import contract, pipeline
from judge.chips import load_chip

ROOT = Path(__file__).resolve().parent.parent.parent
Edit = tuple[str, str]

SMALL_WORKLOADS = """WORKLOADS = {
    "small": {"batch": "edges", "num_tokens": 64, "num_seqs": 10, "num_pages": 48, "page_size": 16},
}
"""
SMALL_CHECKS = """CHECKS = {
    "races": {"batch": "races", "poison": True, "magnitude": 64.0},
    "edges": {"batch": "edges", "poison": True},
    "holdout": {"batch": "short", "poison": True, "draw": None},
}
"""


def replaced(text: str, *edits: Edit) -> str:
    """The text with passages replaced, each of which must occur exactly once."""
    for old, new in edits:
        assert text.count(old) == 1, f"{text.count(old)} times: {old}"
        text = text.replace(old, new)
    return text


def small_rpa() -> str:
    """Plain ragged paged attention on a small workload."""
    text = (ROOT / "tests" / "kernels" / "rpa.py").read_text()
    text, once = re.subn(r"^WORKLOADS = \{.*?^\}\n", SMALL_WORKLOADS, text, flags=re.M | re.S)
    text, twice = re.subn(r"^CHECKS = \{.*?^\}\n", SMALL_CHECKS, text, flags=re.M | re.S)
    text, constants = re.subn(
        r"^(Q_BLOCK_TOKENS|KV_BLOCK_PAGES|NUM_Q_HEADS|NUM_KV_HEADS|MAX_CONTEXT) = \d+",
        lambda match: f"{match[1]} = {_SMALL[match[1]]}",
        text,
        flags=re.M,
    )
    assert (once, twice, constants) == (1, 1, len(_SMALL))
    return text


_SMALL = {"Q_BLOCK_TOKENS": 16, "KV_BLOCK_PAGES": 2, "NUM_Q_HEADS": 8, "NUM_KV_HEADS": 2, "MAX_CONTEXT": 512}


def scaled_add() -> str:
    return (ROOT / "tests" / "kernels" / "scaled_add.py").read_text()


def matmul() -> str:
    return (ROOT / "tests" / "kernels" / "matmul.py").read_text()


def whole_operands(body: str, options: str = "") -> tuple[Edit, ...]:
    """Edits of `scaled_add` to one grid step: body(a_ref, x_hbm, y_hbm, out_hbm, x_vmem, y_vmem, sem) moves its data."""
    text = scaled_add()
    call = text[text.index("        grid_spec=") : text.index("    )(a, x, y)")]
    one_step = f"""        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.VMEM((ROWS, COLUMNS), jnp.float32)] * 2 + [pltpu.SemaphoreType.DMA],
        ),
{options}"""
    return (
        (text[text.index("def body(") : text.index("\n\ndef kernel_fn(")], body),
        (call, one_step),
        (next(line for line in text.splitlines(keepends=True) if "rows = " in line), ""),
    )


# The start of such a body: both operands on their way, on one semaphore.
BOTH_STARTED = """def body(a_ref, x_hbm, y_hbm, out_hbm, x_vmem, y_vmem, sem):
    copies = [pltpu.make_async_copy(*pair, sem) for pair in ((x_hbm, x_vmem), (y_hbm, y_vmem))]
    for copy in copies:
        copy.start()
"""

BASES: dict[str, Callable[[], str]] = {"rpa": small_rpa, "add": scaled_add, "matmul": matmul}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel and its verdict."""

    name: str
    edits: tuple[Edit, ...] = ()
    sweeps: tuple[Edit, ...] = ()  # replaced wherever they occur
    base: str = "rpa"
    base_edits: tuple[Edit, ...] = ()  # of the sealed baseline too
    own_baseline: bool = False  # judged against itself, as a dry run does
    status: str = "PASS"
    reason: str = ""  # a passage of it
    trace_limit: float = 60.0
    group: str = ""

    @property
    def is_early(self) -> bool:
        """Decided on the file's text, in no time."""
        return self.status == "FAIL_CONTRACT" and self.group not in ("traced_faces",)

    def sources(self) -> tuple[contract.Source, contract.Source]:
        """(candidate, sealed baseline)"""
        base = replaced(BASES[self.base](), *self.base_edits)
        text = replaced(base, *self.edits)
        for old, new in self.sweeps:
            assert old in text, old
            text = text.replace(old, new)
        candidate = contract.check_source(text.encode(), "kernel.py")
        return candidate, candidate if self.own_baseline else contract.check_source(base.encode(), "kernel.py")

    def judge(self) -> pipeline.Verdict:
        candidate, sealed = self.sources()
        task = pipeline.Task(
            candidate=candidate,
            sealed=sealed,
            chip=load_chip("v5e"),
            mode="model",
            limits=pipeline.Limits(trace_seconds=self.trace_limit),
        )
        with pipeline.private_folder() as folder:
            return pipeline.Judging(task, folder, lambda text: None).run()

    def problem(self, verdict: pipeline.Verdict) -> str:
        """What is wrong with the verdict, or nothing."""
        if verdict.status != self.status:
            return f"{self.group}/{self.name}: {verdict.status} instead of {self.status}: {verdict.reason}"
        if self.reason not in verdict.reason:
            return f"{self.group}/{self.name}: for another reason than {self.reason!r}: {verdict.reason}"
        return ""


CLASSES = tuple(
    sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "honest"))
)


def load(name: str) -> list[Case]:
    """The cases of one file."""
    found: list[Case] = import_module(f"tests.cheats.{name}").CASES
    assert len({case.name for case in found}) == len(found)
    return [Case(**{**case.__dict__, "group": name}) for case in found]


def cheats() -> list[Case]:
    return [case for name in CLASSES for case in load(name)]
