"""Whole experiments with ./ratchet.sh: one repository's story from its baseline to a clone, and the judge's output."""

import json
import math
import re
import shutil
import signal
import subprocess
import time
from typing import NamedTuple

import pandas
import pytest
from conftest import add_to_kept, appended

from judge import chips, experiment, ledger, roofline

NASTY = 'tiles ×4:\ttab, "quotes"\nsecond line \\t \\ back\x07bell \u202eflipped — 🚀'


class Step(NamedTuple):
    """One experiment: how it ended, and the repository right afterwards."""

    done: object
    row: ledger.Row
    log: list[str]  # subjects, newest first
    status: str
    kernel: str


class Story(NamedTuple):
    project: object
    base: str
    steps: dict[str, Step]


@pytest.fixture(scope="module")
def story(new_project):
    """Ten experiments in a folder with spaces, among untracked files."""
    project = new_project("my kernels – a “test”")
    base = project.git("rev-parse", "HEAD").strip()
    (project.folder / "mine.txt").write_text("untracked\n")
    steps = {}

    def step(name, *arguments, edit=None):
        if edit:
            project.edit(*edit)
        done = project.ratchet(*arguments, GIT_DIR="/nonexistent", GIT_AUTHOR_NAME="x")
        assert "Traceback" not in done.err, done.err
        steps[name] = Step(
            done,
            project.rows()[-1],
            project.git("log", "--format=%s").splitlines(),
            project.git("status", "--porcelain"),
            project.kernel.read_text(),
        )

    step("baseline", "as it is")
    step("unchanged", "--json", "again")
    step("better", NASTY, edit=("BLOCK = 32 ", "BLOCK = 128 "))
    step("slower", "smaller tiles", edit=("BLOCK = 128 ", "BLOCK = 8 "))
    step("comment", "say it better", edit=("# rows a grid step", "# rows of a grid step"))
    step("broken", "no need to add", edit=(" + y_ref[...]", ""))
    step("sealed", "fewer FLOPs", edit=("return 2 * ROWS", "return ROWS"))
    project.git("checkout", "kernel.py")
    step("other chip", "--chip", "v6e", "how is it there")
    step(
        "bad baseline",
        "--new-baseline",
        "another problem",
        edit=("reference_fn(a, x, y):\n    return", "reference_fn("),
    )
    project.git("checkout", "kernel.py")
    step("new baseline", "--new-baseline", "count adds alone", edit=("return 2 * ROWS", "return ROWS"))
    return Story(project, base, steps)


def figures(row):
    """What must repeat to the last digit."""
    names = ("score", "median_ms", "util_pct", "tflops", "regime", "bw_util_pct", "mfu_pct", "mbu_pct", "workloads")
    return {name: getattr(row, name) for name in (*names, "vmem_mib", "spill_count", "copy_count", "artifact_sha256")}


def test_first_experiment_is_the_baseline(story):
    done, row, log, status, _ = story.steps["baseline"]
    assert (done.code, row.status, row.number, row.lineage) == (0, "PASS", 1, 1)
    assert row.commit == story.base
    assert row.reason == done.reason == "baseline of its lineage"
    assert log == [f"ledger 1: PASS score={row.score:.6g}", "start"]
    assert status == "?? mine.txt\n"
    assert done.fields["commit"] == row.commit
    assert float(done.fields["score"]) == row.score


def test_unchanged_kernel_repeats_to_the_last_digit(story):
    done, row, _, status, kernel = story.steps["unchanged"]
    assert (done.code, row.status) == (0, "DUPLICATE")
    assert "champion, unchanged" in row.reason
    assert figures(row) == figures(story.steps["baseline"].row)
    assert kernel == story.steps["baseline"].kernel
    assert status == "?? mine.txt\n"


def test_json_of_an_experiment(story):
    done, row, *_ = story.steps["unchanged"]
    answer = json.loads(done.out.splitlines()[-1])
    assert answer["status"] == "DUPLICATE"
    assert (answer["commit"], answer["number"], answer["lineage"]) == (row.commit, 2, 1)
    assert answer["score"] == pytest.approx(row.score, rel=1e-8)


