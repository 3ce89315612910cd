# SPDX-License-Identifier: Apache-2.0
"""The code blocks of a page of the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r"^```(\w+)?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    title: str | None
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    source = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(source):
        title = re.search(r'title="([^"]+)"', match[2])
        line = source.count("\n", 0, match.start(3)) + 1
        found.append(Block(match[1] or "", title and title[1], match[3], line))
    return found
