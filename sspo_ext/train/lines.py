"""A JSONL file that is written a line at a time, survives being killed, and is complete or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path


def write_lines(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """A JSONL file, all of it or none."""
    temporary = Path(f"{os.fspath(path)}.tmp")
    with open(temporary, "wb") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class LineStore:
    """Rows under keys. Until `finish`, they are in `PATH.part`, behind a line with the settings they were made with;
    afterwards in `PATH`, and the settings in `PATH.settings`.

    Opened again with `resume` and the same settings, it has the rows that were written whole; a last line that was not
    is dropped. ValueError if the settings differ, or without `resume`.
    """

    def __init__(self, path: str | os.PathLike, settings: dict, *, resume: bool):
        self.path, self.part = Path(path), Path(f"{os.fspath(path)}.part")
        self.rows: dict[str, dict] = {}
        self.complete = False
        self._header = json.loads(json.dumps({"settings": settings}))
        present = next((p for p in (self.path, self.part) if p.exists()), None)
        if present and not resume:
            raise ValueError(f"{str(present)!r} is there from another run; resume it, or choose another folder")
        self._settings = Path(f"{os.fspath(path)}.settings")
        if present == self.path:
            self._check(json.loads(self._settings.read_bytes()) if self._settings.exists() else {})
            self.complete = True
            # as bytes: lines of a text also end with U+2028, U+2029 and U+0085, which JSON leaves as they are
            self.rows = {row["key"]: row for row in map(json.loads, self.path.read_bytes().splitlines())}
            return
        self.part.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.part, "a+b")
        self._read()

    def _read(self) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file.read().splitlines(keepends=True)):
            if not line.endswith(b"\n"):
                break
            row = json.loads(line)
            if number == 0:
                self._check(row)
            else:
                self.rows[row["key"]] = row
            end += len(line)
        self._file.truncate(end)
        if not end:
            self._write(self._header)

    def _check(self, header: dict) -> None:
        if header != self._header:
            changed = [k for k, v in self._header["settings"].items() if header.get("settings", {}).get(k) != v]
            raise ValueError(f"{str(self.path)!r} was begun with other settings ({', '.join(changed) or 'fewer'})")

    def _write(self, *rows: dict) -> None:
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, rows: Iterable[dict]) -> None:
        """Rows, each with its "key"; on the disk when this returns."""
        rows = list(rows)
        self._write(*rows)
        self.rows |= {row["key"]: row for row in rows}

    def finish(self, order: Iterable[str]) -> list[dict]:
        """All rows in this order, and `path` holding them."""
        rows = [self.rows[key] for key in order]
        if not self.complete:
            write_lines(self._settings, [self._header])
            write_lines(self.path, rows)
            self._file.close()
            self.part.unlink()
            self.complete = True
        return rows