def test_better_edit_is_kept(story):
    done, row, log, status, kernel = story.steps["better"]
    git = story.project.git
    assert (done.code, row.status) == (0, "PASS"), done.out
    assert done.fields["outcome"] == "kept"
    assert row.score > story.steps["baseline"].row.score
    assert log[0] == f"ledger 3: PASS score={row.score:.6g}"
    assert git("log", "-1", "--format=%B", row.commit).rstrip("\n") == NASTY
    assert git("diff", "--name-only", f"{row.commit}^", row.commit).split() == ["kernel.py"]
    assert git("show", f"{row.commit}:kernel.py") == kernel
    assert "BLOCK = 128 " in kernel
    assert status == "?? mine.txt\n"


def test_the_rows_commit_is_on_top_and_changes_the_ledger_alone(story):
    git = story.project.git
    for commit in git("log", "--format=%H", "--grep=^ledger ").split():
        assert git("diff", "--name-only", f"{commit}^", commit).split() == ["results.tsv"]


def assert_taken_back(story, name, expected, *, passage):
    """The row says so, kernel.py is the champion's again, and the attempt can be had under its ref and its commit."""
    done, row, log, status, kernel = story.steps[name]
    git = story.project.git
    assert (done.code, row.status) == (1, expected), done.out
    assert row.reason == ledger.unescape(done.reason)
    assert passage in row.reason
    assert kernel == story.steps["better"].kernel
    assert status == "?? mine.txt\n"
    assert log[0].startswith(f"ledger {row.number}: {expected}")
    assert git("rev-parse", f"refs/ratchet/{row.lineage}/{row.number}").strip() == row.commit
    assert git("diff", "--name-only", f"{row.commit}^", row.commit).split() == ["kernel.py"]
    assert git("log", "-1", "--format=%B", row.commit).strip() == row.note
    return git("show", f"{row.commit}:kernel.py")


def test_slower_edit_is_taken_back(story):
    attempt = assert_taken_back(story, "slower", "REGRESSION", passage="more than the champion's")
    assert attempt == story.steps["better"].kernel.replace("BLOCK = 128 ", "BLOCK = 8 ")


def test_comment_makes_a_duplicate(story):
    attempt = assert_taken_back(story, "comment", "DUPLICATE", passage="the same compiled program as row 3")
    assert "# rows of a grid step" in attempt


def test_broken_edit_fails(story):
    assert_taken_back(story, "broken", "FAIL_CORRECTNESS", passage="off by more than")
    row = story.steps["broken"].row
    assert (row.score, row.median_ms, row.util_pct, row.regime) == (None, None, None, "")


def test_sealed_symbol_is_named(story):
    assert_taken_back(story, "sealed", "FAIL_CONTRACT", passage="kernel.py changes compute_flops, which the lineage's")


def test_other_chip_has_its_own_lineage(story):
    done, row, *_ = story.steps["other chip"]
    assert (done.code, row.status, row.chip, row.lineage) == (0, "PASS", "v6e", 2)
    assert row.commit == story.steps["better"].row.commit
    assert row.score != story.steps["better"].row.score


def test_new_baseline_that_fails_leaves_the_edit(story):
    done, row, _, status, kernel = story.steps["bad baseline"]
    assert (done.code, row.status) == (1, "FAIL_CONTRACT")
    assert "syntax error" in row.reason
    assert "reference_fn( a * x" not in kernel
    assert "def reference_fn( a[0] * x + y" in kernel
    assert status == " M kernel.py\n?? mine.txt\n"
    assert done.fields["outcome"] == "no baseline: kernel.py is as you left it"


def test_new_baseline_may_change_the_problem(story):
    done, row, _, _, kernel = story.steps["new baseline"]
    assert (done.code, row.status, row.chip) == (0, "PASS", "v5e")
    assert row.lineage == story.steps["bad baseline"].row.lineage + 1
    assert "return ROWS * COLUMNS" in kernel
    assert row.median_ms == story.steps["better"].row.median_ms
    assert row.mfu_pct == pytest.approx(story.steps["better"].row.mfu_pct / 2)


def test_untracked_files_stay(story):
    assert (story.project.folder / "mine.txt").read_text() == "untracked\n"


