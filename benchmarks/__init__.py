# SPDX-License-Identifier: Apache-2.0
"""Measurements of sspo_ext next to its peers. `python -m benchmarks` lists the commands."""

from __future__ import annotations
