# SPDX-License-Identifier: Apache-2.0
"""JSONL files that appear only when complete, and whose writing can be resumed after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO


def write_lines(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Write a JSONL file, all of it or nothing."""
    temporary = Path(f"{os.fspath(path)}.tmp")
    with open(temporary, "wb") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_free(path: str | os.PathLike, *, resume: bool) -> Path | None:
    """Find what an earlier run left for a `LineStore`.

    Args:
        path: of the store.
        resume: whether an earlier run may be resumed.

    Returns:
        `path` if it exists, PATH.part if that holds at least one row, else None.

    Raises:
        ValueError: something was found and `resume` is false.
    """
    part = Path(f"{os.fspath(path)}.part")
    present = Path(path) if Path(path).exists() else None
    if present is None and part.exists() and len(_whole_lines(part)) > 1:
        present = part
    if present and not resume:
        raise ValueError(f"{str(present)!r} is there from another run; resume it, or choose another folder")
    return present


def _whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


class LineStore:
    """Rows under keys, kept on the disk while they are made.

    Until `finish`, the rows are in PATH.part, after a first line with the settings that made them. Afterwards they are
    in PATH, and the settings in PATH.settings. No file exists before the first row, so a failed start leaves nothing
    behind.

    Args:
        path: PATH.
        settings: what the rows depend on, in JSON types.
        resume: load the rows of an earlier run with the same settings. A last line that was not written whole is
            dropped.

    Raises:
        ValueError: an earlier run had other settings, or is there without `resume`.
    """

    def __init__(self, path: str | os.PathLike, settings: dict, *, resume: bool):
        self.path, self.part = Path(path), Path(f"{os.fspath(path)}.part")
        self.rows: dict[str, dict] = {}
        self._header = json.loads(json.dumps({"settings": settings}))
        self._settings = Path(f"{os.fspath(path)}.settings")
        self._file: BinaryIO | None = None
        present = check_free(path, resume=resume)
        self.complete = present == self.path
        if self.complete:
            self._check(json.loads(self._settings.read_bytes()) if self._settings.exists() else {})
            # as bytes: str.splitlines also splits at U+2028, U+2029 and U+0085, which JSON does not escape
            self.rows = {row["key"]: row for row in map(json.loads, self.path.read_bytes().splitlines())}
        elif present:
            header, *rows = _whole_lines(self.part)
            self._check(json.loads(header))
            self.rows = {row["key"]: row for row in map(json.loads, rows)}
            os.truncate(self.part, sum(map(len, (header, *rows))))

    def _check(self, header: dict) -> None:
        if header != self._header:
            changed = [k for k, v in self._header["settings"].items() if header.get("settings", {}).get(k) != v]
            raise ValueError(f"{str(self.path)!r} was begun with other settings ({', '.join(changed) or 'fewer'})")

    def _write(self, *rows: dict) -> None:
        if self._file is None:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.part, "ab" if self.rows else "wb")
            rows = rows if self.rows else (self._header, *rows)
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, rows: Iterable[dict]) -> None:
        """Add rows, each with its "key". They are on the disk when this returns."""
        rows = list(rows)
        self._write(*rows)
        self.rows |= {row["key"]: row for row in rows}

    def finish(self, order: Iterable[str]) -> list[dict]:
        """Write all rows to PATH in this order, and return them."""
        rows = [self.rows[key] for key in order]
        if not self.complete:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_lines(self._settings, [self._header])
            write_lines(self.path, rows)
            if self._file is not None:
                self._file.close()
            self.part.unlink(missing_ok=True)
            self.complete = True
        return rows
