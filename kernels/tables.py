"""Block sizes by shape: the best values of kernel.py's TUNABLES for a chip, its heads, page size and longest context.

    .venv/bin/python -m kernels.tables tune [--chip CHIP] [--only TEXT] [--trials N]
    .venv/bin/python -m kernels.tables export [--chip CHIP]

`tune` judges kernel.py's own text on each shape, a decode and a prefill batch of it, and climbs from the present values
to better ones, a step of one tunable at a time. Trials are only costed; the best one is then judged whole, and becomes
a row of kernels/tuned/CHIP.tsv, with its figures and the hash of its compiled program, in the place of an older row of
that shape. `export` prints those rows in the form of tpu-inference's table of tuned block sizes.
"""

import argparse
import json
import os
import pprint
import sys
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from agents import CannotSearchError
from agents.search import Space
from agents.tunables import Combination, present_values, read_tunables, rewrite
from judge import contract, pipeline
from judge.chips import CHIPS, load_chip
from kernels.shapes import Shape, problem

FOLDER = Path(__file__).resolve().parent / "tuned"
DEVICES = {"v5e": "TPU v5e", "v6e": "TPU v6e", "v5p": "TPU v5p", "tpu7x": "TPU v7"}  # as tpu-inference names them


@dataclass(frozen=True, kw_only=True)
class Heads:
    """A model's attention, as one chip has it."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


HEADS = (
    Heads(name="llama-8b", num_q_heads=32, num_kv_heads=8, head_dim=128),
    Heads(name="llama-70b", num_q_heads=64, num_kv_heads=8, head_dim=128),
    Heads(name="qwen-40", num_q_heads=40, num_kv_heads=8, head_dim=128),
    Heads(name="d-64", num_q_heads=64, num_kv_heads=8, head_dim=64),
    Heads(name="d-256", num_q_heads=16, num_kv_heads=4, head_dim=256),
)
PAGE_SIZES = (16, 64, 128)  # tokens
CONTEXTS = (2048, 8192)  # tokens
DECODE_TOKENS = 1 << 18  # of context, at most, in the decode batch of a shape


@dataclass(frozen=True, kw_only=True)
class Row:
    """The best values for one shape on one chip. Times in ms, shares in percent."""

    heads: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_model_len: int
    dtype: str  # of queries and cache
    values: str  # of TUNABLES, JSON
    score: float
    decode_ms: float
    decode_mbu_pct: float
    prefill_ms: float
    prefill_mfu_pct: float
    start_score: float  # of the values that kernel.py has
    program_sha256: str

    @property
    def shape(self) -> tuple[object, ...]:
        return astuple(self)[:7]


def shapes() -> Iterable[tuple[Heads, tuple[Shape, Shape]]]:
    """The decode and the prefill batch of every shape of the table."""
    for heads in HEADS:
        for page_size in PAGE_SIZES:
            for context in CONTEXTS:
                common: dict[str, Any] = {
                    "name": f"{heads.name} page {page_size} context {context}",
                    "context": context,
                    "num_q_heads": heads.num_q_heads,
                    "num_kv_heads": heads.num_kv_heads,
                    "head_dim": heads.head_dim,
                    "page_size": page_size,
                }
                decode = Shape(batch="decode", num_seqs=min(128, DECODE_TOKENS // context), **common)
                yield heads, (decode, Shape(batch="prefill", num_seqs=4, **common))


def climb(
    space: Space, start: Combination, score_of: Callable[[Combination], float | None], trials: int
) -> dict[Combination, float]:
    """Combination → score of all that were tried and have one: from `start` to the best neighbour, on to its own.

    `score_of` is None for a combination that cannot be judged. Ends where no neighbour is better, or after `trials`.
    """
    tried: dict[Combination, float | None] = {start: score_of(start)}
    at = start
    while True:
        for step in space.neighbours(at):
            if step not in tried and len(tried) < trials:
                tried[step] = score_of(step)
        scores = {combination: score for combination, score in tried.items() if score is not None}
        best = max(scores, key=lambda combination: scores[combination], default=at)
        if best == at or len(tried) >= trials:
            return scores
        at = best


def tune(chip: str, heads: Heads, batches: tuple[Shape, Shape], trials: int) -> Row | None:
    """The row of one shape; None where no combination can be judged. Raises CannotJudge."""
    text = problem(*batches).encode()
    tunables = read_tunables(text)
    space, start = Space(tunables), present_values(text, tunables)

    def score_of(combination: Combination) -> float | None:
        verdict = _judged(chip, rewrite(text, space.params(combination)), whole=False)
        score = verdict.total.score if verdict.total else None
        told = f"{score:.1f}" if score is not None else f"{verdict.status}: {' '.join(verdict.reason.split())[:100]}"
        print(f"  {space.text(combination)}: {told}", flush=True)
        return score

    scores = climb(space, start, score_of, trials)
    for best in sorted(scores, key=lambda combination: -scores[combination]):
        verdict = _judged(chip, rewrite(text, space.params(best)), whole=True)
        if verdict.status == "PASS" and verdict.total is not None and verdict.total.score is not None:
            return _row(heads, batches[0], space, best, verdict, scores.get(start, 0.0))
        print(f"  {space.text(best)}: {verdict.status}: {verdict.reason}", flush=True)
    return None


def _judged(chip: str, data: bytes, *, whole: bool) -> pipeline.Verdict:
    source = contract.check_source(data, "kernel.py")
    task = pipeline.Task(candidate=source, sealed=source, chip=load_chip(chip), mode="model")
    with pipeline.private_folder() as folder:
        judging = pipeline.Judging(task, folder, lambda text: None)
        return judging.run() if whole else judging.run_to_cycles()


def _row(
    heads: Heads, shape: Shape, space: Space, best: Combination, verdict: pipeline.Verdict, start_score: float
) -> Row:
    decode, prefill, total = verdict.workloads["decode"], verdict.workloads["prefill"], verdict.total
    assert total is not None
    return Row(
        heads=heads.name,
        num_q_heads=heads.num_q_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        page_size=shape.page_size,
        max_model_len=shape.context,
        dtype="bfloat16",
        values=json.dumps({name: json.loads(value) for name, value in space.params(best).items()}),
        score=_rounded(total.score),
        decode_ms=_rounded(decode.latency_ms),
        decode_mbu_pct=_rounded(decode.mbu_pct),
        prefill_ms=_rounded(prefill.latency_ms),
        prefill_mfu_pct=_rounded(prefill.mfu_pct),
        start_score=_rounded(start_score),
        program_sha256=verdict.program_sha256,
    )


def _rounded(value: float | None) -> float:
    assert value is not None
    return float(f"{value:.6g}")


# --- the table ------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """The rows of a table; none where there is no file. Raises CannotSearchError for one that is no table."""
    if not path.exists():
        return []
    names = [field.name for field in fields(Row)]
    kinds = {field.name: field.type for field in fields(Row)}
    header, *lines = path.read_text().splitlines() or [""]
    if header.split("\t") != names:
        raise CannotSearchError(f"{path}: the first line is not that of a table of block sizes; remove the file")
    try:
        return [
            Row(**{n: kinds[n](value) for n, value in zip(names, line.split("\t"), strict=True)})  # type: ignore
            for line in lines
        ]
    except ValueError as error:
        raise CannotSearchError(f"{path}: {error}; remove the line or the file") from error


def write(path: Path, rows: Iterable[Row]) -> None:
    """The rows as a file, by shape; whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    lines = ["\t".join(field.name for field in fields(Row))]
    lines += ["\t".join(map(str, astuple(row))) for row in sorted(rows, key=lambda row: row.shape)]
    partial = path.with_suffix(".part")
    partial.write_text("\n".join(lines) + "\n")
    os.replace(partial, path)


