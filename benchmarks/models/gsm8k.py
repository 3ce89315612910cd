"""GSM8K: solutions by real models, right and wrong, as preference pairs."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence

from sspo_ext.data.rows import check_text, logger, normal_row, raise_bad_rows, read_rows


def load_gsm8k_solutions(
    path: str | os.PathLike,
    *,
    held_out: float = 0.2,
    max_pairs: int = 1,
    models: Sequence[str] | None = None,
    prompt_template: str = "Question: {question}\nAnswer:\n",
) -> tuple[list[dict], list[dict]]:
    """(train, held-out) rows of correct against wrong solutions of one question, as `load_preference_rows` gives them.

    path       JSONL; a line is {"question": text, ANY NAME: {"solution": text, "is_correct": bool}, ...; other keys are
               ignored}, as example_model_solutions.jsonl of openai/grade-school-math
    held_out   share of the questions that are held out. A question is held out by its own hash: all of its pairs, in
               every run, whatever else the file holds
    max_pairs  pairs of one question, at most; the first correct solution with the first wrong one, and so on
    models     whose solutions to take, in order of preference; None: all, as they stand

    Questions without both a correct and a wrong solution give no pair and are counted in a log message. Bad lines raise
    one ValueError that names them all.
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
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
