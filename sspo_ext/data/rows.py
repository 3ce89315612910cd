# SPDX-License-Identifier: Apache-2.0
"""Preference rows from local JSON files: read, checked, and brought into one form. No tokenizer, no torch."""

from __future__ import annotations

import itertools
import logging
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .chat import COLUMNS, chat_options
from .reading import Source, name_some, parse_rows, raise_bad_rows

logger = logging.getLogger(__name__)


class SameText(ValueError):
    """A row whose responses are the same text."""


LARGEST = 3.4028234663852886e38  # of float32, in which losses are computed


def load_preference_rows(source: Source, *, step_separator: str = "\n", skip_equal: bool = False) -> list[dict]:
    r"""Read and check preference rows, ready for `tokenize_rows`.

    A row has one of these forms. Forms may be mixed.

    * `{"prompt", "chosen", "rejected"}`. A response is a text, which is split into steps later, or a list of steps,
      which is taken as it is. `prompt` is a text or a list of chat messages; with messages, a response may also be a
      list with one assistant message, or the whole conversation with the prompt in front; the prompt may then be the
      text of the user's last message (UltraFeedback). Without `prompt`, the prompt is what both responses begin with:
      the messages that two conversations share, or the words that two texts share.
    * The same with `"branch": k`: the first k steps are shared, and only step k is compared (Step-DPO).
    * `{"prompt", "initial_reason_steps", "chosen", "rejected"}`, the form of Step-DPO's data: texts that follow each
      other exactly. The last one is the step that is compared.
    * `{"prompt", "completions": [text, ...], "labels": [bool, ...]}`, the form of TRL's stepwise supervision. One such
      row holds no preference. Rows with the same prompt form a tree of steps. Where some rows continue the same steps
      with a good step and others with a bad step, these are compared (`branch`). Each good and each bad step is
      compared at least once, in max(good, bad) pairs. A warning counts the rows that are in no pair.

    Optional keys: `step_separator`, a text, in place of the argument; `weight` (at least 0, default 1); `margin`
    (default 0); and `partial` (true: the response stops before its end, so it gets no end of sequence; the default of
    the last two forms). With chat messages also `tools`, a list, and `chat_template_kwargs`, an object: what the chat
    template is given for this row. Other keys are ignored.

    Args:
        source: a path of a file of JSON lines or of one JSON array, several paths, or mappings in memory.
        step_separator: appended to each step of a list that does not end with white space, except the last step.
        skip_equal: leave out rows whose responses are the same text, with one warning that counts them. Otherwise they
            cannot be used.

    Returns:
        One dict for each pair: {"prompt": str | list of messages, "chosen": str | list[str], "rejected": str |
        list[str], "branch": int | None, "partial": bool, "weight": float, "margin": float, "source": "file:line"}, and
        `tools` and `chat_template_kwargs` where they are given.
        The steps of a list concatenate to the response.

    Raises:
        ValueError: some rows cannot be used. The message names file, line and reason of each.
        TypeError: `source` holds something other than paths and mappings.
        OSError: a file cannot be read.

    Examples:
        >>> from sspo_ext.data.rows import load_preference_rows
        >>> rows = load_preference_rows([{"prompt": "1 + 1 = ", "chosen": "2", "rejected": "3"}])
        >>> rows[0]["chosen"], rows[0]["weight"], rows[0]["source"]
        ('2', 1.0, 'row 0')
    """
    equal: list[str] = []

    def parse(where: str, row: Mapping) -> dict | _Stepwise | None:
        try:
            return (
                _stepwise(where, row) if "completions" in row else {**normal_row(row, step_separator), "source": where}
            )
        except SameText:
            if not skip_equal:
                raise
            equal.append(where)

    parsed, bad = parse_rows(source, parse)
    total = len(parsed) + len(bad)
    stepwise = [row for row in parsed if isinstance(row, _Stepwise)]
    pairs, conflicts = _pair_stepwise(stepwise, step_separator)
    raise_bad_rows([*bad, *conflicts], total)
    if not total:
        raise ValueError(f"source: expected at least one row, found none in {source!r}")
    if equal:
        logger.warning(
            "%d of %d rows are left out, since chosen and rejected are the same text (%s)",
            len(equal), total, name_some(equal),
        )  # fmt: skip
    if len(equal) == total:
        raise ValueError("source: nothing to train on is left, since chosen and rejected are the same in all rows")
    return [row for row in parsed if isinstance(row, dict)] + pairs


