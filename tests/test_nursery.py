"""judge/nursery.py through judge/sandbox.py: where a stage's process comes from, what it has, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from judge import nursery, sandbox

ROOT = Path(__file__).resolve().parent.parent


def start(folder: Path, code: str, *arguments: str, **options: object) -> sandbox.Process:
    folder.mkdir(exist_ok=True)
    script = folder / "stage.py"
    script.write_text(code)
    return sandbox.Process(script, list(arguments), folder=folder, **options)  # type: ignore[arg-type]


def gone(pid: int) -> bool:
    """Whether the process ends within a few seconds; one that nobody has waited for yet has ended too."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def pid_in(path: Path) -> int:
    for _ in range(400):
        if path.exists() and path.read_text().strip():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"nothing in {path}")


@pytest.mark.parametrize("own_interpreter", [False, True])
def test_a_stage_has_its_folder_its_arguments_and_a_clean_environment(tmp_path, monkeypatch, own_interpreter):
    monkeypatch.setenv("MY_TOKEN", "secret")
    code = """
import json, os, sys, tempfile, threading
print(json.dumps({"arguments": sys.argv[1:], "folder": os.getcwd(), "temporary": tempfile.gettempdir(),
    "main": __name__, "token": "MY_TOKEN" in os.environ, "given": os.environ["GIVEN"], "isolated": sys.flags.isolated,
    "threads": threading.active_count(), "leader": os.getsid(0) == os.getpid()}))
"""
    process = start(tmp_path, code, "a b", environment={"GIVEN": "x"}, own_interpreter=own_interpreter)
    finished = process.wait(30)
    assert finished.returncode == 0 and not finished.timed_out
    assert json.loads(finished.log_tail) == {
        "arguments": ["a b"],
        "folder": str(tmp_path),
        "temporary": str(tmp_path),
        "main": "__main__",
        "token": False,
        "given": "x",
        "isolated": 1,
        "threads": 1,
        "leader": True,
    }


def test_jax_is_there_and_nothing_of_it_has_started(tmp_path):
    code = """
import sys
print("jax" in sys.modules, "jax.experimental.pallas.tpu" in sys.modules)
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized(), "libtpu" in open("/proc/self/maps").read())
"""
    assert start(tmp_path, code).wait(30).log_tail.split() == ["True", "True", "False", "False"]


def test_stages_share_no_memory_that_can_be_written(tmp_path):
    code = "print([line for line in open('/proc/self/maps') if line.split()[1][1::2] == 'ws'])"
    assert start(tmp_path, code).wait(30).log_tail == "[]\n"


@pytest.mark.parametrize(
    ("code", "returncode", "told"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("import sys; sys.exit('words')", 1, "words"),
        ("print('first'); 1 / 0", 1, "ZeroDivisionError"),
        ("import os; os.kill(os.getpid(), 11)", -11, ""),
        ("import os; print('gone', flush=True); os._exit(4)", 4, "gone"),
    ],
)
def test_exit_codes_and_last_words(tmp_path, code, returncode, told):
    finished = start(tmp_path, code).wait(30)
    assert finished.returncode == returncode
    assert told in finished.log_tail


def test_a_late_stage_is_killed_with_what_it_started(tmp_path):
    code = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    )
    process = start(tmp_path, code)
    finished = process.wait(2.5)
    assert finished.timed_out and finished.returncode == -signal.SIGKILL
    assert gone(int(finished.log_tail))


def test_what_an_ended_stage_leaves_behind_is_killed(tmp_path):
    finished = start(tmp_path, "import subprocess; print(subprocess.Popen(['sleep', '60']).pid)").wait(30)
    assert finished.returncode == 0
    assert gone(int(finished.log_tail))


def test_a_stage_has_the_pipe_under_its_number_and_no_other_descriptor(tmp_path):
    others = [start(tmp_path / name, "import time; time.sleep(60)") for name in ("one", "two")]
    pipe = os.pipe()
    os.set_inheritable(pipe[1], True)
    code = """
import os, sys
listed = [int(name) for name in os.listdir("/proc/self/fd")]
still = [number for number in listed if os.path.exists(f"/proc/self/fd/{number}")]
os.write(int(sys.argv[1]), repr(sorted(still)).encode())
"""
    finished = start(tmp_path, code, str(pipe[1]), pipe=pipe).wait(30)
    assert finished.handed_over.decode() == repr([0, 1, 2, pipe[1]])
    for other in others:
        assert other.running
        other.kill()
        assert not other.running


def test_a_stage_ends_with_the_judge(tmp_path):
    judge = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from judge import sandbox
folder = Path({str(tmp_path)!r})
(folder / "stage.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
sandbox.Process(folder / "stage.py", [], folder=folder).wait(60)
"""
    with subprocess.Popen([sys.executable, "-c", judge]) as process:
        pid = pid_in(tmp_path / "stage.log")
        process.kill()
    assert gone(pid)


def test_a_killed_nursery_takes_its_stages_along_and_the_next_stage_has_a_new_one(tmp_path):
    process = start(tmp_path, "import os, time; print(os.getppid(), flush=True); time.sleep(60)")
    home = pid_in(tmp_path / "stage.log")
    os.kill(home, signal.SIGKILL)
    finished = process.wait(30)
    assert finished.returncode == -signal.SIGKILL and not finished.timed_out
    assert start(tmp_path, "print('again')").wait(30).log_tail == "again\n"


def test_two_stages_have_one_nursery_and_see_nothing_of_each_other(tmp_path):
    code = "import os, sys; print(os.getppid(), hasattr(sys, 'mark')); sys.mark = 1"
    first, second = (start(tmp_path, code).wait(30).log_tail for _ in range(2))
    assert first == second and "False" in first


def test_a_fork_of_the_judge_has_a_nursery_of_its_own(tmp_path):
    mine = nursery.of_this_thread({})
    pid = os.fork()
    if pid == 0:
        os._exit(nursery.of_this_thread({"PATH": os.environ["PATH"]}) is mine)
    assert os.waitpid(pid, 0)[1] == 0
