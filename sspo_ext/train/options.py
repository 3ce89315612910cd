# SPDX-License-Identifier: Apache-2.0
"""How the two configs document and read their options."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from types import MappingProxyType
from typing import TypeVar, cast

_Config = TypeVar("_Config")


def documented(config: type[_Config]) -> type[_Config]:
    """Makes the `Attributes:` of a dataclass's docstring the help texts that `HfArgumentParser` shows."""
    section = inspect.cleandoc(config.__doc__ or "").partition("\nAttributes:\n")[2]
    section = re.split(r"^\S", section, maxsplit=1, flags=re.MULTILINE)[0]
    texts = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", section, re.MULTILINE))
    for field in fields(config):  # pyright: ignore[reportArgumentType]  # a decorator cannot ask for a dataclass
        if field.name in texts:
            field.metadata = MappingProxyType({**field.metadata, "help": " ".join(texts[field.name].split())})
    return config


def check_dictionary(name: str, value: object) -> None:
    """Raises TypeError unless the option is a dictionary or None. TrainingArguments has already parsed JSON."""
    if not isinstance(value, dict | None):
        raise TypeError(f"{name}: expected a dictionary, or its JSON, got {value!r}")


def dictionary(value: dict | str | None) -> dict:
    """A checked option as a dictionary; None is an empty one."""
    return cast(dict, value or {})
