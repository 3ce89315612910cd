# SPDX-License-Identifier: Apache-2.0
"""GSM8K: right and wrong solutions by real models, as preference pairs."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence

from sspo_ext.data.reading import raise_bad_rows, read_rows
from sspo_ext.data.rows import check_text, logger, normal_row


def load_gsm8k_solutions(
    path: str | os.PathLike,
    *,
    held_out: float = 0.2,
    max_pairs: int = 1,
    models: Sequence[str] | None = None,
    prompt_template: str = "Question: {question}\nAnswer:\n",
) -> tuple[list[dict], list[dict]]:
    """Rows that prefer a correct solution to a wrong one of the same question, as `load_preference_rows` gives them.

    A question without a correct or without a wrong solution gives no pair. A log message counts these questions.

    Args:
        path: JSONL, in the form of example_model_solutions.jsonl of openai/grade-school-math. A line is
            {"question": text, NAME: {"solution": text, "is_correct": bool}, ...}. Other keys are ignored.
        held_out: share of the questions that are held out. The hash of a question decides, so all of its pairs are on
            the same side, in every run, whatever else the file holds.
        max_pairs: of one question, at most. The first pairs the first correct solution with the first wrong one.
        models: whose solutions to take, in order of preference. None takes all, in the order of the line.
        prompt_template: the prompt, with {question}.

    Returns:
        (training rows, held-out rows).

    Raises:
        ValueError: for bad lines (one error names them all), or for models that are in no line.
    """
    train: list[dict] = []
    held: list[dict] = []
    bad, total, alone = [], 0, 0
    seen: set[str] = set()
    for where, row, reason in read_rows(path):
        total += 1
        try:
            if reason:
                raise ValueError(reason)
            question = check_text("question", row.get("question"))
            solutions: dict[bool, list[str]] = {True: [], False: []}
            entries = {name: e for name, e in row.items() if isinstance(e, Mapping) and "solution" in e}
            if not entries:
                raise ValueError("expected at least one {solution, is_correct}, got none")
            seen |= entries.keys()
            for name in entries if models is None else models:
                entry = entries.get(name)
                if entry is not None:
                    if not isinstance(entry.get("is_correct"), bool):
                        raise ValueError(f"{name}: expected is_correct to be true or false")
                    text = check_text(f"{name}: solution", entry["solution"])
                    if text not in solutions[entry["is_correct"]]:
                        solutions[entry["is_correct"]].append(text)
        except ValueError as error:
            bad.append((where, str(error)))
            continue
        side = held if _share(question) < held_out else train
        pairs = itertools.product(solutions[True], solutions[False])
        alone += not all(solutions.values())
        for chosen, rejected in itertools.islice(pairs, max_pairs):
            prompt = prompt_template.format(question=question)
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            side.append({**normal_row(pair, ""), "source": where})
    raise_bad_rows(bad, total)
    if unknown := sorted(set(models or ()) - seen):
        raise ValueError(f"models: expected some of {sorted(seen)}, got {unknown}")
    logger.info("%d of %d questions have no correct or no wrong solution and give no pair", alone, total)
    return train, held


def _share(text: str) -> float:
    """A hash of the text in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
