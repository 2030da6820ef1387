"""agents/search.py against a temporary repository whose ratchet.sh is a stand-in with a synthetic score."""

import ast
import contextlib
import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from agents import loop, search, tunables

ROOT = Path(__file__).resolve().parent.parent

KERNEL = '''\
"""A kernel that must only ever be read."""

Q = 16  # tokens: größer ist nicht besser
KV: int = (
    1  # pages
)

TUNABLES = {
    "Q": (1, 2, 4, 8, 16, 32, 64, 128),  # powers of two
    "KV": (1, 2, 4, 8),
}


def kernel_fn( x ):   # formatting no formatter would leave
\treturn x * Q * KV


raise SystemExit("kernel.py was executed")
'''

# Keeps a better score by a commit, drops the rest; what else it does is in behaviour.json, beside it.
RATCHET = r"""#!@PYTHON@ -IS
import json, math, os, re, signal, subprocess, sys, time

def git(*args):
    return subprocess.run(["git", *args], check=True, capture_output=True, text=True).stdout.strip()

behaviour = json.load(open("behaviour.json"))
note, text = sys.argv[-1], open("kernel.py").read()
q = int(re.search(r"^Q = (\d+)", text, re.M)[1])
kv = int(re.search(r"^KV: int = \(\s+(\d+)", text, re.M)[1])
with open("calls.jsonl", "a") as file:
    print(json.dumps({"argv": sys.argv[1:], "q": q, "kv": kv}), file=file)
if "exit" in behaviour:
    print(behaviour.get("stdout", ""))
    sys.exit(print(behaviour.get("stderr", ""), file=sys.stderr) or behaviour["exit"])
signal.signal(signal.SIGTERM, signal.default_int_handler)
if behaviour.get("hang") == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if behaviour.get("hang") in ("stubborn", "before commit"):
    open("hanging", "w").write(str(os.getpid()))
    time.sleep(60)
champion = git("rev-parse", "HEAD")
git("commit", "-qam", note)
commit = git("rev-parse", "--short", "HEAD")
try:
    if behaviour.get("hang"):
        open("hanging", "w").write(str(os.getpid()))
        time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)  # cleaning up takes a while
    git("reset", "-q", "--hard", champion)
    open("cleaned", "w").close()
    sys.exit(130)
rows = [line.split("\t") for line in open("results.tsv").read().splitlines()]
best = max(float(row[1]) for row in rows[1:] if row[2] == "PASS")
score = 1000 / (1 + abs(math.log2(q / 32)) + abs(math.log2(kv / 4)))
status = "PASS" if score > best else "REGRESSION"
fields = {"chip": "v5e", "mode": behaviour.get("mode", "model")}
if special := behaviour.get("special", {}).get(f"{q},{kv}"):
    status, score = special[:2]
    fields["reason"] = special[2]
if q * kv > 256:
    status, score, fields["reason"] = "FAIL_COMPILE", None, "VMEM: 20.1 MiB of 16 MiB\x1b[31m"
if status != "PASS":
    git("reset", "-q", "--hard", champion)
cell = "" if score is None else repr(score)
with open("results.tsv", "a") as file:
    print(commit, cell, status, *[""] * 5, note, fields["chip"], fields["mode"], sep="\t", file=file)
if score is not None:
    print(f"RESULT: score={score:.2f} latency=0.99ms util=70.94% tflops=139.74\nREGIME: COMPUTE-BOUND BW=9.3%")
for key, value in ({"status": status, "commit": commit, "score": cell} | fields).items():
    print(f"{key}: {value}")
print("score: 1e9", file=sys.stderr)  # what is not on stdout is not the ratchet's word
sys.exit(status != "PASS")
"""

HEADER = "commit\tscore\tstatus\tmedian_ms\tutil_pct\ttflops\tregime\tbw_util_pct\tnote\tchip\tmode\n"
START_SCORE = 1000 / 4