def test_notes_survive(story):
    assert [row.note for row in story.project.rows()][:4] == ["as it is", "again", NASTY, "smaller tiles"]
    table = pandas.read_csv(story.project.ledger, sep="\t")
    assert table.shape == (len(story.steps), len(ledger.COLUMNS))
    assert tuple(table.columns) == ledger.COLUMNS
    assert table.number.tolist() == list(range(1, len(story.steps) + 1))
    assert table.score.isna().tolist() == [row.score is None for row in story.project.rows()]


def test_archive_clone_audit_and_tampering(story, tmp_path):
    project = story.project
    done = project.ratchet("--archive")
    assert done.code == 0, done.err
    assert re.search(
        r"^archive: \d+ attempts that the branch does not hold are in experiments.bundle, \d+ bytes$", done.out, re.M
    )
    assert project.git("diff", "--name-only", "HEAD^", "HEAD").split() == ["experiments.bundle"]
    head = project.git("rev-parse", "HEAD")
    assert re.search(
        r"^archive: experiments.bundle has all \d+ attempts already$", project.ratchet("--archive").out, re.M
    )
    assert project.git("rev-parse", "HEAD") == head
    assert project.git("status", "--porcelain") == "?? mine.txt\n"

    clone = type(project)(tmp_path / "clone")
    project.git("clone", "-q", ".", str(clone.folder))
    (clone.folder / ".venv").symlink_to(project.folder / ".venv")
    done = clone.prepare("--audit")
    assert (done.code, done.out) == (0, "audit: ledger and git agree\n"), done.out
    for row in clone.rows():
        clone.git("checkout", "-q", row.commit)
        assert clone.kernel.read_text() == project.git("show", f"{row.commit}:kernel.py")
    clone.git("checkout", "-q", "main")

    # A bundle made in a clone keeps what the one before had.
    other = type(project)(tmp_path / "other")
    project.git("clone", "-q", ".", str(other.folder))
    (other.folder / ".venv").symlink_to(project.folder / ".venv")
    assert other.prepare("--archive").code == 0
    slower = story.steps["slower"].row
    assert f"refs/ratchet/1/{slower.number}" in other.git("bundle", "list-heads", "experiments.bundle")

    text = clone.ledger.read_text()
    clone.ledger.write_text(text.replace("smaller tiles", "smaller files"))
    done = clone.prepare("--audit")
    assert done.code == 1
    assert done.out.startswith("results.tsv:5: ")

    # The whole chain of hashes made anew, and committed: what a row says of git still does not hold.
    rows = [row if row.number != 4 else ledger_row(row, status="PASS") for row in ledger.parse(text)]
    forged = ""
    for row in rows:
        forged = appended(forged, row)
    clone.ledger.write_text(forged)
    clone.git("commit", "-q", "-a", "-m", "forged")
    done = clone.prepare("--audit")
    assert done.code == 1
    assert f"results.tsv:5: row 4 (PASS): kept, but commit {slower.commit} is not on the branch" in done.out

    # The last two rows taken out: the chain of the others holds.
    clone.ledger.write_text("".join(f"{line}\n" for line in text.splitlines()[:-2]))
    clone.git("commit", "-q", "-a", "-m", "shortened")
    done = clone.prepare("--audit")
    assert done.code == 1
    assert f"results.tsv: row {len(rows) - 1}, {len(rows)}, which commit " in done.out
    clone.git("rm", "-q", "results.tsv")  # which starts another ledger
    clone.git("commit", "-q", "-m", "another kernel's ledger")
    assert clone.prepare("--audit").code == 0

    done = project.ratchet("--prune", "1")
    assert re.search(r"^prune: \d+ attempts' refs removed, 1 left; ", done.out, re.M), done.out + done.err
    assert project.prepare("--audit").code == 0
    assert project.prepare("--prune", "-1").code == 2


def ledger_row(row, **changes):
    return ledger.Row(**{name: getattr(row, name) for name in ledger.COLUMNS} | changes)


def wait_until(condition, limit_seconds=20):
    end = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_failure_under_another_judge_is_judged_again(story):
    """What this judge could not time, a later one may."""
    slower, broken = story.steps["slower"].row, story.steps["broken"].row
    for row in (slower, broken):
        known = experiment._known(row.artifact_sha256, [row], row.judge_sha256)
        assert known is not None
        assert f"row {row.number} " in known
    assert experiment._known(slower.artifact_sha256, [slower], "another") is not None
    assert experiment._known(broken.artifact_sha256, [broken], "another") is None


