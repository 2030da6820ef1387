"""Which judge this is, and that nothing stands in for a part of it.

    judge_sha256 = SHA-256 over the names and contents of prepare.py, ratchet.sh, setup.sh, requirements.lock, judge/

It is in every row, and the first kept row's is the lineage's seal. The judge does not run from the working tree: what
was hashed is copied to `.ratchet/judge/<hash>/`, the copy is hashed again, and prepare.py goes on there in an isolated
interpreter that neither reads nor writes compiled files. Checked too: symbolic links, files that Python would import
instead of an installed module, git hooks and attributes, `sitecustomize`. Not covered: the Python of .venv itself, the
git that PATH names.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

COMMANDS = ("prepare.py", "ratchet.sh", "setup.sh", "requirements.lock")
SUFFIXES = (".py", ".toml")
COPIES = (".ratchet", "judge")
_OWN_MODULES = frozenset(("kernel", "prepare"))
_OWN_FOLDERS = frozenset(("judge", "agents", "tests", "kernels", "benchmarks", "suite", "report"))


class Tampered(Exception):
    """Something stands where the judge or a part of it should be: exit code 2, with its name."""


def judge_files(folder: Path) -> list[Path]:
    """Everything that judges, in a fixed order."""
    files = [folder / name for name in COMMANDS if (folder / name).exists()]
    files += [path for path in (folder / "judge").rglob("*") if path.suffix in SUFFIXES]
    return sorted(files)


def judge_sha256(folder: Path) -> str:
    """Hash of everything that judges: judge/ with its data, the commands, the locked versions."""
    digest = hashlib.sha256()
    for path in judge_files(folder):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def root_of(script: Path) -> Path:
    """The project's folder, from prepare.py there or in one of its copies."""
    folder = script.resolve().parent
    is_copy = folder.parent.name == COPIES[1] and folder.parent.parent.name == COPIES[0]
    return folder.parents[2] if is_copy else folder


def findings(root: Path) -> Iterator[str]:
    """What stands in for something else, by name. Only looks."""
    own = [root / name for name in (*COMMANDS, "judge", "kernel.py", "results.tsv", COPIES[0])]
    for path in (*own, *sorted((root / "judge").rglob("*"))):
        for part in (path, *path.parents):
            if part == root or root not in part.parents:
                break
            if part.is_symlink():
                yield f"{part.relative_to(root)} is a symbolic link: put the file itself there"
                break
    for path in sorted((root / "judge").rglob("*")):
        if path.is_file() and path.suffix not in SUFFIXES and "__pycache__" not in path.parts:
            yield f"{path.relative_to(root)} has no place in judge/: remove it"
    yield from _shadows(root)
    for name in ("sitecustomize.py", "usercustomize.py"):
        for path in Path(sys.prefix).glob(f"lib/python3*/site-packages/{name}"):
            yield f"{path} runs at the start of every Python: remove it"


def _shadows(root: Path) -> Iterator[str]:
    """Files beside the commands that Python could import instead of an installed module."""
    installed = {path.name.removesuffix(".py") for entry in sys.path if "-packages" in entry for path in _in(entry)}
    for path in sorted(root.iterdir()):
        name = path.name.removesuffix(".py")
        is_module = path.suffix == ".py" and name not in _OWN_MODULES
        is_package = path.is_dir() and path.name not in _OWN_FOLDERS and (path / "__init__.py").exists()
        if (is_module or is_package) and (name in sys.stdlib_module_names or name in installed or "customize" in name):
            yield f"{path.name} would stand in for the module {name}: rename or remove it"


def _in(folder: str) -> list[Path]:
    return list(Path(folder).glob("*")) if Path(folder).is_dir() else []


def git_findings(root: Path) -> Iterator[str]:
    """Hooks, attributes and settings that would change what git gives or runs."""
    git = root / ".git"
    if not git.is_dir():
        return
    for path in sorted((git / "hooks").glob("*")) if (git / "hooks").is_dir() else ():
        if path.suffix != ".sample" and path.is_file() and os.access(path, os.X_OK):
            yield f".git/hooks/{path.name} is a git hook: move it away while experiments run"
    attributes = git / "info" / "attributes"
    if attributes.exists() and attributes.read_bytes().strip():
        yield ".git/info/attributes changes what git gives: remove it"


def check(root: Path) -> None:
    """Raises Tampered with every name."""
    found = [*findings(root), *git_findings(root)]
    if found:
        raise Tampered("; ".join(found))


def run_from_copy(root: Path, script: Path, arguments: list[str]) -> None:
    """Goes on in a checked copy of the judge, in this process's place; returns where this is the copy already.

    Raises Tampered where the copy is not what its name says.
    """
    sha256 = judge_sha256(root)
    if script.resolve().parent != root:
        own = script.resolve().parent
        if own.name != judge_sha256(own):
            raise Tampered(f"{own} is not the judge that its name says: remove it")
        return
    python = sys.executable
    os.execv(python, [python, "-I", "-B", str(_copy(root, sha256) / "prepare.py"), *arguments])


def _copy(root: Path, sha256: str) -> Path:
    """`.ratchet/judge/<hash>`, made where it is missing or not what its name says."""
    copies = root.joinpath(*COPIES)
    copy = copies / sha256
    if copy.is_dir() and not any(copy.rglob("__pycache__")) and judge_sha256(copy) == sha256:
        return copy
    copies.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=copies) as folder:
        new = Path(folder) / sha256
        for path in judge_files(root):
            target = new / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        if judge_sha256(new) != sha256:
            raise Tampered("the judge changes while it is copied: run this again when nobody edits it")
        shutil.rmtree(copy, ignore_errors=True)
        os.replace(new, copy)
    return copy
