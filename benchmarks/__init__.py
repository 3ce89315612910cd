"""Measurements of sspo_ext beside its peers. `python -m benchmarks report` makes every table."""

from __future__ import annotations