# --- interrupted, and two at once ---


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_leaves_everything_as_it_was(project, number, code):
    project.edit("BLOCK = 32 ", "BLOCK = 128 ")
    before = project.state()
    with project.start("./ratchet.sh", "larger tiles") as running:
        assert next(line for line in running.stderr if line.startswith("judge: trace"))
        wait_until(project.processes)  # else the check below would hold for nothing
        if number == signal.SIGTERM:  # while the first one runs, a second is refused
            second = project.ratchet("--no-wait", "me too")
            assert second.code == 2
            assert f"another experiment runs in this folder (process {running.pid} on " in second.err
            assert "'larger tiles'" in second.err
        running.send_signal(number)
        said = running.stderr.read()
    assert running.returncode == code
    assert said.endswith("ratchet: interrupted; nothing was recorded, kernel.py is as you left it\n")
    assert project.processes() == []
    assert project.state() == before


@pytest.mark.parametrize("seconds", [0, 0.001, 0.002, 0.004])
def test_signal_while_a_stage_starts(project, seconds):
    """What a handler raises while Python forks is lost: the stage's start has to hold signals back."""
    with project.start(".venv/bin/python", "prepare.py", "--dry-run") as running:
        assert next(line for line in running.stderr if line.startswith("judge: inputs"))
        time.sleep(seconds)
        running.terminate()
        assert "Traceback" not in running.stderr.read()
    assert running.returncode == 143
    wait_until(lambda: project.processes() == [])


def test_stages_end_with_a_judge_that_is_killed(project):
    project.edit("KERNEL_NAME =", "while True:\n    pass\nKERNEL_NAME =")
    with project.start(".venv/bin/python", "prepare.py", "--dry-run") as running:
        wait_until(project.processes)
        running.kill()
    wait_until(lambda: project.processes() == [])


# --- what a judging prints ---

NUMBER = r"\d+(?:\.\d+)?(?:e[+-]\d+)?"
RESULT = re.compile(rf"^RESULT: score=({NUMBER}) latency=({NUMBER})ms util=({NUMBER})% tflops=({NUMBER})$", re.M)
REGIME = re.compile(rf"^REGIME: (COMPUTE-BOUND|MEMORY-BOUND)(?: BW=({NUMBER})%)?$", re.M)
KEYS = (
    *("status", "mode", "chip", "score", "latency_ms", "util_pct", "mfu_pct", "mbu_pct", "tflops", "regime"),
    *("vmem_bytes", "spill_count", "workloads", "seconds"),
)


def test_result_and_regime_lines(passed):
    answer = json.loads(passed.out.splitlines()[-1])
    result, regime = RESULT.search(passed.out), REGIME.search(passed.out)
    assert result is not None
    assert regime is not None
    assert passed.out.index("RESULT:") == 0
    expected = (answer["score"], answer["latency_ms"], answer["util_pct"], answer["tflops"])
    for printed, exact in zip(result.groups(), expected, strict=True):
        assert float(printed) == pytest.approx(exact, rel=0.06)
    assert regime[1] == answer["regime"]
    assert float(regime[2]) == pytest.approx(answer["bw_util_pct"], abs=0.051)


def test_json_contract(passed):
    answer = json.loads(passed.out.splitlines()[-1])
    assert set(KEYS) <= set(answer)
    assert "reason" not in answer
    assert (answer["status"], answer["mode"], answer["chip"]) == ("PASS", "model", "v5e")
    assert list(answer["workloads"]) == ["default"]
    assert {"latency_ms", "util_pct", "mfu_pct", "mbu_pct", "cycles"} <= set(answer["workloads"]["default"])
    for name in ("score", "latency_ms", "util_pct", "mfu_pct", "mbu_pct", "tflops", "vmem_bytes", "seconds"):
        assert math.isfinite(answer[name]) and answer[name] > 0, name
    assert answer["spill_count"] == 0
    assert answer["score"] == pytest.approx(answer["util_pct"] * 100 / answer["latency_ms"])


