# SPDX-License-Identifier: Apache-2.0
"""`--config FILE`: the options of a command from a YAML file, read as if they stood on the command line."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def add_config(parser: argparse.ArgumentParser) -> None:
    """--config."""
    parser.add_argument(
        "--config", metavar="YAML",
        help="file with options by their names, such as lr: 1e-6. An option of the command line comes first; of one "
        "that is repeatable, both are taken",
    )  # fmt: skip


def with_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The arguments of a command, with those of its config file in front of them.

    Args:
        parser: Of the command.
        argv: Its arguments.

    Returns:
        The arguments to parse.

    Raises:
        ValueError: For a file that is no mapping of options, and for an option that the command does not have.
        OSError: For a file that cannot be read.
    """
    only = argparse.ArgumentParser(prog=parser.prog, usage=parser.usage, add_help=False)
    only.add_argument("--config")
    path = only.parse_known_args(argv)[0].config
    if path is None:
        return list(argv)
    actions = {action.option_strings[0]: action for action in parser._actions}
    given = []
    for key, value in _read(path).items():
        name = "--" + str(key).replace("_", "-")
        if name not in actions or name == "--config":
            near = difflib.get_close_matches(name, actions, 1)
            hint = f"; is {near[0][2:]} meant?" if near else ""
            raise ValueError(f"--config: {path}: {key!r} is no option of this command{hint}")
        try:
            given += _arguments(name, actions[name], value)
        except ValueError as error:
            raise ValueError(f"--config: {path}: {key}: {error}") from None
    return [*given, *argv]


def _read(path: str) -> Mapping:
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path}: no YAML: {' '.join(str(error).split())}") from None
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"--config: {path}: expected options by their names, got {type(found).__name__}")
    return found


def _arguments(name: str, action: argparse.Action, value: Any) -> Iterator[str]:
    """An option as it is written on the command line."""
    if value is None:  # as if it were left out
        if action.default is not None:
            raise ValueError("expected a value, got null; leave it out for the default")
        return
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {_text(value)}")
        if value or isinstance(action, argparse.BooleanOptionalAction):
            yield name if value else f"--no-{name[2:]}"
    elif isinstance(action, argparse._AppendAction):
        pairs = [f"{key}={_text(one)}" for key, one in value.items()] if isinstance(value, Mapping) else None
        for one in pairs if pairs is not None else value if isinstance(value, list) else [value]:
            yield f"{name}={_text(one)}"
    elif action.nargs is not None:
        yield name
        yield from map(_text, value if isinstance(value, list) else [value])
    elif isinstance(value, list | Mapping):
        raise ValueError(f"expected one value, got {_text(value)}")
    else:
        yield f"{name}={_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, float) and abs(value) < 1:  # "-1e-05" would be read as an option
        return f"{value:.20f}".rstrip("0") + ("0" if value == 0 else "")
    return value if isinstance(value, str) else json.dumps(value, default=str)
