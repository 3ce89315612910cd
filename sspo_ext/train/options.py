# SPDX-License-Identifier: Apache-2.0
"""How the two configs document and read their options."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments

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


def check_sampling_order(args: TrainingArguments, allowed: tuple[str, ...], reason: str) -> None:
    """Raises ValueError for an order of the training rows that the trainer does not have.

    Args:
        args: The options.
        allowed: Values of `train_sampling_strategy` (transformers 5) that work.
        reason: Why no other does.
    """
    if getattr(args, "group_by_length", False):  # of transformers 4
        raise ValueError(f"group_by_length: expected False, since {reason}")
    given = str(getattr(args, "train_sampling_strategy", allowed[0]))
    if given not in allowed:
        expected = " or ".join(map(repr, allowed))
        raise ValueError(f"train_sampling_strategy: expected {expected}, since {reason}, got {given!r}")


def check_reporting(args: TrainingArguments) -> None:
    """Raises ImportError for a `report_to` whose package is not installed. Trainer would only find it later."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    missing = set(INTEGRATION_TO_CALLBACK) - set(get_available_reporting_integrations())
    for name in args.report_to or ():
        if name in missing:
            raise ImportError(
                f"report_to: the package of {name!r} is not installed; install it, as by pip install {name}, or give "
                "'none'"
            )


def check_optimizer(trainer: Trainer, args: TrainingArguments) -> None:
    """Raises ImportError or ValueError for an `optim` that cannot be made. Trainer would only find it in `train`."""
    if trainer.optimizer is not None:
        return
    try:
        trainer.get_optimizer_cls_and_kwargs(args, cast("PreTrainedModel", trainer.model))
    except (ImportError, ValueError) as error:
        raise type(error)(f"optim: {getattr(args.optim, 'value', args.optim)!r} cannot be used: {error}") from error
