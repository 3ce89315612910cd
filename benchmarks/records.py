# SPDX-License-Identifier: Apache-2.0
"""Raw results on disk: one compact file a table, from which the reports are made.

The suffix tells the format. `.jsonl` has one record a line, for small tables that people read and compare. `.parquet`
(zstd) is for the compression runs: each holds the numbers of 800 solutions, which only programs read. As JSON files
they took 2.7 MB, as one parquet file they take 0.2. pyarrow comes with `datasets`, which the extra `train` has.

A file is replaced as a whole or not at all. Commands that add to the same folder wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def read(path: Path) -> list[dict]:
    """The records, in the file's order. Empty if there is no file."""
    if not path.exists():
        return []
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.ParquetFile(path).read().to_pylist()
    # Split as bytes: str.splitlines would also split at U+2028, which JSON may hold.
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write(path: Path, rows: list[dict]) -> None:
    """Replaces the file. If this fails, the old file is still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            if path.suffix == ".parquet":
                import pyarrow
                from pyarrow import parquet

                # From a struct array: `Table.from_pylist` drops the columns that the first row lacks.
                table = pyarrow.Table.from_struct_array(pyarrow.array(rows))
                parquet.write_table(table, file, compression="zstd", compression_level=19)
            else:
                lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
                file.writelines(line.encode() for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def add(path: Path, rows: Iterable[dict], key: tuple[str, ...]) -> None:
    """Adds records and sorts all by `key`. A new record replaces an old one with the same key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        write(path, _merged(read(path), rows, key))


def collect(path: Path, folder: Path, key: tuple[str, ...]) -> None:
    """Moves finished runs, each a JSON file in `folder`, into the table at `path`.

    A file is removed after the table with its run is on the disk. A file that is not whole JSON stays, and is named.
    """
    with _alone(path.parent):
        found: dict[Path, dict] = {}
        for file in sorted(folder.glob("*.json")):
            try:
                found[file] = json.loads(file.read_bytes())
            except ValueError:
                print(f"{file} is not whole and was left out")
        if found:
            write(path, _merged(read(path), found.values(), key))
        for file in found:
            file.unlink()


def with_notes(report: str, folder: Path) -> str:
    """The report with the text of `folder`/notes.md, which is written by hand and stays in a rerun."""
    notes = folder / "notes.md"
    return f"{report}\n{notes.read_text(encoding='utf-8')}" if notes.exists() else report


def _merged(old: Iterable[dict], new: Iterable[dict], key: tuple[str, ...]) -> list[dict]:
    by_key = {tuple(row[name] for name in key): row for row in (*old, *new)}
    return [by_key[which] for which in sorted(by_key)]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder. Without it, two commands that rewrite one file could lose each other's records."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
