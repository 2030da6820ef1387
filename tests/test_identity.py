"""judge/identity.py: the judge runs from a checked copy, and nothing stands in for a part of it."""

import hashlib
import importlib.util
import marshal
import os
import struct
from pathlib import Path

import pytest

from judge import identity


def refused(project, *passages):
    before = project.state()
    done = project.ratchet("try")
    assert done.code == 2, done.out + done.err
    last = done.err.strip().splitlines()[-1]
    assert all(passage in last for passage in passages), last
    assert "Traceback" not in done.err
    assert project.state() == before


def test_changed_judge(project):
    with (project.folder / "judge" / "decide.py").open("a") as file:
        file.write("# nothing\n")
    refused(project, "judge/decide.py")


def test_changed_data_file(project):
    path = next((project.folder / "judge" / "data").rglob("*.toml"))
    path.write_text(path.read_text() + "\n")
    refused(project, str(path.relative_to(project.folder)))


@pytest.mark.parametrize("name", ["judge/llo/extra.so", "judge/notes.txt"])
def test_a_file_that_has_no_place(project, name):
    (project.folder / name).write_text("x")
    refused(project, name, "no place in judge/")


def test_hook(project):
    hook = project.folder / ".git" / "hooks" / "post-commit"
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o755)
    refused(project, ".git/hooks/post-commit is a git hook")


def test_attributes(project):
    info = project.folder / ".git" / "info"
    info.mkdir(exist_ok=True)
    (info / "attributes").write_text("*.py filter=lies\n")
    refused(project, ".git/info/attributes changes what git gives")


@pytest.mark.parametrize("name", ["jax.py", "numpy.py", "json.py", "sitecustomize.py"])
def test_shadowing_module(project, name):
    (project.folder / name).write_text("raise SystemExit(0)\n")
    refused(project, f"{name} would stand in for the module {name[:-3]}")


def test_shadowing_package(project):
    (project.folder / "jax").mkdir()
    (project.folder / "jax" / "__init__.py").write_text("raise SystemExit(0)\n")
    refused(project, "jax would stand in for the module jax")


@pytest.mark.parametrize("name", ["kernel.py", "judge/roofline.py", "judge/data"])
def test_symbolic_link(project, name):
    path = project.folder / name
    elsewhere = project.folder.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    refused(project, f"{name} is a symbolic link")


def test_a_compiled_file_stands_in_for_nothing(project):
    """Python takes one that has the size and time of its source for what that says."""
    path = project.folder / "judge" / "identity.py"
    lies = compile("raise SystemExit(0)", str(path), "exec")
    compiled = Path(importlib.util.cache_from_source(str(path)))
    compiled.parent.mkdir(exist_ok=True)
    of_source = struct.pack("<III", 0, int(path.stat().st_mtime), path.stat().st_size)
    compiled.write_bytes(importlib.util.MAGIC_NUMBER + of_source + marshal.dumps(lies))
    assert project.prepare("--audit").out == "audit: ledger and git agree\n"


def test_pythons_own_variables_change_nothing(project):
    (project.folder / "elsewhere").mkdir()
    (project.folder / "elsewhere" / "argparse.py").write_text("raise SystemExit(0)\n")
    done = project.ratchet("--chip", "v9", "try", PYTHONPATH=str(project.folder / "elsewhere"))
    assert done.code == 2, done.out


def test_files_of_the_users_own_are_nobodys_business(project):
    (project.folder / "notes.py").write_text("raise SystemExit(0)\n")
    (project.folder / "my_kernels").mkdir()
    (project.folder / "my_kernels" / "__init__.py").write_text("")
    assert list(identity.findings(project.folder)) == []


def test_the_copy_is_what_its_name_says(project):
    done = project.prepare("--audit")
    assert done.code == 0, done.err
    sha256 = identity.judge_sha256(project.folder)
    copy = project.folder.joinpath(*identity.COPIES, sha256)
    assert identity.judge_sha256(copy) == sha256
    assert [p.relative_to(copy) for p in identity.judge_files(copy)] == [
        p.relative_to(project.folder) for p in identity.judge_files(project.folder)
    ]
    # Changed, it is made anew.
    (copy / "judge" / "decide.py").write_text("raise SystemExit(0)\n")
    assert project.prepare("--audit").code == 0
    assert identity.judge_sha256(copy) == sha256


def test_the_root_of_a_copy_is_the_project(tmp_path):
    copy = tmp_path / ".ratchet" / "judge" / ("0" * 64)
    assert identity.root_of(copy / "prepare.py") == tmp_path
    assert identity.root_of(tmp_path / "prepare.py") == tmp_path


def test_the_hash_covers_names_and_contents(project):
    before = identity.judge_sha256(project.folder)
    path = project.folder / "judge" / "decide.py"
    os.rename(path, path.with_name("decided.py"))
    assert identity.judge_sha256(project.folder) != before
    os.rename(path.with_name("decided.py"), path)
    assert identity.judge_sha256(project.folder) == before
    assert len(before) == len(hashlib.sha256().hexdigest())
