"""How the two configs declare and read their options."""

from __future__ import annotations

from dataclasses import field
from typing import Any, cast


def option(default: Any, text: str) -> Any:
    """A dataclass field with a help text, which `HfArgumentParser` shows. A default that is a list is copied."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def check_dictionary(name: str, value: object) -> None:
    """Raises TypeError unless the option is a dictionary or None. TrainingArguments has already parsed JSON."""
    if not isinstance(value, dict | None):
        raise TypeError(f"{name}: expected a dictionary, or its JSON, got {value!r}")


def dictionary(value: dict | str | None) -> dict:
    """A checked option as a dictionary; None is an empty one."""
    return cast(dict, value or {})
