"""judge/parallel.py: candidates judged at the same time, killed at every step; each has a row, or is named."""

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fake_judge as fake
import pytest

from judge import ledger, parallel
from judge.audit import audit
from judge.journal import JOURNALS
from judge.lock import Refused

IN_MEMORY = Path("/dev/shm")  # as in test_faults.py
PLACE = str(IN_MEMORY) if os.access(IN_MEMORY, os.W_OK) else None
FOUR = {"win": fake.kernel(64), "better": fake.kernel(128), "loss": fake.kernel(8), "broken": fake.kernel(0)}


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A repository with a baseline."""
    with tempfile.TemporaryDirectory(prefix="ratchet-test-", dir=PLACE) as place:
        made = fake.make_repository(Path(place) / "my kernels")
        assert fake.run(made, "baseline") == 0
        yield made


@pytest.fixture
def folder(template: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ratchet-test-", dir=PLACE) as place:
        yield shutil.copytree(template, Path(place) / "my kernels", symlinks=True)


def run(folder: Path, texts: dict[str, str], **options) -> int:
    code = fake.end(fake.start_several(folder, texts, **options))
    assert code != 99, fake.said(folder)
    return code


def statuses(folder: Path) -> dict[str, str]:
    return {row.note: row.status for row in ledger.read(folder / "results.tsv")}


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def judging(folder: Path) -> int:
    """How many candidates are committed and have no verdict yet."""
    texts = []
    for path in (folder / ".ratchet").glob(JOURNALS):
        try:
            texts.append(path.read_text())
        except FileNotFoundError:
            continue
    return sum('"committed"' in text for text in texts)


def settled(folder: Path, texts: dict[str, str], reported: dict[str, int]) -> str:
    """Runs the next experiment after a kill; each candidate has a row, or was said to have none. What was said."""
    told = fake.said(folder)
    code = fake.run(folder, "next")
    told += fake.said(folder)
    assert code == 0 or "is not what it was when this was asked for" in fake.said(folder)
    fake.check(folder, {"baseline": 0} | reported | ({"next": 0} if code == 0 else {}))
    fake.check_candidates(folder, texts, told)
    return told


# --- all goes well ---


def test_each_has_a_row_and_the_best_is_kept(folder):
    assert run(folder, FOUR) == 0
    reported = fake.reported(folder)
    fake.check(folder, {"baseline": 0} | reported)
    assert set(reported) == set(FOUR)
    assert (folder / "kernel.py").read_text() == FOUR["better"]
    found = statuses(folder)
    assert (found["better"], found["broken"]) == ("PASS", "FAIL_CORRECTNESS")
    assert found["loss"] == "REGRESSION"
    assert "not judged" not in fake.said(folder)


def test_they_are_judged_at_the_same_time_and_no_more_than_jobs(folder):
    texts = {f"{number}": fake.kernel(64 + number, " takes 0.4 s") for number in range(6)}
    pid = fake.start_several(folder, texts, jobs=3)
    most = 0
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        most = max(most, judging(folder))
        time.sleep(0.002)
    assert most == 3
    assert len(fake.reported(folder)) == 6
    fake.check(folder, {"baseline": 0} | fake.reported(folder))


@pytest.mark.parametrize(("slow", "other"), [("REGRESSION", 128), ("PASS", 64)])
def test_compared_with_the_champion_of_the_moment(folder, slow, other):
    """Both would beat the champion that they began with."""
    assert run(folder, {"slow": fake.kernel(96, " takes 0.5 s"), "quick": fake.kernel(other)}) == 0
    assert statuses(folder) == {"baseline": "PASS", "quick": "PASS", "slow": slow}
    best = ledger.read(folder / "results.tsv")[2 if slow == "PASS" else 1]
    assert fake.git(folder, "show", f"{best.commit}:kernel.py") == (folder / "kernel.py").read_text()
    fake.check(folder, {"baseline": 0} | fake.reported(folder))


def test_an_edit_in_kernel_py_stays(folder):
    fake.edit(folder, 200, " mine")
    assert run(folder, FOUR) == 0
    assert (folder / "kernel.py").read_text() == fake.kernel(200, " mine")
    assert fake.git(folder, "status", "--porcelain") == " M kernel.py\n"
    assert audit(folder) == []


def test_kernel_py_may_be_a_candidate(folder):
    fake.edit(folder, 8)
    assert run(folder, {"kernel.py": fake.kernel(8), "better": fake.kernel(64)}) == 0
    fake.check(folder, {"baseline": 0} | fake.reported(folder))
    assert (folder / "kernel.py").read_text() == fake.kernel(64)


def test_identical_candidates(folder):
    assert run(folder, {"a": fake.kernel(64), "b": fake.kernel(64), "as it is": fake.KERNEL}) == 0
    found = statuses(folder)
    # The champion unchanged, where one was begun when the other was recorded.
    assert sorted((found["a"], found["b"])) in (["PASS", "REGRESSION"], ["DUPLICATE", "PASS"])
    fake.check(folder, {"baseline": 0} | {name: code for name, code in fake.reported(folder).items() if len(name) == 1})


def test_without_a_baseline_it_is_refused(tmp_path):
    made = fake.make_repository(tmp_path / "fresh")
    assert run(made, FOUR) == 2
    assert 'no baseline on v5e in model mode yet: ./ratchet.sh "baseline" first' in fake.said(made)
    assert not list((made / ".ratchet").glob(JOURNALS))


# --- somebody at work meanwhile ---


def test_a_commit_of_the_users_meanwhile(folder):
    """kernel.py that they changed is theirs: a win over it is not kept. Another file does not matter."""
    for text, kept in ((None, True), (fake.kernel(16, " theirs"), False)):
        note = "win" if kept else "too late"
        pid = fake.start_several(folder, {note: fake.kernel(64 if kept else 128, " takes 1 s")})
        wait_for(lambda: judging(folder) == 1)
        (folder / ("notes.txt" if kept else "kernel.py")).write_text(text or "notes")
        fake.git(folder, "add", "notes.txt", "kernel.py")
        fake.git(folder, "commit", "-q", "-m", "theirs")
        assert fake.end(pid) == 0
        assert statuses(folder)[note] == ("PASS" if kept else "FAIL_CRASH")
        assert fake.reported(folder) == {note: 0 if kept else 1}
        assert audit(folder) == []
        assert fake.git(folder, "status", "--porcelain") == ""
    assert (folder / "kernel.py").read_text() == fake.kernel(16, " theirs")


def test_branch_that_is_left_meanwhile(folder):
    texts = {"win": fake.kernel(64, " takes 0.5 s"), "second": fake.kernel(128)}
    pid = fake.start_several(folder, texts, jobs=1)
    wait_for(lambda: judging(folder) == 1)
    fake.git(folder, "switch", "-q", "-c", "side")
    assert fake.end(pid) == 2
    assert "git switch main" in fake.said(folder)
    fake.git(folder, "switch", "-q", "main")
    told = settled(folder, texts, {})
    assert "was judged PASS when it was killed, and is recorded" in told
    assert "to be tried again: second" in told


# --- killed ---


@pytest.mark.parametrize("afterwards", [False, True])
@pytest.mark.parametrize("step", range(7))
def test_one_is_killed_at_every_step(folder, step, afterwards):
    """The others go on, and the parent finishes or undoes what is left of it before it ends."""
    dies = fake.dies_at_journal(step, afterwards=afterwards, name="journal-2.json")
    code = run(folder, FOUR, before=dies)
    assert code == 0
    reported = fake.reported(folder)
    assert set(reported) >= {"win", "loss", "broken"}, fake.said(folder)
    seen = step + afterwards
    found = statuses(folder)
    expected = {0: None, 1: None, 2: "FAIL_CRASH"}.get(seen, "PASS")
    assert found.get("better") == expected
    fake.check(folder, {"baseline": 0} | reported)
    assert ("to be tried again: better" in fake.said(folder)) == (expected is None)


@pytest.mark.parametrize("step", range(1, 7))
def test_all_are_killed_at_every_step(folder, step):
    """Candidates that reach the step, and the parent when it recovers them; it has written the first one."""
    assert run(folder, FOUR, before=fake.dies_at_journal(step, afterwards=step % 2 == 1)) in (0, -signal.SIGKILL)
    settled(folder, FOUR, fake.reported(folder))


@pytest.mark.parametrize("first", [0, 3])
def test_killed_at_git_commands(folder, first):
    """Some of them: benchmarks/faults.py has all. The parent's own are the first."""
    for number in range(first, 60, 7):
        texts = {f"{name} {number}": f"{text}# {number}\n" for name, text in FOUR.items()}
        code = run(folder, texts, before=fake.dies_at_git(number, afterwards=number % 2 == 1))
        assert code in (0, -signal.SIGKILL)
        reported = fake.reported(folder)
        next_code = fake.run(folder, f"next {number}")
        assert next_code == 0 or "is not what it was when this was asked for" in fake.said(folder)
        fake.check(folder, {"baseline": 0} | reported)
        if code == 0 and "recovered" not in fake.said(folder) and len(reported) == 4:
            break


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random(folder, seed):
    draw = random.Random(seed)
    texts = {name: text.replace("faster", f"faster, takes 0.{draw.randrange(3)} s") for name, text in FOUR.items()}
    pid = fake.start_several(folder, texts, jobs=draw.choice([1, 2, 4]))
    time.sleep(draw.uniform(0, 0.8))
    assert (fake.kill_session(pid) if seed % 2 else fake.kill(pid, with_children=False)) in (-signal.SIGKILL, 0)
    settled(folder, texts, fake.reported(folder))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_undoes_what_has_no_verdict(folder, number):
    class Interrupted(BaseException):
        pass

    def install() -> None:
        def interrupt(signum, frame):
            raise Interrupted

        signal.signal(number, interrupt)
        signal.signal(signal.SIGTERM, interrupt)

    fake.edit(folder, 200, " mine")
    texts = {"quick": fake.kernel(64), "slow": fake.kernel(128, " takes 60 s"), "not begun": fake.kernel(96)}
    pid = fake.start_several(folder, texts, jobs=1, before=install)
    wait_for(lambda: "quick" in fake.reported(folder) and judging(folder) == 1)
    os.killpg(pid, number)
    assert fake.end(pid) == 99  # the signal is raised once all is undone
    assert "not judged, to be tried again: slow, not begun" in fake.said(folder)
    assert statuses(folder) == {"baseline": "PASS", "quick": "PASS"}
    assert (folder / "kernel.py").read_text() == fake.kernel(200, " mine")
    fake.git(folder, "checkout", "-q", "kernel.py")
    fake.check(folder, {"baseline": 0, "quick": 0})