def check_text(name: str, value: Any) -> str:
    """`value`, if it is a text that is not blank; else a ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name}: expected a text, got an empty one")
    return value


def _number(row: Mapping, name: str, default: float) -> float:
    value = row.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a finite number, got {reprlib.repr(value)}")
    if not abs(value) <= LARGEST:  # an int of 400 digits has no float
        raise ValueError(f"{name}: expected a finite number of float32, got {reprlib.repr(value)}")
    return float(value)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _check_messages(name: str, value: list) -> list[dict]:
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{name}: expected messages with a role and a content, got {reprlib.repr(message)} at {i}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{name}: expected a text as content of message {i}")
    return [dict(message) for message in value]


def separate_steps(steps: Sequence[str], separator: str = "\n") -> list[str]:
    """The steps with the separator after each that does not end with white space, except the last."""
    return [*(step if step[-1].isspace() else step + separator for step in steps[:-1]), steps[-1]]


def check_branch(branch: int, chosen: Sequence[str] | None, rejected: Sequence[str] | None) -> None:
    """ValueError unless both responses have a step `branch` after the same steps. None: steps not known yet."""
    for name, steps in (("chosen", chosen), ("rejected", rejected)):
        if steps is not None and len(steps) <= branch:
            raise ValueError(f"branch: expected less than the {len(steps)} steps of {name}, got {reprlib.repr(branch)}")
    if chosen is not None and rejected is not None and chosen[:branch] != rejected[:branch]:
        raise ValueError(f"branch: the first {branch} steps of chosen and rejected are not the same")


def normal_row(row: Mapping, separator: str = "\n") -> dict:
    """A row of the first three forms in the form that `load_preference_rows` returns, without "source"."""
    separator = row.get("step_separator", separator)
    if not isinstance(separator, str):
        raise ValueError(f"step_separator: expected a text, got {reprlib.repr(separator)}")
    prompt, chosen, rejected = _prompt_and_responses(row)
    prompt = _check_messages("prompt", prompt) if isinstance(prompt, list) and prompt else check_text("prompt", prompt)
    branch, partial = row.get("branch"), row.get("partial")
    if partial is not None and not isinstance(partial, bool):
        raise ValueError(f"partial: expected true or false, got {reprlib.repr(partial)}")
    if row.get("initial_reason_steps") is not None:
        before = row["initial_reason_steps"]
        if not isinstance(before, str) or branch is not None:
            raise ValueError("initial_reason_steps: expected a text, and no branch beside it")
        before = [before] if before else []
        chosen = [*before, check_text("chosen", chosen)]
        rejected = [*before, check_text("rejected", rejected)]
        branch, partial = len(before), True if partial is None else partial
    else:
        chosen = _response("chosen", chosen, prompt, separator)
        rejected = _response("rejected", rejected, prompt, separator)
    if "".join(chosen) == "".join(rejected):
        raise SameText("chosen and rejected are the same text")
    if branch is not None:
        if isinstance(branch, bool) or not isinstance(branch, int) or branch < 0:
            raise ValueError(f"branch: expected the number of shared steps, got {reprlib.repr(branch)}")
        check_branch(branch, *(side if isinstance(side, list) else None for side in (chosen, rejected)))
    weight = _number(row, "weight", 1.0)
    if weight < 0:
        raise ValueError(f"weight: expected at least 0, got {weight}")
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "branch": branch,
        "partial": bool(partial),
        "weight": weight,
        "margin": _number(row, "margin", 0.0),
        **_chat_columns(row, prompt),
    }


def _chat_columns(row: Mapping, prompt: str | list[dict]) -> dict:
    """The row's options of the chat template. They are checked here, where file and line are known."""
    given = {name: row[name] for name in COLUMNS if row.get(name) is not None}
    chat_options(given)
    return given if isinstance(prompt, list) else {}


def _prompt_and_responses(row: Mapping) -> tuple[Any, Any, Any]:
    missing = [name for name in ("chosen", "rejected") if name not in row]
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if _is_messages(chosen) and _is_messages(rejected):
        return _parted(prompt, chosen, rejected)
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str) and chosen != rejected:
        at = _common_prompt(chosen, rejected)
        return chosen[:at], chosen[at:], rejected[at:]
    if prompt is None:
        missing.insert(0, "prompt")
    if missing:
        raise ValueError(f"expected the keys prompt, chosen and rejected, got no {' and no '.join(missing)}")
    return prompt, chosen, rejected


