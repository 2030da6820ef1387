"""Everything that decides. Nothing here imports kernel.py except worker.py, in a process of its own."""