def test_two_loops_and_candidates_in_one_folder(folder):
    reported = {"baseline": 0}
    pids = [fake.start_several(folder, FOUR), fake.start(folder, "another")]
    assert [fake.end(pid) < 3 for pid in pids] == [True, True]
    found = statuses(folder)
    assert set(found) - {"another"} == {"baseline", *FOUR}
    fake.check(folder, reported)


# --- what is asked for ---


def test_candidates_are_read(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("x = 1\n")
    (one,) = parallel.read_candidates([(path, "why")])
    assert (one.name, one.note, one.data) == (str(path), "why", b"x = 1\n")
    for pairs, told in (
        ([(tmp_path / "b.py", "why")], "no such file"),
        ([(path, "why"), (path, "why not")], "given twice"),
        ([(path, " ")], "say what you expect"),
    ):
        with pytest.raises(Refused, match=told):
            parallel.read_candidates(pairs)


def test_default_jobs():
    assert parallel.default_jobs("chip") == 1
    assert 1 <= parallel.default_jobs("model") <= len(os.sched_getaffinity(0))


# --- with the real judge ---


@pytest.mark.slow
def test_ratchet_with_candidates(project, tmp_path):
    assert project.ratchet("baseline").code == 0
    text = project.kernel.read_text()
    variants = {
        "better": text.replace("BLOCK = 32 ", "BLOCK = 128 "),
        "same": text.replace("BLOCK = 32 ", "BLOCK = 128 ") + "# the same program\n",
        "broken": text.replace(" + y_ref[...]", ""),
    }
    arguments = []
    for name, variant in variants.items():
        (tmp_path / f"{name}.py").write_text(variant)
        arguments += [str(tmp_path / f"{name}.py"), f"{name}: why"]
    done = project.ratchet("--jobs", "3", "--json", "--parallel", *arguments)
    assert done.code == 0, done.err
    found = {row.note.partition(":")[0]: row.status for row in project.rows()}
    told = {one["note"].partition(":")[0]: one for one in json.loads(done.out.splitlines()[-1])["candidates"]}
    assert {name: one["status"] for name, one in told.items()} == {name: found[name] for name in variants}
    assert told["broken"]["exit_code"] == 1
    assert sorted((found["better"], found["same"])) == ["DUPLICATE", "PASS"]
    assert found["broken"] == "FAIL_CORRECTNESS"
    assert project.kernel.read_text() in (variants["better"], variants["same"])
    assert f"[{tmp_path}/broken.py] judge: compile" in done.err
    assert f"candidate: {tmp_path}/broken.py: broken: why\n" in done.out
    assert audit(project.folder) == []
    assert project.git("status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--parallel"], '--parallel FILE "hypothesis"'),
        (["--parallel", "a.py"], '--parallel FILE "hypothesis"'),
        (["--parallel", "a.py", "why", "b.py"], "each file needs its hypothesis: 'b.py' has none"),
        (["--parallel", "nowhere.py", "why"], "nowhere.py: no such file"),
        (["--jobs", "0", "--parallel", "kernel.py", "why"], "--jobs N"),
        (["--jobs", "2", "why"], "--jobs N"),
        (["--parallel", "kernel.py", "why"], 'no baseline on v5e in model mode yet: ./ratchet.sh "baseline" first'),
    ],
)
def test_usage(project, arguments, told):
    project.refuses(*arguments, told=told)