def test_figures_follow_from_the_definitions(passed):
    """MFU, MBU and util from FLOPs, bytes and the chip's peaks, computed here anew."""
    answer = json.loads(passed.out.splitlines()[-1])
    chip = chips.load_chip("v5e")
    flops, moved, seconds = 2 * 256 * 128, 4 + 3 * 256 * 128 * 4, answer["latency_ms"] / 1e3
    bf16 = chip.peak_flops_per_second["bf16"]
    peak = roofline.peak_flops_per_second(chip, ["int32", "float32", "float32"])
    assert 0 < peak <= bf16
    assert answer["mfu_pct"] == pytest.approx(100 * flops / (seconds * peak))
    assert answer["mbu_pct"] == pytest.approx(100 * moved / (seconds * chip.hbm_bytes_per_second))
    assert answer["util_pct"] == pytest.approx(max(answer["mfu_pct"], answer["mbu_pct"]))
    assert answer["tflops"] == pytest.approx(flops / seconds / 1e12)


def test_json_of_a_failure_before_the_stages(judge_file, tmp_path):
    done = judge_file(tmp_path / "none.py", "--json")
    assert done.code == 1
    answer = json.loads(done.out.splitlines()[-1])
    assert set(KEYS) | {"reason"} <= set(answer)
    assert answer["status"] == "FAIL_CONTRACT"
    assert "no such file" in answer["reason"]
    assert [answer[name] for name in ("score", "latency_ms", "vmem_bytes", "spill_count")] == [None] * 4
    assert answer["workloads"] == {}


def test_json_of_a_failure_in_a_stage(judge_file, variant):
    done = judge_file(variant(("    rows = pl", "    assert False, 'not yet'\n    rows = pl")), "--json")
    assert done.code == 1
    answer = json.loads(done.out.splitlines()[-1])
    assert set(KEYS) | {"reason"} <= set(answer)
    assert answer["status"] == "FAIL_CRASH"
    assert "AssertionError: not yet" in answer["reason"]
    assert answer["score"] is None


def test_measuring_path_on_the_cpu(judge_file, variant):
    done = judge_file(variant(), "--mode", "chip", "--device", "cpu", "--json")
    assert done.code == 0, done.out + done.err
    answer = json.loads(done.out.splitlines()[-1])
    assert (answer["status"], answer["mode"]) == ("PASS", "chip")
    for name in ("score", "latency_ms", "util_pct", "mfu_pct", "mbu_pct", "tflops", "seconds"):
        assert math.isfinite(answer[name]) and answer[name] > 0, name
    assert answer["vmem_bytes"] is None
    assert RESULT.search(done.out)


def test_kept_folder_may_have_a_space(judge_file, variant, tmp_path):
    """libtpu splits its flags at spaces. Two workloads: each is judged, and one can be chosen."""
    text = variant(("def compute_flops", "WORKLOADS = {'one': {}, 'two': {}}\n\n\ndef compute_flops"))
    done = judge_file(text, "--keep", str(tmp_path / "keep me"), "--workload", "two", "--json")
    assert done.code == 0, done.out + done.err
    assert list(json.loads(done.out.splitlines()[-1])["workloads"]) == ["two"]
    assert (tmp_path / "keep me" / "compile" / "two" / "hlo.txt").exists()


def test_environment_of_a_user_does_not_matter(project):
    """Another interpreter's settings change nothing."""
    done = subprocess.run(
        ["./ratchet.sh", "--chip", "nope", "note"],
        cwd=project.folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(project.folder), "PYTHONHOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "unknown chip 'nope'" in done.stderr


def test_what_was_kept_of_the_reference_is_confirmed_before_an_edit_is_kept(project):
    project.kernel.write_text(project.kernel.read_text() + '\n\nCHECKS = {"fixed": {}}\n')
    project.git("commit", "-qam", "a check set of its own")
    assert project.ratchet("baseline").status == "PASS"
    project.edit("BLOCK = 32 ", "BLOCK = 16 ")
    assert project.ratchet("smaller blocks").status == "REGRESSION"
    (folder,) = (project.folder / ".ratchet" / "expected").iterdir()
    add_to_kept(folder, 1e-5)
    project.edit("BLOCK = 32 ", "BLOCK = 128 ")
    project.refuses("larger blocks", told="check 'fixed': the reference's outputs: what is kept in .ratchet/expected")
    shutil.rmtree(project.folder / ".ratchet" / "expected")
    assert project.ratchet("larger blocks").status == "PASS"
