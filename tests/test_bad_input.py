"""What people get wrong: each mistake has a status, an exit code and a message that names it, and leaves no trace."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import appended

from judge import contract, ledger

ROOT = Path(__file__).resolve().parent.parent
NEEDS_OS = 'NEEDS = ("os", "pathlib", "os._exit")\n'
BODY = "    out_ref[...] = a.astype(jnp.float32) * x_ref[...] + y_ref[...]\n"
CALL = "    )(a, x, y)\n"
TRACED = "    rows = pl.BlockSpec"


def line_of(text: str, passage: str) -> int:
    return text[: text.index(passage)].count("\n") + 1


def refused(done, *passages):
    """Exit code 2 with one line that says all of this, and no traceback."""
    assert done.code == 2, done.out + done.err
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("ratchet: ")
    assert all(passage in last for passage in passages), last
    assert "Traceback" not in done.err
    assert "RESULT:" not in done.out


def failed(done, status, *passages):
    """Exit code 1 with this status and a reason that says all of this, and no traceback."""
    assert (done.code, done.status) == (1, status), done.out + done.err
    assert all(passage in done.reason for passage in passages), done.reason
    assert "Traceback" not in done.err + done.out
    assert "RESULT:" not in done.out


# --- the file ---


def test_no_kernel_file(project):
    project.kernel.unlink()
    before = project.state()
    refused(project.ratchet("try"), "no kernel.py here", "git checkout kernel.py")
    assert project.state() == before
    failed(project.prepare("--dry-run"), "FAIL_CONTRACT", "kernel.py: no such file")


def test_directory_as_kernel(judge_file, tmp_path):
    failed(judge_file(tmp_path), "FAIL_CONTRACT", str(tmp_path), "not a file")


def test_named_pipe_as_kernel_does_not_hang(judge_file, tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    failed(judge_file(tmp_path / "pipe.py"), "FAIL_CONTRACT", "not a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(judge_file, variant, tmp_path):
    (tmp_path / "kernel.py").write_text(variant())
    (tmp_path / "kernel.py").chmod(0)
    failed(judge_file(tmp_path / "kernel.py"), "FAIL_CONTRACT", "cannot be read: Permission denied")


@pytest.mark.parametrize("data", [bytes(range(256)), b"\x7fELF\0\0\0", b"\xff\xfe" + "KERNEL_NAME".encode("utf-16-le")])
def test_binary_file(judge_file, tmp_path, data):
    (tmp_path / "kernel.py").write_bytes(data)
    failed(judge_file(tmp_path / "kernel.py"), "FAIL_CONTRACT", "kernel.py")


def test_huge_file(judge_file, tmp_path):
    with (tmp_path / "kernel.py").open("wb") as file:
        file.truncate(1 << 36)  # 64 GiB, sparse: it must not be read as a whole
    failed(judge_file(tmp_path / "kernel.py"), "FAIL_CONTRACT", "too large", str(contract.MAX_SOURCE_BYTES))


def test_syntax_error_names_the_line(judge_file, variant):
    text = variant((BODY, "    out_ref[...] = = x_ref[...]\n"))
    failed(judge_file(text), "FAIL_CONTRACT", f"candidate.py:{line_of(text, '= = x_ref')}: syntax error")


def test_every_missing_symbol_is_named(judge_file):
    failed(judge_file("KERNEL_NAME = 'x'\n"), "FAIL_CONTRACT", "missing " + ", ".join(contract.REQUIRED[1:]))


# --- what kernel_fn gives ---


def test_wrong_shape(judge_file, variant):
    done = judge_file(variant((CALL, "    )(a, x, y)[1:]\n")))
    failed(done, "FAIL_CORRECTNESS", "kernel_fn gives float32[255, 128], reference_fn float32[256, 128]")


def test_wrong_dtype(judge_file, variant):
    done = judge_file(variant((CALL, "    )(a, x, y).astype(jnp.bfloat16)\n")))
    failed(done, "FAIL_CORRECTNESS", "kernel_fn gives bfloat16[256, 128], reference_fn float32[256, 128]")


def test_wrong_pytree(judge_file, variant):
    done = judge_file(variant((CALL, "    )(a, x, y),\n")))
    failed(done, "FAIL_CORRECTNESS", "kernel_fn returns PyTreeDef((*,)), reference_fn PyTreeDef(*)")


def test_wrong_values(judge_file, variant):
    done = judge_file(variant((BODY, BODY.replace("+ y_ref", "- y_ref"))))
    failed(done, "FAIL_CORRECTNESS", "workload default", "output 0", "off by more than", "worst at", "expected")


def test_nan(judge_file, variant):
    # One element of the second block; the other 32767 are right.
    nan = (
        BODY
        + "\n    @pl.when(pl.program_id(0) == 1)\n    def _():\n        out_ref[0, :] = jnp.full((128,), jnp.nan)\n"
    )
    failed(judge_file(variant((BODY, nan))), "FAIL_CORRECTNESS", "not finite where the oracle is", "got nan")


# --- how kernel_fn ends ---


def test_exception_names_type_message_and_line(judge_file, variant):
    text = variant((BODY, "    raise KeyError('no such tile')\n"))
    line = line_of(text, "raise KeyError")
    failed(judge_file(text), "FAIL_CRASH", "kernel_fn raised KeyError: 'no such tile'", f"(kernel.py:{line})")


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("jax.lax.platform_dependent(x, tpu=lambda x: x, default=lambda x: x + 0)", "kernel_fn uses platform_index"),
        ("jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)", "jax.pure_callback"),
    ],
)
def test_two_faced_programs_and_callbacks_are_refused(judge_file, variant, expression, told):
    failed(judge_file(variant((TRACED, f"    x = {expression}\n{TRACED}"))), "FAIL_CONTRACT", told)


def test_exception_at_import(judge_file, variant):
    text = variant(("BLOCK = 32", "BLOCK = 32 // 0"))
    failed(judge_file(text), "FAIL_CRASH", "importing the kernel file raised ZeroDivisionError", "(kernel.py:")


@pytest.mark.parametrize(
    ("where", "told"), [("BLOCK = 32", "BLOCK = 32\n"), (TRACED, "")], ids=["at import", "at trace time"]
)
def test_endless_loop_is_ended(project, variant, where, told):
    indent = "" if told else "    "
    loop = f"{indent}while True:\n{indent}    pass\n"
    project.kernel.write_text(variant((where, told + loop + ("" if told else where))))
    done = project.prepare("--dry-run", "--trace-limit", "4")
    failed(done, "FAIL_TIMEOUT", "took more than 4 s")
    assert project.processes() == []


@pytest.mark.parametrize(
    ("statement", "told"),
    [("raise SystemExit(0)", "SystemExit"), ("stop(0)", "ended with code 0 and no result")],
)
@pytest.mark.parametrize(("where", "indent"), [("KERNEL_NAME =", ""), (TRACED, "    ")], ids=["import", "trace"])
def test_exit_is_no_pass(judge_file, variant, statement, told, where, indent):
    needs = "import os\nfrom os import _exit as stop\n" if "stop" in statement else ""
    text = variant((where, f"{indent}{statement}\n{where}"), ("import jax\n", f"{needs}import jax\n"))
    failed(judge_file(NEEDS_OS + text), "FAIL_CRASH", told)


def test_problem_that_raises(judge_file, variant):
    text = variant(("    return 2 * ROWS * COLUMNS", "    return 2 * ROWS * COLUMN"))
    failed(judge_file(text), "FAIL_CONTRACT", "the problem's definition raised NameError", "(kernel.py:")


# --- what the compiler refuses ---


def test_vmem_overflow_has_the_compilers_message(judge_file, variant):
    text = variant(("ROWS, COLUMNS = 256, 128", "ROWS, COLUMNS = 4096, 1024"), ("BLOCK = 32", "BLOCK = 2048"))
    done = judge_file(text)
    failed(done, "FAIL_COMPILE", "the TPU compiler says: RESOURCE_EXHAUSTED", "vmem")


def test_lowering_refusal(judge_file, variant):
    done = judge_file(variant(("BLOCK = 32  #", "BLOCK = 4  #")))
    failed(done, "FAIL_COMPILE", "TPU lowering", "divisible by 8", "pallas_call body at kernel.py:")


# --- the command line ---


def test_unknown_chip(project):
    before = project.state()
    refused(project.ratchet("--chip", "v9z", "try"), "unknown chip 'v9z'", "v5e", "tpu7x")
    assert project.state() == before


def test_unknown_workload(judge_file, variant):
    refused(judge_file(variant(), "--workload", "huge"), "no workload huge; the file has default")


def test_chip_mode_without_a_tpu(project, judge_file, variant):
    if list(Path("/dev").glob("accel[0-9]*")) or list(Path("/dev/vfio").glob("[0-9]*")):
        pytest.skip("a TPU is attached")
    told = "no TPU is attached to this machine; --mode model"
    refused(judge_file(variant(), "--mode", "chip"), told)
    before = project.state()
    refused(project.ratchet("--mode", "chip", "try"), told)
    assert project.state() == before


def test_exit_code_2_has_json_too(judge_file, variant):
    done = judge_file(variant(), "--chip", "v9z", "--json")
    refused(done, "unknown chip")
    answer = json.loads(done.out.splitlines()[-1])
    assert answer["status"] is None
    assert "unknown chip 'v9z'" in answer["error"]


@pytest.mark.parametrize("limit", ["0", "-1", "nan"])
def test_trace_limit_is_positive(judge_file, variant, limit):
    done = judge_file(variant(), "--trace-limit", limit)
    assert done.code == 2
    assert "--trace-limit must be positive" in done.err


def test_keep_does_not_empty_a_folder_of_the_users(judge_file, variant, tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    refused(judge_file(variant(), "--keep", str(tmp_path)), "it holds something else")
    assert (tmp_path / "thesis.tex").read_text() == "all of it"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "say what you expect"),
        (("",), "say what you expect"),
        (("  \n",), "say what you expect"),
        (("--new-baseline",), "say what you expect"),
        (("one", "two"), "one note, in quotes: got 'one' and 'two'"),
        (("--fast", "note"), "unknown option --fast"),
        (("--chip",), "--chip needs a value"),
        (("x" * 2001,), "2001 characters"),
    ],
)
def test_ratchet_usage(project, arguments, told):
    project.refuses(*arguments, told=told)


def test_help():
    for command in (["./ratchet.sh", "--help"], [".venv/bin/python", "prepare.py", "--help"]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        for passage in ("usage: ", "--chip", "--mode", "--new-baseline", "--archive", "xit code"):
            assert passage in done.stdout


# --- the working tree ---


@pytest.mark.parametrize("staged", [False, True])
def test_dirty_tree(project, staged):
    project.edit("BLOCK = 32", "BLOCK = 128")
    (project.folder / "README.md").write_text("changed\n")
    if staged:
        project.git("add", "README.md")
    before = project.state()
    refused(project.ratchet("try"), "also changed: README.md", "commit or stash")
    assert project.state() == before


def test_new_staged_file_is_refused(project):
    (project.folder / "more notes.txt").write_text("mine\n")
    project.git("add", "more notes.txt")
    before = project.state()
    refused(project.ratchet("try"), "also changed: more notes.txt")
    assert project.state() == before


# --- the ledger ---


def row(number: int, commit: str) -> ledger.Row:
    empty = dict.fromkeys(ledger.COLUMNS)
    texts = dict.fromkeys(("regime", "workloads", "parent_commit", "artifact_sha256", "reason", "row_sha256"), "")
    return ledger.Row(
        **empty
        | texts
        | {"commit": commit, "status": "FAIL_CRASH", "note": f"note {number}", "number": number, "lineage": 1}
        | {"chip": "v5e", "mode": "model", "seconds": 1.5, "judge_sha256": "0" * 64},
    )


@pytest.fixture
def with_ledger(project):
    """A project whose committed ledger has three rows."""
    head = project.git("rev-parse", "HEAD").strip()
    text = ""
    for number in (1, 2, 3):
        text = appended(text, row(number, head))
    project.ledger.write_text(text)
    project.git("add", "results.tsv")
    project.git("commit", "-q", "-m", "ledger")
    return project


def last_row_removed(text: str) -> str:
    return text[: text.rindex("\n", 0, -1) + 1]


def edited(text: str) -> str:
    return text.replace("note 2", "note two")


TAMPERINGS: list[tuple[Callable[[str], str], int]] = [
    (last_row_removed, 4),
    (edited, 3),
    (lambda text: text.replace("score", "points", 1), 1),
    (lambda text: text[text.index("\n") + 1 :], 1),
    (lambda text: "\0\x01\x02" * 40, 1),
    (lambda text: "", 1),
    (lambda text: text + "my own remark\n", 5),
    (lambda text: text.replace("\n", "\r\n"), 1),
    (lambda text: text.replace("note 3", "\udcff"), 4),
    (lambda text: text.replace("\t1.5\t", "\tnan\t", 1), 2),
]


@pytest.mark.parametrize(("tamper", "line"), TAMPERINGS)
def test_bad_ledger_is_refused_by_line_and_never_written(with_ledger, tamper, line):
    project = with_ledger
    text = tamper(project.ledger.read_text())
    project.ledger.write_bytes(text.encode(errors="surrogateescape"))
    project.edit("BLOCK = 32", "BLOCK = 128")
    before = project.state()
    refused(project.ratchet("try"), f"results.tsv:{line}: ")
    assert project.state() == before


def test_bad_ledger_in_the_commit_too(with_ledger):
    project = with_ledger
    project.ledger.write_text(edited(project.ledger.read_text()))
    project.git("commit", "-q", "-a", "-m", "hide it")
    before = project.state()
    refused(project.ratchet("try"), "results.tsv:3: ", "hash")
    refused(project.prepare("--archive"), "results.tsv:3: ", "hash")
    assert project.state() == before


def test_removed_ledger(with_ledger):
    with_ledger.ledger.unlink()
    refused(with_ledger.ratchet("try"), "results.tsv:1: ", "git checkout results.tsv")
    assert not with_ledger.ledger.exists()