def as_tpu_inference(chip: str, rows: Iterable[Row]) -> dict[str, Any]:
    """device → page size → dtypes → heads → longest context → (pages a KV block, queries a block)."""
    table: dict[str, Any] = {}
    for row in rows:
        values = json.loads(row.values)
        group = row.num_q_heads // row.num_kv_heads
        q_heads = (group + group % 2) * row.num_kv_heads  # two bfloat16 heads of a group share 32 bits
        heads = f"q_head-{_power_of_2(q_heads)}_kv_head-{_power_of_2(row.num_kv_heads)}_head-{row.head_dim}"
        of_page = table.setdefault(DEVICES[chip], {}).setdefault(row.page_size, {})
        of_heads = of_page.setdefault(f"q_{row.dtype}_kv_{row.dtype}", {}).setdefault(heads, {})
        pages = max(values["KV_BLOCK_PAGES"] * 32 // row.page_size, 1)  # kernel.py counts in pages of 32 tokens
        of_heads[f"max_model_len-{row.max_model_len}-sw-None"] = (pages, values["Q_BLOCK_TOKENS"])
    return table


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


# --- the command ----------------------------------------------------------------------------------------------------


def main() -> int:
    """Exit code 0, 2 where something could not be judged, 130 where interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("tune", "export"))
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help='shapes whose name has this, e.g. "llama-8b page 64"'
    )
    parser.add_argument("--trials", type=int, default=12, metavar="N", help="combinations tried a shape (12)")
    options = parser.parse_args()
    chosen = [(heads, batches) for heads, batches in shapes() if options.only in batches[0].name]
    if options.trials < 1 or not chosen:
        parser.error("--trials must be at least 1, and --only part of a name like " + next(iter(shapes()))[1][0].name)
    path = FOLDER / f"{options.chip}.tsv"
    try:
        rows = read(path)
        if options.what == "export":
            if not rows:
                raise CannotSearchError(f"{path} has no rows; fill it with: python -m kernels.tables tune")
            print("TUNED_BLOCK_SIZES = " + pprint.pformat(as_tpu_inference(options.chip, rows), sort_dicts=False))
            return 0
        for number, (heads, batches) in enumerate(chosen, 1):
            print(f"{options.chip} {number}/{len(chosen)}: {batches[0].name}", flush=True)
            row = tune(options.chip, heads, batches, options.trials)
            if row is None:
                print("  no combination can be judged", flush=True)
                continue
            rows = [*(one for one in read(path) if one.shape != row.shape), row]
            write(path, rows)
            print(f"  best: {row.values} score {row.score:g} (kernel.py's own: {row.start_score:g})", flush=True)
    except KeyboardInterrupt:
        print("tables: interrupted; finished shapes are in the table", file=sys.stderr)
        return 130
    except (CannotSearchError, contract.ContractError, pipeline.CannotJudge) as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
