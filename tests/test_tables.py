"""kernels/tables.py: how the best block sizes are looked for, kept and handed to others."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from agents import CannotSearchError
from agents.search import Space
from agents.tunables import Tunable, present_values, read_tunables
from judge import contract
from kernels import tables

ROOT = Path(__file__).resolve().parent.parent
SPACE = Space(
    (Tunable(name="Q", values=("16", "32", "64", "128")), Tunable(name="KV", values=("1", "2", "4", "8", "16")))
)
ROW = tables.Row(
    heads="llama-70b",
    num_q_heads=64,
    num_kv_heads=8,
    head_dim=128,
    page_size=64,
    max_model_len=8192,
    dtype="bfloat16",
    values='{"Q_BLOCK_TOKENS": 64, "KV_BLOCK_PAGES": 8}',
    score=6439.13,
    decode_ms=0.61,
    decode_mbu_pct=91.25,
    prefill_ms=1.5,
    prefill_mfu_pct=60.0,
    start_score=6000.0,
    program_sha256="ab" * 32,
)


def hill(combination):
    """Best at Q=64, KV=8; KV=16 does not fit."""
    q, kv = map(int, combination)
    return None if kv == 16 else 100.0 - abs(q - 64) - 3 * abs(kv - 8)


def test_the_climb_ends_at_the_best_and_leaves_out_what_cannot_be_judged():
    scores = tables.climb(SPACE, ("16", "2"), hill, trials=100)
    assert max(scores, key=scores.get) == ("64", "8")
    assert ("16", "2") in scores and all(kv != "16" for _, kv in scores)


def test_the_climb_takes_no_more_than_its_trials_and_judges_nothing_twice():
    seen = []
    tables.climb(SPACE, ("16", "1"), lambda combination: seen.append(combination) or hill(combination), trials=4)
    assert len(seen) == len(set(seen)) == 4


def test_a_start_that_cannot_be_judged_is_left_for_a_neighbour():
    scores = tables.climb(SPACE, ("16", "16"), hill, trials=100)
    assert max(scores, key=scores.get) == ("64", "8")


def test_where_nothing_can_be_judged_there_is_no_score():
    assert tables.climb(SPACE, ("16", "1"), lambda combination: None, trials=9) == {}


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "tuned" / "v5e.tsv"
    other = dataclasses.replace(ROW, page_size=16)
    tables.write(path, [ROW, other])
    assert tables.read(path) == [other, ROW]
    assert [file.name for file in path.parent.iterdir()] == ["v5e.tsv"]
    assert tables.read(tmp_path / "none.tsv") == []


@pytest.mark.parametrize("text", ["", "something else\n", "{header}\nllama\t1\n", "{header}\n{row}x\n"])
def test_another_file_is_refused_in_words(tmp_path, text):
    path = tmp_path / "v5e.tsv"
    tables.write(path, [ROW])
    header, row = path.read_text().splitlines()
    path.write_text(text.format(header=header, row=row.replace("6439.13", "fast")))
    with pytest.raises(CannotSearchError, match="remove the"):
        tables.read(path)


def test_the_export_has_the_keys_that_an_engine_looks_up():
    narrow = dataclasses.replace(ROW, num_q_heads=40, page_size=16, max_model_len=1024)
    assert tables.as_tpu_inference("tpu7x", [ROW, narrow]) == {
        "TPU v7": {
            64: {"q_bfloat16_kv_bfloat16": {"q_head-64_kv_head-8_head-128": {"max_model_len-8192-sw-None": (4, 64)}}},
            # five heads a group are padded to six, and 48 heads to the next power of two
            16: {"q_bfloat16_kv_bfloat16": {"q_head-64_kv_head-8_head-128": {"max_model_len-1024-sw-None": (16, 64)}}},
        }
    }


def test_every_shape_is_a_valid_problem_with_the_checks_of_the_kernel():
    names = set()
    for _, batches in tables.shapes():
        names.add(batches[0].name)
        text = tables.problem(*batches).encode()
        assert contract.check_source(text, "kernel.py").needs == ()
        assert present_values(text, read_tunables(text))
        module: dict[str, object] = {}
        exec(compile(text, "problem", "exec"), module)
        assert list(module["WORKLOADS"]) == ["decode", "prefill"]
        for workload in module["WORKLOADS"].values():
            for changes in ({}, *module["CHECKS"].values()):
                arguments = {**workload, **changes}
                q_lens, kv_lens, _ = module["_lengths"](**{**arguments, "draw": arguments.get("draw") or 3})
                assert 0 < q_lens.sum() <= workload["num_tokens"]
                assert kv_lens.max() <= batches[0].context
    assert len(names) == len(list(tables.shapes()))


@pytest.mark.parametrize("arguments", [["tune", "--only", "no such shape"], ["tune", "--trials", "0"], ["nothing"]])
def test_a_bad_command_is_told(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "kernels.tables", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "usage:" in done.stderr and "Traceback" not in done.stderr
