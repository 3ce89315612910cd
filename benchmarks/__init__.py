"""Measurements of sspo_ext beside its peers. `python -m benchmarks report` makes every table."""
