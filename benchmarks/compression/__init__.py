"""Does SSPO make reasoning short and keep it right, and what in it does that? `python -m benchmarks compression`."""

from __future__ import annotations
