# SPDX-License-Identifier: Apache-2.0
"""Markdown that several tools write."""

from __future__ import annotations


def row(*cells: str) -> str:
    """A row of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
