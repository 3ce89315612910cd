"""Preference rows from local JSONL files: read, checked, and brought into one normal form. No tokenizer, no torch."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

logger = logging.getLogger(__name__)

Source = str | os.PathLike | Iterable[str | os.PathLike] | Iterable[Mapping]

_LISTED = 20  # bad rows named one by one in an error; the rest are counted


def load_preference_rows(source: Source, *, step_separator: str = "\n") -> list[dict]:
    """Preference rows, ready for `tokenize_rows`, from JSONL files or from memory. Forms may be mixed.

    source          a path, several paths, or an iterable of mappings
    step_separator  is added to every step of a list, but the last, that does not end with white space

    A row is one of

    * `{"prompt", "chosen", "rejected"}`. A response is a text, which is split into steps later, or a list of steps,
      which is taken as it is. `prompt` is a text, or a list of chat messages; then a response may also be a list with
      one assistant message. Without `prompt`, both responses are conversations and the prompt is what they share.
    * the same with `"branch": k`: the first k steps are shared, and only step k is compared (Step-DPO).
    * `{"prompt", "initial_reason_steps", "chosen", "rejected"}`, as in Step-DPO's data: texts that follow each other
      exactly; the last is the one step that is compared.
    * `{"prompt", "completions": [text...], "labels": [bool...]}`, TRL's stepwise supervision. One such row has no
      preference in it. Rows with the same prompt are laid over each other, and wherever some continue the same steps
      with one labelled good and others with one labelled bad, those two continuations are compared (`branch`): each of
      them at least once, max(good, bad) pairs in all. Rows that meet no other this way are counted in a warning.

    Optional keys: `weight` (>= 0, default 1), `margin` (default 0), `partial` (true: the response stops before its end,
    so no end of sequence is added; the default for the last two forms). Other keys are ignored.

    Returns dicts {"prompt": str | list of messages, "chosen": str | list[str], "rejected": str | list[str], "branch":
    int | None, "partial": bool, "weight": float, "margin": float, "source": "file:line"}; lists of steps concatenate to
    the response. Raises one ValueError that names file, line and reason of every bad row, before any work is done.
    """
    rows, bad, stepwise = [], [], []
    total = 0
    for where, row, reason in read_rows(source):
        total += 1
        try:
            if reason:
                raise ValueError(reason)
            if "completions" in row:
                stepwise.append((where, *_check_stepwise(row)))
            else:
                rows.append({**_normal_row(row, step_separator), "source": where})
        except ValueError as error:
            bad.append((where, str(error)))
    if stepwise:
        paired, conflicts = _pair_stepwise(stepwise, step_separator)
        rows += paired
        bad += conflicts
    raise_bad_rows(bad, total)
    if not total:
        raise ValueError(f"source: expected at least one row, found none in {source!r}")
    return rows


def raise_bad_rows(bad: Sequence[tuple[str, str]], total: int) -> None:
    """One ValueError for all of `bad`, (source, reason) each; nothing if there are none."""
    if bad:
        lines = [f"  {where}: {reason}" for where, reason in bad[:_LISTED]]
        if len(bad) > _LISTED:
            lines.append(f"  ... and {len(bad) - _LISTED} more")
        raise ValueError(f"{len(bad)} of {total} rows cannot be used:\n" + "\n".join(lines))


def read_rows(source: Source) -> Iterator[tuple[str, Mapping, str | None]]:
    """(where, row, what is wrong with the line) of every row of every file, empty lines left out."""
    items = [source] if isinstance(source, str | os.PathLike) else source
    for number, item in enumerate(items):
        if isinstance(item, Mapping):
            yield f"row {number}", item, None
            continue
        if not isinstance(item, str | os.PathLike):
            raise TypeError(f"source: expected paths or mappings, got {type(item).__name__} at {number}")
        with open(item, "rb") as file:  # in bytes, so that only "\n" ends a line and bad UTF-8 is one bad row
            for line_number, line in enumerate(file, 1):
                where = f"{os.fspath(item)}:{line_number}"
                try:
                    text = line.decode("utf-8-sig" if line_number == 1 else "utf-8")
                    if text.strip():
                        row = json.loads(text)
                        kind = type(row).__name__
                        yield where, row, None if isinstance(row, dict) else f"expected a JSON object, got {kind}"
                except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                    yield where, {}, f"not a line of JSON: {error}"


def _check_text(name: str, value) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name}: expected a text, got an empty one")
    return value


def _check_number(row: Mapping, name: str, default: float) -> float:
    value = row.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def _is_messages(value) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _check_messages(name: str, value: list) -> list[dict]:
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{name}: expected messages with a role and a content, got {message!r} at {i}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{name}: expected a text as content of message {i}")
    return [dict(message) for message in value]


def _join(steps: Sequence[str], separator: str) -> list[str]:
    """The same steps, each but the last with its separator: they concatenate to the response."""
    return [*(step if step[-1].isspace() else step + separator for step in steps[:-1]), steps[-1]]


def _response(name: str, value, prompt, separator: str) -> str | list[str]:
    if _is_messages(value):
        message = _check_messages(name, value)
        if not isinstance(prompt, list):
            raise ValueError(f"{name}: a list of messages needs a prompt that is one too")
        if len(message) != 1 or message[0]["role"] != "assistant":
            raise ValueError(f"{name}: expected one assistant message, got roles {[m['role'] for m in message]}")
        value = message[0]["content"]
    if not isinstance(value, list):
        return _check_text(name, value)
    if not value:
        raise ValueError(f"{name}: expected at least one step, got an empty list")
    return _join([_check_text(f"{name}: step {k}", step) for k, step in enumerate(value)], separator)


def _normal_row(row: Mapping, separator: str) -> dict:
    missing = [name for name in ("chosen", "rejected") if name not in row]
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if prompt is None and _is_messages(chosen) and _is_messages(rejected):
        shared = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
        )
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    elif prompt is None:
        missing.insert(0, "prompt")
    if missing:
        raise ValueError(f"expected the keys prompt, chosen and rejected, got no {' and no '.join(missing)}")
    prompt = _check_messages("prompt", prompt) if isinstance(prompt, list) and prompt else _check_text("prompt", prompt)
    branch, partial = row.get("branch"), row.get("partial")
    if partial is not None and not isinstance(partial, bool):
        raise ValueError(f"partial: expected true or false, got {partial!r}")
    if row.get("initial_reason_steps") is not None:
        before = row["initial_reason_steps"]
        if not isinstance(before, str) or branch is not None:
            raise ValueError("initial_reason_steps: expected a text, and no branch beside it")
        before = [before] if before else []
        chosen = [*before, _check_text("chosen", chosen)]
        rejected = [*before, _check_text("rejected", rejected)]
        branch, partial = len(before), True if partial is None else partial
    else:
        chosen = _response("chosen", chosen, prompt, separator)
        rejected = _response("rejected", rejected, prompt, separator)
    if "".join(chosen) == "".join(rejected):
        raise ValueError("chosen and rejected are the same text")
    if branch is not None:
        if isinstance(branch, bool) or not isinstance(branch, int) or branch < 0:
            raise ValueError(f"branch: expected the number of shared steps, got {branch!r}")
        for name, steps in (("chosen", chosen), ("rejected", rejected)):
            if isinstance(steps, list) and len(steps) <= branch:
                raise ValueError(f"branch: expected less than the {len(steps)} steps of {name}, got {branch}")
        if isinstance(chosen, list) and isinstance(rejected, list) and chosen[:branch] != rejected[:branch]:
            raise ValueError(f"branch: the first {branch} steps of chosen and rejected are not the same")
    weight = _check_number(row, "weight", 1.0)
    if weight < 0:
        raise ValueError(f"weight: expected at least 0, got {weight}")
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "branch": branch,
        "partial": bool(partial),
        "weight": weight,
        "margin": _check_number(row, "margin", 0.0),
    }


def _check_stepwise(row: Mapping) -> tuple[str, list[str], list[bool]]:
    prompt = _check_text("prompt", row.get("prompt"))
    steps, labels = row["completions"], row.get("labels")
    if not isinstance(steps, list) or not steps:
        raise ValueError("completions: expected a list of steps with at least one")
    steps = [_check_text(f"completions: step {k}", step) for k, step in enumerate(steps)]
    if not isinstance(labels, list) or any(label not in (0, 1) for label in labels):
        raise ValueError("labels: expected a list of true and false")
    if len(labels) != len(steps):
        raise ValueError(f"labels: expected one for each of {len(steps)} steps, got {len(labels)}")
    return prompt, steps, [bool(label) for label in labels]


def _pair_stepwise(
    rows: Sequence[tuple[str, str, list[str], list[bool]]], separator: str
) -> tuple[list[dict], list[tuple[str, str]]]:
    """(pairs, conflicts): one node for each prompt and prefix of steps, holding the good and the bad continuations."""
    nodes: dict[tuple, dict[bool, dict[str, str]]] = {}
    for where, prompt, steps, labels in rows:
        for k, (step, label) in enumerate(zip(steps, labels, strict=True)):
            node = nodes.setdefault((prompt, *steps[:k]), {True: {}, False: {}})
            node[label].setdefault(step, where)
    pairs, conflicts = [], []
    for (prompt, *prefix), node in nodes.items():
        good, bad = node[True], node[False]
        for step in good.keys() & bad.keys():
            reason = f"labels: step {len(prefix)} is labelled {{}} after the same steps in {{}}"
            conflicts.append((bad[step], reason.format("true", good[step])))
        for i in range(max(len(good), len(bad)) if good and bad else 0):
            (better, in_good), (worse, in_bad) = (list(side.items())[i % len(side)] for side in (good, bad))
            pairs.append(
                {
                    "prompt": prompt,
                    "chosen": _join([*prefix, better], separator),
                    "rejected": _join([*prefix, worse], separator),
                    "branch": len(prefix),
                    "partial": True,
                    "weight": 1.0,
                    "margin": 0.0,
                    "source": in_good if in_good == in_bad else f"{in_good} and {in_bad}",
                }
            )
    alone = [
        where
        for where, prompt, steps, _ in rows
        if not any(all(nodes[(prompt, *steps[:k])].values()) for k in range(len(steps)))
    ]
    if alone:
        logger.warning(
            "%d of %d stepwise rows give no pair (no good and bad continuation of the same steps): %s",
            len(alone), len(rows), name_some(alone),
        )  # fmt: skip
    return pairs, conflicts


def name_some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
