"""Times on an attached chip: manager.py starts runner.py in a process of its own; statistics.py is pure functions."""
