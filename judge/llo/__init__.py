"""Cycles of a compiled TPU program with no TPU: parse its final schedule, execute it on a machine described as data."""