class Tree:
    """The temporary repository, and what its stand-in ratchet was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.kernel = root / "kernel.py"

    def git(self, *arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=self.root, check=True, capture_output=True, text=True)
        return run.stdout.strip()

    def behave(self, **behaviour: Any) -> None:
        (self.root / "behaviour.json").write_text(json.dumps(behaviour))

    def commit_kernel(self, text: str) -> None:
        self.kernel.write_bytes(text.encode())
        self.git("commit", "-qam", "edit")

    def calls(self) -> list[dict[str, Any]]:
        log = self.root / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def points(self) -> list[tuple[int, int]]:
        return [(call["q"], call["kv"]) for call in self.calls()]

    def rows(self) -> list[list[str]]:
        return [line.split("\t") for line in (self.root / "results.tsv").read_text().splitlines()[1:]]

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        with search._opened(f"sqlite:///{self.root}/.ratchet/search/studies.db") as storage:
            (study,) = storage.get_all_studies()
            return storage.get_all_trials(study._study_id)

    def is_clean(self) -> bool:
        return (
            self.git("status", "--porcelain") == ""
            and self.kernel.read_text() == self.git("show", "HEAD:kernel.py") + "\n"
        )

    def wait_for(self, name: str) -> str:
        for _ in range(500):
            with contextlib.suppress(FileNotFoundError):
                if text := (self.root / name).read_text():
                    return text
            time.sleep(0.01)
        raise AssertionError(f"no {name}")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = Tree(tmp_path_factory.mktemp("template"))
    tree.git("init", "-qb", "main")
    for name, value in (("user.name", "t"), ("user.email", "t@example.com"), ("commit.gpgsign", "false")):
        tree.git("config", name, value)
    (tree.root / ".gitignore").write_text("results.tsv\nbehaviour.json\ncalls.jsonl\nhanging\ncleaned\n*.db\n")
    (tree.root / "ratchet.sh").write_text(RATCHET.replace("@PYTHON@", sys.executable))
    (tree.root / "ratchet.sh").chmod(0o755)
    tree.kernel.write_text(KERNEL)
    tree.git("add", "-A")
    tree.git("commit", "-qm", "start")
    commit = tree.git("rev-parse", "--short", "HEAD")
    (tree.root / "results.tsv").write_text(f"{HEADER}{commit}\t{START_SCORE}\tPASS\t\t\t\t\t\tstart\tv5e\tmodel\n")
    tree.behave()
    (tree.root / ".ratchet/search").mkdir(parents=True)
    with search._opened(f"sqlite:///{tree.root}/.ratchet/search/studies.db"):
        pass  # an empty database, whose making takes longer than most of the tests
    return tree.root


@pytest.fixture
def tree(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(loop, "POLL_SECONDS", 0.02)
    tree = Tree(shutil.copytree(template, tmp_path / "repo"))
    monkeypatch.chdir(tree.root)
    return tree


def signal_when_hanging(tree: Tree, signum: int) -> threading.Thread:
    def send() -> None:
        tree.wait_for("hanging")
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


# --- what a search does ---------------------------------------------------------------------------------------------


def test_finds_the_best_and_changes_nothing_but_the_values(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--trials", "12", "--seed", "1", "--chip", "v5e", "--mode", "model"]) == 0
    best = KERNEL.replace("Q = 16", "Q = 32").replace("    1  # pages", "    4  # pages")
    assert tree.kernel.read_text() == best
    assert tree.is_clean()
    assert len(set(tree.points())) == 12, "no combination twice"
    assert (16, 1) not in tree.points(), "the champion was known"
    assert all(call["argv"][:-1] == ["--chip", "v5e", "--mode", "model"] for call in tree.calls())
    out = capsys.readouterr().out
    assert f"start: score={START_SCORE:.2f} Q=16 KV=1\n" in out
    assert "score: 250.00 -> 1000.00 (+300.0%)\nbest: Q=32 KV=4\n" in out
    progress = re.findall(r"^trial (\d+)/12: Q=\d+ KV=\d ... [A-Z_]+ score=\S+ best=\S+ [\d.]+s.*$", out, re.M)
    assert progress == [str(number) for number in range(1, 13)]
    assert "\x1b" not in out
    q, kv = 16, 1
    for row, point in zip(tree.rows()[1:], tree.points(), strict=True):
        pairs = (("Q", q, point[0]), ("KV", kv, point[1]))
        assert row[8] == "search: " + ", ".join(f"{name} {old} -> {new}" for name, old, new in pairs if old != new)
        if row[2] == "PASS":
            q, kv = point
    kept = sum(row[2] == "PASS" for row in tree.rows()[1:])
    failed = sum(row[2] == "FAIL_COMPILE" for row in tree.rows())
    assert f"trials: 12 run, {kept} kept, {failed} failed; study has 12 of 12\n" in out


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_resuming_goes_on_where_an_uninterrupted_search_would_be(
    tree: Tree, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    options = ["--seed", "7", "--sampler", sampler, "--trials"]
    for trials in ("2", "5", "5"):
        assert search.main([*options, trials]) == 0
    whole = Tree(shutil.copytree(template, tmp_path / "whole"))
    monkeypatch.chdir(whole.root)
    assert search.main([*options, "5"]) == 0
    assert len(tree.points()) == 5
    assert tree.points() == whole.points()


def test_statuses_reach_the_sampler_as_what_they_are(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    special = {"8,1": ["REGRESSION", 5000.0, "decode got worse"], "4,1": ["DUPLICATE", None, "same program"]}
    special |= {"2,1": ["DUPLICATE", 77.0, ""], "1,1": ["FAIL_MISMATCH", 9000.0, "wrong"]}
    tree.behave(special=special)
    assert search.main(["--only", "Q", "--sampler", "grid", "--trials", "7"]) == 0
    told = {trial.params["Q"]: (trial.state, trial.value) for trial in tree.trials()}
    assert told["16"] == (TrialState.COMPLETE, START_SCORE), "the champion, from the ledger"
    assert told["8"] == (TrialState.COMPLETE, 5000.0), "refused for one workload, but its score is true"
    assert told["4"] == (TrialState.FAIL, None)
    assert told["2"] == (TrialState.COMPLETE, 77.0)
    assert told["1"] == (TrialState.PRUNED, None), "a failure's figures are no score"
    out = capsys.readouterr().out
    assert "Q=8 ... REGRESSION score=5000.00" in out
    assert "(decode got worse)" in out
    assert "higher, not kept: score=5000.00 REGRESSION Q=8" in out
    assert "7 run, 1 kept, 1 failed" in out
    assert search.main(["--only", "Q", "--sampler", "grid", "--trials", "30"]) == 0
    assert len(tree.calls()) == 7, "a duplicate is not tried again either"


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_stops_early_when_every_combination_has_been_tried(
    tree: Tree, capsys: pytest.CaptureFixture[str], sampler: str
) -> None:
    assert search.main(["--sampler", sampler, "--seed", "3", "--only", "Q", "--trials", "50"]) == 0
    assert sorted(tree.points()) == [(q, 1) for q in (1, 2, 4, 8, 32, 64, 128)]
    assert "all 8 combinations have been tried: stopping early" in capsys.readouterr().out


def test_only_leaves_the_other_tunables_alone(tree: Tree) -> None:
    assert search.main(["--only", "KV", "--trials", "9"]) == 0
    assert sorted(tree.points()) == [(16, 2), (16, 4), (16, 8)]


def test_a_changed_body_starts_a_new_study_and_changed_values_do_not(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    names = []
    for text in (KERNEL, KERNEL.replace("Q = 16", "Q = 8"), KERNEL.replace("x * Q", "x + Q")):
        if text != tree.kernel.read_text():
            tree.commit_kernel(text)
        tree.behave(exit=2)
        assert search.main([]) == 2
        names += re.findall(r"^study: (default-auto-[0-9a-f]{12}) ", capsys.readouterr().out)
    assert names[0] == names[1] != names[2]


def test_a_named_study_refuses_another_kernel(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--study", "mine", "--storage", "s.db", "--trials", "1"]) == 0
    assert (tree.root / "s.db").exists()
    tree.commit_kernel(KERNEL.replace("x * Q", "x + Q"))
    assert search.main(["--study", "mine", "--storage", "s.db", "--trials", "2"]) == 2
    assert "study mine is for another kernel, chip or mode" in capsys.readouterr().err
    assert len(tree.calls()) == 1


def test_scores_of_another_mode_are_not_mixed_in(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--trials", "1"]) == 0
    tree.behave(mode="chip")
    assert search.main(["--trials", "2"]) == 2
    assert "scores are for mode model, ratchet.sh now reports chip" in capsys.readouterr().err
    assert tree.trials()[-1].state == TrialState.FAIL


@pytest.mark.parametrize(("rows", "score"), [("v5e\tchip", "-"), ("v5e\tmodel", "7.00")])
def test_start_score_is_the_ledgers_only_if_it_is_clear_which(
    tree: Tree, capsys: pytest.CaptureFixture[str], rows: str, score: str
) -> None:
    commit = tree.git("rev-parse", "HEAD")
    with (tree.root / "results.tsv").open("a") as file:
        print(commit, 7.0, "PASS", *[""] * 6, rows, sep="\t", file=file)
        print("0badc0de", 8.0, "PASS", *[""] * 6, rows, sep="\t", file=file)
    tree.behave(exit=2)
    search.main([])
    assert f"start: score={score} " in capsys.readouterr().out


def test_works_without_a_ledger(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    (tree.root / "results.tsv").unlink()
    tree.behave(exit=1, stdout="status: REGRESSION\nscore: 3.5")
    assert search.main(["--trials", "2"]) == 0
    assert "score: - -> -\n" in capsys.readouterr().out


# --- what stops it --------------------------------------------------------------------------------------------------


def test_exit_2_of_the_ratchet_stops_the_search_with_its_message(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.behave(exit=2, stderr="ratchet: no TPU compiler")
    assert search.main([]) == 2
    captured = capsys.readouterr()
    assert captured.err == "search: ratchet.sh could not judge (exit 2)\nratchet: no TPU compiler\n"
    assert "trials: 0 run" in captured.out
    assert len(tree.calls()) == 1
    assert tree.is_clean()
    assert tree.trials()[-1].state == TrialState.FAIL
    tree.behave()
    assert search.main(["--trials", "1"]) == 0, "the failed trial does not count"
    assert len(tree.calls()) == 2


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        (0, ""),
        (0, "status: PASS"),
        (0, "status: PASS\nscore: 0"),
        (0, "status: PASS\nscore: nan"),
        (0, "status: REGRESSION\nscore: 5.0"),
        (1, ""),
        (1, "status: PASS\nscore: 5.0"),
        (137, "status: PASS\nscore: 5.0"),
    ],
)
def test_what_is_no_verdict_is_no_trial(code: int, stdout: str) -> None:
    fields = dict(line.split(": ") for line in stdout.splitlines())
    with pytest.raises(search.CannotSearchError, match=r"gave no verdict|could not judge \(exit 137\)"):
        loop.Result(exit_code=code, fields=fields).check()


@pytest.mark.parametrize("stage", [False, True])
def test_an_edited_kernel_is_refused_and_not_touched(
    tree: Tree, capsys: pytest.CaptureFixture[str], stage: bool
) -> None:
    tree.kernel.write_text(KERNEL.replace("Q = 16", "Q = 8"))
    if stage:
        tree.git("add", "kernel.py")
        tree.kernel.write_text(KERNEL)
    before = tree.git("status", "--porcelain"), tree.kernel.read_text()
    assert search.main([]) == 2
    assert "commit or discard your edit first" in capsys.readouterr().err
    assert (tree.git("status", "--porcelain"), tree.kernel.read_text()) == before
    assert tree.calls() == []


def test_two_searches_do_not_share_a_kernel(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.behave(exit=2)
    search.main([])
    with (tree.root / ".ratchet/search/lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert search.main([]) == 2
    assert "another search is running" in capsys.readouterr().err


def test_needs_a_ratchet(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    (tree.root / "ratchet.sh").chmod(0o644)
    assert search.main([]) == 2
    assert "no executable ratchet.sh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("TUNABLES = ", "OTHER = ", "no TUNABLES"),
        ("TUNABLES = {", "TUNABLES = make({})\nOTHER = {", "must be a dict literal"),
        ('TUNABLES = {\n    "Q"', 'TUNABLES = {}\nOTHER = {\n    "Q"', "at least one entry"),
        ('"KV": (1', '"PAGES": (1', "no module-level constant PAGES"),
        ('"KV": (1, 2, 4, 8)', '"KV": ()', "at least one value"),
        ('"KV": (1, 2, 4, 8)', '"KV": 1', "must be a tuple"),
        ('"KV": (1, 2, 4, 8)', '"KV": (1, 2, 2)', "lists a value twice"),
        ('"KV": (1, 2, 4, 8)', '"KV": (1, Q)', "Q is not a finite literal"),
        ('"KV": (1, 2, 4, 8)', '"KV": (1, 1e999)', "not a finite literal"),
        ('"KV": (1, 2, 4, 8)', '"Q": (16,)', "TUNABLES names Q 2 times"),
        ('"KV": (1, 2, 4, 8)', "KV: (1, 2, 4, 8)", "not the name of a constant"),
        ("Q = 16", "Q = 17", "Q = 17 is not among its TUNABLES values (1, 2, 4, 8, 16, 32, 64, 128)"),
        ("Q = 16", "Q = 16.0", "Q = 16.0 is not among"),
        ("Q = 16", "Q = 8 + 8", "8 + 8 is not a finite literal"),
        ("Q = 16", "Q = 16\nQ = 16", "binds Q 2 times (lines [3, 4])"),
        ("Q = 16", "Q = R = 16", "must be a plain module-level Q = value"),
        ("Q = 16", "if True:\n    Q = 16", "must be a plain module-level Q = value"),
        ("\treturn", "\tglobal Q\n\treturn", "binds Q 2 times"),
        ("def kernel_fn( x )", "def kernel_fn( x", "cannot be parsed"),
    ],
)
def test_bad_tunables_are_named(old: str, new: str, message: str) -> None:
    assert KERNEL.count(old) == 1
    with pytest.raises(search.CannotSearchError, match=re.escape(message)):
        search._chosen(KERNEL.replace(old, new).encode(), None)


@pytest.mark.parametrize("text", ["TUNABLES = {}", KERNEL.replace("\n\ndef", "\n\n\x0cdef")])
def test_a_kernel_that_cannot_be_searched_is_not_touched(
    tree: Tree, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    tree.commit_kernel(text)
    assert search.main([]) == 2
    assert capsys.readouterr().err.startswith(("search: TUNABLES must be", "search: kernel.py has characters"))
    assert tree.calls() == []
    assert tree.kernel.read_text() == text


def test_only_must_name_tunables(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--only", "Q,BLOCK"]) == 2
    assert "'BLOCK' is not in TUNABLES (Q, KV)" in capsys.readouterr().err


def test_usage_errors_exit_2_and_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--trials", "0"], ["--chip", "v99"], ["--sampler", "best"]):
        with pytest.raises(SystemExit) as exit_info:
            search.main(arguments)
        assert exit_info.value.code == 2
    with pytest.raises(SystemExit) as exit_info:
        search.main(["--help"])
    assert exit_info.value.code == 0
    assert "examples:\n  python -m agents.search" in capsys.readouterr().out


# --- however it ends, kernel.py is HEAD's ---------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_ratchets_clean_up(
    tree: Tree, capsys: pytest.CaptureFixture[str], signum: signal.Signals
) -> None:
    tree.behave(hang="after commit")
    head = tree.git("rev-parse", "HEAD")
    thread = signal_when_hanging(tree, signum)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert search.main(["--trials", "5", "--seed", "1"]) == 130
    thread.join()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert (tree.root / "cleaned").exists()
    assert tree.git("rev-parse", "HEAD") == head
    assert tree.is_clean()
    assert tree.trials()[-1].state == TrialState.FAIL
    out = capsys.readouterr().out
    assert "trials: 0 run" in out
    assert "interrupted; to go on with study default-auto-" in out
    assert out.endswith(":\n  python -m agents.search --trials 5 --seed 1\n")
    tree.behave()
    assert search.main(["--trials", "1", "--seed", "1"]) == 0
    first, second = tree.points()
    assert first == second, "tried again"


def test_a_ratchet_that_does_not_end_is_killed(
    tree: Tree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CLEANUP_SECONDS", 0.2)
    tree.behave(hang="stubborn")
    thread = signal_when_hanging(tree, signal.SIGINT)
    assert search.main([]) == 130
    thread.join()
    assert "was killed" in capsys.readouterr().err
    assert tree.is_clean()


def test_a_crash_of_the_driver_restores_the_kernel(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(root: Path, arguments: list[str], stop: loop.Stop) -> loop.Result:
        assert not tree.is_clean()
        raise MemoryError

    monkeypatch.setattr(search, "run_ratchet", crash)
    with pytest.raises(MemoryError):
        search.main([])
    assert tree.is_clean()
    assert tree.trials()[-1].state == TrialState.FAIL


def test_a_crash_while_the_ratchet_runs_ends_it_first(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(process: "subprocess.Popen[bytes]", stop: loop.Stop) -> int:
        tree.wait_for("hanging")
        raise MemoryError

    monkeypatch.setattr(loop, "_wait", crash)
    tree.behave(hang="before commit")
    with pytest.raises(MemoryError):
        search.main([])
    assert tree.is_clean()
    with pytest.raises(ProcessLookupError):
        os.kill(int(tree.wait_for("hanging")), 0)


def test_an_edit_that_is_not_the_searchs_stays(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    run = loop.run_ratchet

    def edit(root: Path, arguments: list[str], stop: loop.Stop) -> loop.Result:
        result = run(root, arguments, stop)
        tree.kernel.write_text("# somebody's work\n")
        return result

    monkeypatch.setattr(search, "run_ratchet", edit)
    assert search.main([]) == 2
    assert tree.kernel.read_text() == "# somebody's work\n"


def test_a_killed_search_is_cleaned_up_by_the_next(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.behave(hang="before commit")
    with start_search(tree, "--trials", "2") as driver:
        ratchet = int(tree.wait_for("hanging"))
        driver.kill()
    os.kill(ratchet, signal.SIGKILL)
    assert not tree.is_clean()
    assert tree.trials()[-1].state == TrialState.RUNNING
    tree.behave()
    assert search.main(["--trials", "2"]) == 0
    assert "restored" in capsys.readouterr().out
    states = [trial.state for trial in tree.trials()]
    assert states[1] == TrialState.FAIL
    assert TrialState.RUNNING not in states
    assert tree.is_clean()


def test_a_verdict_survives_a_kill_before_the_sampler_heard_it(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(search.Search, "_finish", lambda *_: None)
        assert search.main(["--trials", "1", "--only", "KV"]) == 0
    assert [trial.state for trial in tree.trials()] == [TrialState.COMPLETE, TrialState.RUNNING]
    assert search.main(["--trials", "1", "--only", "KV"]) == 0
    assert {trial.state for trial in tree.trials()} == {TrialState.COMPLETE}
    assert len(tree.calls()) == 1


def start_search(tree: Tree, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "agents.search", *arguments],
        cwd=tree.root,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_as_a_command_it_warns_of_nothing_and_obeys_sigint(tree: Tree) -> None:
    with start_search(tree, "--trials", "2", "--seed", "1") as driver:
        out, err = driver.communicate(timeout=60)
    assert (driver.returncode, err) == (0, "")
    assert "study has 2 of 2" in out
    tree.behave(hang="after commit")
    with start_search(tree, "--trials", "3", "--seed", "1") as driver:
        tree.wait_for("hanging")
        driver.send_signal(signal.SIGINT)
        out, err = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "Traceback" not in err
    assert (tree.root / "cleaned").exists()
    assert tree.is_clean()


# --- its parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name", "value", "expected"),
    [
        (b"A = 1\r\nB=2 # x\r\n", "A", "16", b"A = 16\r\nB=2 # x\r\n"),
        (b"A = 1\nB=2 # x\r\nC = 3", "B", "-1", b"A = 1\nB=-1 # x\r\nC = 3"),
        (
            b"\xef\xbb\xbfA  =  (  # why\n  1 # \xc3\xa4\n)  ",
            "A",
            "8",
            b"\xef\xbb\xbfA  =  (  # why\n  8 # \xc3\xa4\n)  ",
        ),
        (b"# -*- coding: latin-1 -*-\nA = 1  # \xe4\n", "A", "2", b"# -*- coding: latin-1 -*-\nA = 2  # \xe4\n"),
        (b"A: 'int' = 1; B = 2\n\n\n", "B", "'x'", b"A: 'int' = 1; B = 'x'\n\n\n"),
        (b"A = 'p', 2\nif A:\n\tB = 1\\\n\t  + 2\n", "A", "('q', 3)", b"A = ('q', 3)\nif A:\n\tB = 1\\\n\t  + 2\n"),
    ],
)
def test_rewriting_leaves_every_other_byte(source: bytes, name: str, value: str, expected: bytes) -> None:
    assert tunables.rewrite(source, {name: value}) == expected
    assert tunables.rewrite(source, {}) == source


def test_the_repositorys_kernel_can_be_searched() -> None:
    source = (ROOT / "kernel.py").read_bytes()
    found = tunables.read_tunables(source)
    present = tunables.present_values(source, found)
    pairs = zip(found, present, strict=True)
    other = {tunable.name: tunable.values[tunable.values.index(value) - 1] for tunable, value in pairs}
    changed = tunables.rewrite(source, other)
    assert tunables.present_values(changed, found) == tuple(other.values())
    assert tunables.body_hash(changed, found) == tunables.body_hash(source, found)
    back = tunables.rewrite(changed, dict(zip(other, present, strict=True)))
    assert back == source


SPACES = [(1,), (5,), (8, 4), (3, 1, 2, 7), (2, 2, 2, 2, 2)]


def make_space(sizes: tuple[int, ...]) -> search.Space:
    axes = [tunables.Tunable(name=f"T{axis}", values=tuple(map(str, range(size)))) for axis, size in enumerate(sizes)]
    return search.Space(tuple(axes))


@pytest.mark.parametrize("sizes", SPACES)
def test_the_grid_visits_each_combination_once(sizes: tuple[int, ...]) -> None:
    space = make_space(sizes)
    assert space.size == math.prod(sizes)
    assert len({space.grid_point(index) for index in range(3, 3 + space.size)}) == space.size


def test_a_huge_grid_is_not_enumerated() -> None:
    space = make_space((9,) * 40)
    sampler = search.UntriedSampler(space, "grid", 0)
    for _ in range(20):
        point = sampler._next_of_grid()
        assert point not in sampler.tried
        sampler.tried.add(point)
    centre = ("4",) * 40
    assert sum(a != b for a, b in zip(space.nearest(centre, {centre}, random.Random(0)), centre, strict=True)) == 1


@pytest.mark.parametrize("sizes", SPACES[1:])
def test_nearest_finds_the_fewest_steps(sizes: tuple[int, ...]) -> None:
    space = make_space(sizes)
    rng = random.Random(1)
    points = [space.grid_point(index) for index in range(space.size)]

    def steps(one: tunables.Combination, other: tunables.Combination) -> int:
        return sum(abs(int(a) - int(b)) for a, b in zip(one, other, strict=True))

    for _ in range(30):
        start = rng.choice(points)
        tried = set(rng.sample(points, rng.randrange(space.size)))
        found = space.nearest(start, tried, rng)
        assert found not in tried
        assert steps(start, found) == min(steps(start, point) for point in points if point not in tried)


def test_agents_do_not_import_what_they_drive() -> None:
    for path in (ROOT / "agents").glob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
        assert not imported & {"judge", "prepare", "kernel", "kernels", "importlib", "runpy"}, path
