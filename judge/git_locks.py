"""The lock files that a git of ours leaves when it is killed with the machine, told from those of the user's own git.

Only after a crash of ours, in a turn of the repository (so that no git of ours writes), and only where no git of
anybody's works in the repository: a lock that stays for a while then belongs to nobody.
"""

import time
from contextlib import suppress
from pathlib import Path

from judge.journal import Entry
from judge.lock import Refused, say
from judge.repository import REFS, Repository

PATIENCE_SECONDS = 1.0
WAIT_SECONDS = 10.0


def clear_abandoned(repository: Repository, entry: Entry) -> None:
    """Removes git's lock files that nobody holds any more. Raises Refused where a running git may hold one."""
    end, quiet_since = time.monotonic() + WAIT_SECONDS, time.monotonic()
    before: list[tuple[Path, int]] = []
    while locks := _locks(repository, entry):
        if locks != before or git_at_work(repository):
            before, quiet_since = locks, time.monotonic()
        if time.monotonic() - quiet_since >= PATIENCE_SECONDS:
            for path, _ in locks:
                path.unlink(missing_ok=True)
            say(f"removed {', '.join(path.name for path, _ in locks)}, left by a git that was killed")
            return
        if time.monotonic() > end:
            raise Refused(f"{locks[0][0]} exists: another git is running, or one was killed; remove it then")
        time.sleep(0.05)


def _locks(repository: Repository, entry: Entry) -> list[tuple[Path, int]]:
    common, own = repository.common_folder, repository.git_folder
    paths = [own / "index.lock", own / "HEAD.lock", common / f"{entry.branch}.lock", common / "packed-refs.lock"]
    if entry.ref:
        paths.append(common / f"{entry.ref}.lock")
    if entry.what != "experiment":
        paths += (common / REFS).rglob("*.lock")
    found = []
    for path in paths:
        try:
            found.append((path, path.stat().st_mtime_ns))
        except OSError:
            continue
    return found


def git_at_work(repository: Repository) -> bool:
    """Whether a git process has its folder in a worktree of this repository. One that cannot be looked at may have."""
    places = [repository.folder.resolve(), repository.common_folder.resolve()]
    for link in (repository.common_folder / "worktrees").glob("*/gitdir"):
        with suppress(OSError):  # just removed
            places.append(Path(link.read_text().strip()).parent.resolve())
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if not (process / "comm").read_text().startswith("git"):
                continue
            folder = (process / "cwd").readlink()
        except PermissionError:
            return True
        except OSError:  # it has ended
            continue
        if any(folder.is_relative_to(place) for place in places):
            return True
    return False