def _parted(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, list, list]:
    """Prompt and responses of messages, where these may be whole conversations."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    shared = sum(1 for _ in same)
    if not shared and prompt is not None:
        return prompt, chosen, rejected
    before = chosen[:shared]
    if isinstance(prompt, list) and before[: len(prompt)] != prompt:
        raise ValueError("prompt: expected the messages with which chosen and rejected begin, got others")
    # the last words of the user: a text beside whole conversations tells them once more (UltraFeedback)
    asked = next((m.get("content") for m in reversed(before) if isinstance(m, Mapping) and m.get("role") == "user"), "")
    if isinstance(prompt, str) and (not isinstance(asked, str) or asked.strip() != prompt.strip()):
        raise ValueError(
            "prompt: expected what the user says last in the messages that chosen and rejected share, got "
            f"{reprlib.repr(prompt)}"
        )
    return before, chosen[shared:], rejected[shared:]


def _common_prompt(chosen: str, rejected: str) -> int:
    """How many characters two texts begin with in common, up to the end of a word, without the space behind it."""
    words = len(os.path.commonprefix([chosen, rejected]))
    while words and not chosen[words - 1].isspace():
        words -= 1
    return words - 1 if chosen[:words].endswith(" ") else words


def _response(name: str, value: Any, prompt: str | list[dict], separator: str) -> str | list[str]:
    if _is_messages(value):
        message = _check_messages(name, value)
        if not isinstance(prompt, list):
            raise ValueError(f"{name}: a list of messages needs a prompt that is one too")
        if len(message) != 1 or message[0]["role"] != "assistant":
            raise ValueError(f"{name}: expected one assistant message, got roles {[m['role'] for m in message]}")
        value = message[0]["content"]
    if not isinstance(value, list):
        return check_text(name, value)
    if not value:
        raise ValueError(f"{name}: expected at least one step, got an empty list")
    return separate_steps([check_text(f"{name}: step {k}", step) for k, step in enumerate(value)], separator)


@dataclass(frozen=True)
class _Stepwise:
    """A row of stepwise supervision."""

    where: str
    prompt: str
    steps: list[str]
    labels: list[bool]

    def state(self, step: int) -> tuple[str, ...]:
        """The prompt and the steps before `step`."""
        return (self.prompt, *self.steps[:step])


def _stepwise(where: str, row: Mapping) -> _Stepwise:
    prompt = check_text("prompt", row.get("prompt"))
    steps, labels = row["completions"], row.get("labels")
    if not isinstance(steps, list) or not steps:
        raise ValueError("completions: expected a list of steps with at least one")
    steps = [check_text(f"completions: step {k}", step) for k, step in enumerate(steps)]
    if not isinstance(labels, list) or any(label not in (0, 1) for label in labels):
        raise ValueError("labels: expected a list of true and false")
    if len(labels) != len(steps):
        raise ValueError(f"labels: expected one for each of {len(steps)} steps, got {len(labels)}")
    return _Stepwise(where, prompt, steps, [bool(label) for label in labels])


def _pair_stepwise(rows: Sequence[_Stepwise], separator: str) -> tuple[list[dict], list[tuple[str, str]]]:
    """(pairs, conflicts): at each state, the good steps that follow it against the bad ones."""
    # state -> label -> step -> the row where it was first seen
    states: dict[tuple[str, ...], dict[bool, dict[str, str]]] = {}
    for row in rows:
        for k, (step, label) in enumerate(zip(row.steps, row.labels, strict=True)):
            state = states.setdefault(row.state(k), {True: {}, False: {}})
            state[label].setdefault(step, row.where)
    pairs, conflicts = [], []
    for (prompt, *prefix), state in states.items():
        good, bad = state[True], state[False]
        for step in good.keys() & bad.keys():
            reason = f"labels: step {len(prefix)} is labelled true after the same steps in {good[step]}"
            conflicts.append((bad[step], reason))
        for i in range(max(len(good), len(bad)) if good and bad else 0):
            (better, in_good), (worse, in_bad) = (list(side.items())[i % len(side)] for side in (good, bad))
            pairs.append(
                {
                    "prompt": prompt,
                    "chosen": separate_steps([*prefix, better], separator),
                    "rejected": separate_steps([*prefix, worse], separator),
                    "branch": len(prefix),
                    "partial": True,
                    "weight": 1.0,
                    "margin": 0.0,
                    "source": in_good if in_good == in_bad else f"{in_good} and {in_bad}",
                }
            )
    paired = {state for state, labels in states.items() if all(labels.values())}
    alone = [row.where for row in rows if not any(row.state(k) in paired for k in range(len(row.steps)))]
    if alone:
        logger.warning(
            "%d of %d stepwise rows give no pair, since no good step and bad step follow the same steps: %s",
            len(alone), len(rows), name_some(alone),
        )  # fmt: skip
    return pairs, conflicts
