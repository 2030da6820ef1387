"""The shell scripts: they parse, explain themselves, and start no installer where everything is in place."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("ratchet.sh", "setup.sh", "test.sh")


def bash(*command: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *command], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_parses(script):
    done = bash("-n", script)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", ["ratchet.sh", "test.sh"])
def test_help_from_any_folder(script, tmp_path):
    done = bash(str(ROOT / script), "--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sage: ./" + script in done.stdout
    assert "xit code" in done.stdout


def test_warm_start_says_and_changes_nothing(project):
    before = project.state()
    done = bash("-c", "source ./setup.sh && ensure_environment && echo ready", folder=project.folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")
    assert project.state() == before
    assert not (project.folder / ".venv" / "tmp").exists()


def test_other_lock_file_is_not_taken_for_installed(project):
    with (project.folder / "requirements.lock").open("a") as file:
        file.write("# newer\n")
    script = "source ./setup.sh; _setup_is_current && echo current || echo stale"
    assert bash("-c", script, folder=project.folder).stdout == "stale\n"


def test_readable_in_one_sitting():
    """The experiment's script stays short: what decides is not in shell."""
    assert len((ROOT / "ratchet.sh").read_text().splitlines()) <= 80
