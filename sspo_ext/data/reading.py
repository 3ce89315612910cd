# SPDX-License-Identifier: Apache-2.0
"""Rows of files: JSON lines or one JSON array, each with its file and line. No tokenizer, no torch."""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Source = str | os.PathLike | Iterable[str | os.PathLike] | Iterable[Mapping]

Parsed = TypeVar("Parsed")

_LISTED = 20  # an error names this many bad rows one by one and counts the rest

_SPACE = re.compile(r"[ \t\r\n]*")


def parse_rows(source: Source, parse: Callable[[str, Mapping], Parsed]) -> tuple[list[Parsed], list[tuple[str, str]]]:
    """Apply `parse` to each row of JSONL files or of memory.

    Args:
        source: as for `load_preference_rows`.
        parse: called with the row's "file:line" and the row; it refuses a row by a ValueError or a TypeError.

    Returns:
        What `parse` returned for each accepted row; (file:line, reason) for each refused row and each broken line.
    """
    parsed, bad = [], []
    for where, row, reason in read_rows(source):
        try:
            if reason is not None:
                raise ValueError(reason)
            parsed.append(parse(where, row))
        except (TypeError, ValueError) as error:
            bad.append((where, str(error)))
    return parsed, bad


def raise_bad_rows(bad: Sequence[tuple[str, str]], total: int) -> None:
    """Raise one ValueError that names each (source, reason) of `bad`; do nothing if `bad` is empty."""
    if bad:
        lines = [f"  {where}: {reason}" for where, reason in bad[:_LISTED]]
        if len(bad) > _LISTED:
            lines.append(f"  ... and {len(bad) - _LISTED} more")
        raise ValueError(f"{len(bad)} of {total} rows cannot be used:\n" + "\n".join(lines))


def name_some(names: Sequence[str], limit: int = 5) -> str:
    """The first names, separated by commas, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def read_rows(source: Source) -> Iterator[tuple[str, Mapping, str | None]]:
    """(where, row, what is wrong with the line or None) of each line that is not blank."""
    items = [source] if isinstance(source, str | os.PathLike) else source
    if isinstance(items, Mapping) or not isinstance(items, Iterable):
        raise TypeError(f"source: expected a path, several paths, or a list of mappings, got {reprlib.repr(source)}")
    for number, item in enumerate(items):
        if isinstance(item, Mapping):
            yield f"row {number}", item, None
            continue
        if not isinstance(item, str | os.PathLike):
            raise TypeError(f"source: expected paths or mappings, got {type(item).__name__} at {number}")
        yield from _read_lines(item)


def _read_lines(path: str | os.PathLike) -> Iterator[tuple[str, Mapping, str | None]]:
    first = True
    with open(path, "rb") as file:  # in bytes: only "\n" ends a line, and bad UTF-8 makes one bad row
        for number, line in enumerate(file, 1):
            value, reason = None, None
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                value = json.loads(text)
            except RecursionError:
                reason = "not a line of JSON: nested too deep"
            except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and a number of 5000 digits
                if first and line.strip() == b"{":
                    raise ValueError(
                        f"{os.fspath(path)}: expected JSON lines, one object on each line, or one array, got an object "
                        "of several lines; jq -c '.' FILE writes lines"
                    ) from None
                reason = f"not a line of JSON: {error}"
            opens = value is None and reason is not None and line.lstrip(b"\xef\xbb\xbf \t\r").startswith(b"[")
            if first and (opens or isinstance(value, list) and all(isinstance(one, dict) for one in value)):
                yield from _read_array(path)
                return
            first = False
            yield _checked(f"{os.fspath(path)}:{number}", value, reason)


def _read_array(path: str | os.PathLike) -> Iterator[tuple[str, Mapping, str | None]]:
    """The objects of a file that is one JSON array, each with the line on which it begins."""
    name = os.fspath(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected an array in UTF-8: {error}") from None
    decode = json.JSONDecoder().raw_decode
    line, counted, at = 1, 0, _skip(text, text.index("[") + 1)
    more = not text.startswith("]", at)
    while more:
        line, counted = line + text.count("\n", counted, at), at
        where = f"{name}:{line}"
        try:
            value, at = decode(text, at)
        except RecursionError:
            raise ValueError(f"{where}: not an array of JSON objects: nested too deep") from None
        except ValueError as error:  # where the next object begins is not known
            raise ValueError(f"{where}: not an array of JSON objects: {error}") from None
        yield _checked(where, value, None)
        at = _skip(text, at)
        more = text.startswith(",", at)
        if more:
            at = _skip(text, at + 1)
        elif not text.startswith("]", at):
            raise ValueError(f"{where}: not an array of JSON objects: expected a comma or ] after this one")
    if text[at + 1 :].strip():
        raise ValueError(f"{name}: expected nothing after the array, or JSON lines from the start")


def _skip(text: str, at: int) -> int:
    """The place of the first character from `at` on that is not white space."""
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _checked(where: str, value: Any, reason: str | None) -> tuple[str, Mapping, str | None]:
    if reason is None and not isinstance(value, dict):
        reason = f"expected a JSON object, got {type(value).__name__}"
    return where, value if isinstance(value, dict) else {}, reason
