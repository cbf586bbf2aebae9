"""Measurements that stay in the project: each compares two ways of doing the same work, in one run, as ratios.

Here: one module for each ``splitsec bench`` command.  Nothing imports this package but ``cli/bench.py``.
"""
