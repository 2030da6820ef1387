"""Drivers of the ratchet, one per file; each only runs ./ratchet.sh and reads what it prints and the ledger.

tunables.py and loop.py are what drivers share: kernel.py's constants, the working tree, one run of ratchet.sh.
"""


class CannotSearchError(Exception):
    """The search cannot go on; its text says why and what to do (exit code 2)."""


class InterruptedSearchError(Exception):
    """SIGINT, SIGTERM or SIGHUP arrived (exit code 130)."""
