"""Fixtures: the project's commands, run as a user would, in scratch repositories whose kernel.py is tiny."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import prepare
from judge import command, jax_shims, ledger

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "tests" / "kernels"
PROJECT = ("prepare.py", "ratchet.sh", "setup.sh", "requirements.lock", ".gitignore", ".gitattributes", "judge")


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def fields(self) -> dict[str, str]:
        """The `key: value` lines of stdout."""
        return dict(line.split(": ", 1) for line in self.out.splitlines() if ": " in line)

    @property
    def status(self) -> str:
        return self.fields.get("status", "")

    @property
    def reason(self) -> str:
        return self.fields.get("reason", "")


def clean_environment() -> dict[str, str]:
    """Ours, without what a person's git is told by it, and with no configuration of theirs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return kept | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


def run(*command: str | Path, folder: Path, timeout: float = 200, **environment: str) -> Done:
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=clean_environment() | environment,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode(errors="replace"))


class Project:
    """A git repository with the project's files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernel = folder / "kernel.py"
        self.ledger = folder / "results.tsv"

    def ratchet(self, *arguments: str, **environment: str) -> Done:
        return run("./ratchet.sh", *arguments, folder=self.folder, **environment)

    def refuses(self, *arguments: str, told: str) -> None:
        """./ratchet.sh cannot judge, says why without a traceback, and changes nothing."""
        before = self.state()
        done = self.ratchet(*arguments)
        assert done.code == 2
        assert told in done.err
        assert "Traceback" not in done.err
        assert self.state() == before

    def prepare(self, *arguments: str, **environment: str) -> Done:
        return run(".venv/bin/python", "prepare.py", *arguments, folder=self.folder, **environment)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command in the background, its stderr to be read."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=clean_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def git(self, *arguments: str) -> str:
        settings = ("user.name=Somebody", "user.email=somebody@example.org", f"core.hooksPath={os.devnull}")
        options = [part for setting in settings for part in ("-c", setting)]
        done = run("git", *options, *arguments, folder=self.folder)
        assert done.code == 0, done.err
        return done.out

    def edit(self, old: str, new: str) -> None:
        text = self.kernel.read_text()
        assert text.count(old) == 1, old
        self.kernel.write_text(text.replace(old, new))

    def rows(self) -> list[ledger.Row]:
        return ledger.read(self.ledger)

    def state(self) -> dict[str, Any]:
        """All that an experiment may not change when it is refused."""
        names = [line[3:] for line in self.git("status", "--porcelain", "-uall").splitlines()]
        return {
            "refs": self.git("for-each-ref"),
            "HEAD": (self.folder / ".git" / "HEAD").read_text(),
            "status": self.git("status", "--porcelain", "-uall"),
            "staged": self.git("diff", "--cached"),
            "index": self.git("ls-files", "-s"),
            "changed": {n: (self.folder / n).read_bytes() for n in names if (self.folder / n).is_file()},
            "kernel": self.kernel.read_bytes() if self.kernel.is_file() else None,
            "ledger": self.ledger.read_bytes() if self.ledger.is_file() else None,
        }

    def processes(self) -> list[str]:
        """Command lines of running processes that name this folder."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.folder) in line:
                found.append(line)
        return found


def make_project(folder: Path) -> Project:
    """The project's files with the tiny kernel, committed. Its .venv links to ours, so that ours stays."""
    folder.mkdir(parents=True)
    for name in PROJECT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    shutil.copyfile(KERNELS / "scaled_add.py", folder / "kernel.py")
    (folder / "README.md").write_text("A project.\n")
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        (folder / ".venv" / path.name).symlink_to(path)
    (folder / ".venv" / "installed.lock").unlink(missing_ok=True)
    shutil.copyfile(ROOT / "requirements.lock", folder / ".venv" / "installed.lock")
    project = Project(folder)
    project.git("init", "-q", "-b", "main")
    project.git("add", "-A")
    project.git("commit", "-q", "-m", "start")
    return project


def appended(text: str, *rows: ledger.Row) -> str:
    """A ledger's text with rows added."""
    for row in rows:
        known = ledger.parse(text)
        text = text or ledger.HEADER + "\n"
        text += ledger.next_line(row, known[-1].row_sha256 if known else ledger.GENESIS)
    return text


def add_to_kept(folder: Path, amount: float) -> None:
    """Adds to the float32 output that is kept in a lineage's folder of .ratchet/expected."""
    (path,) = folder.glob("*.npz")
    with np.load(path) as file:
        data = {name: file[name] for name in file.files}
    data["0"] = np.frombuffer((data["0"].view(np.float32) + np.float32(amount)).tobytes(), np.uint8)
    np.savez(path, **data)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def new_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Project]:
    """A function that makes a fresh project, in a folder of the given name."""

    def make(name: str = "project") -> Project:
        return make_project(tmp_path_factory.mktemp("repository") / name)

    return make


@pytest.fixture
def project(new_project: Callable[..., Project]) -> Project:
    return new_project()


@pytest.fixture(scope="session")
def judge_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Done]:
    """A function that judges text, or a file, as `prepare.py --kernel FILE --dry-run` of this very checkout does.

    In this process, so that all judgings have one nursery; what the command adds is tested through the command.
    """

    def judge(kernel: str | Path, *arguments: str) -> Done:
        if isinstance(kernel, str):
            path = tmp_path_factory.mktemp("candidate") / "candidate.py"
            path.write_text(kernel)
            kernel = path
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                options = prepare.parse_arguments(["--dry-run", "--kernel", str(kernel), *arguments])
                code = command.ended(lambda: command.run(options), options)
            except SystemExit as refused:
                code = int(refused.code or 0)
        return Done(code, out.getvalue(), err.getvalue())

    return judge


@pytest.fixture(scope="session")
def variant() -> Callable[..., str]:
    """A function that gives the tiny kernel's text with passages replaced: variant((old, new), …)."""

    def make(*replacements: tuple[str, str]) -> str:
        text = (KERNELS / "scaled_add.py").read_text()
        for old, new in replacements:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        return text

    return make


@pytest.fixture(scope="session")
def passed(judge_file: Callable[..., Done], variant: Callable[..., str]) -> Done:
    """The tiny kernel, judged with --json: it defines the seven symbols and no optional one."""
    done = judge_file(variant(), "--chip", "v5e", "--json")
    assert done.code == 0, done.out + done.err
    return done


@pytest.fixture(scope="module")
def on_v5e():
    """Traces here are for a v5e. Several test processes may load libtpu at once."""
    jax_shims.set_environment()
    jax_shims.patch_interpreter()
    with jax_shims.on_chip(jax_shims.topology_device("v5e:2x2")):
        yield
