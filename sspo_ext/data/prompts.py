"""Rows of prompts for sampling: reading, checking, tokenising."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .graders import answer_texts
from .rows import raise_bad_rows
from .tokenize import prompt_text


def check_rows(
    name: str, dataset, *, chat: bool, answers: bool = False, texts: bool = False, required: bool = False
) -> None:
    """Every row has a prompt, a text or, with `chat`, messages; with `answers` an answer, and with `texts` one that can
    be written: what cannot be used is found before training. ValueError naming the rows."""
    if dataset is None and not required:
        return
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or isinstance(dataset, Mapping):
        raise ValueError(f"{name}: expected rows with a length (a list or a datasets.Dataset), got {type(dataset)}")
    bad = []
    for i in range(len(dataset)):
        row = dataset[i]
        missing = [key for key in ("prompt", "answer")[: 1 + answers] if key not in row]
        if missing:
            bad.append((f"row {i}", f"expected {missing[0]!r}, has {sorted(row)}"))
        elif not _is_prompt(row["prompt"], chat):
            expected = "a text or chat messages" if chat else "a text, since the tokenizer has no chat template"
            bad.append((f"row {i}", f"prompt: expected {expected}, not empty, got {row['prompt']!r}"))
        elif texts:
            try:
                answer_texts(row["answer"])
            except (TypeError, ValueError) as error:
                bad.append((f"row {i}", str(error)))
    try:
        raise_bad_rows(bad, len(dataset))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _is_prompt(prompt: Any, chat: bool) -> bool:
    if isinstance(prompt, str):
        return bool(prompt)
    messages = chat and isinstance(prompt, Sequence) and len(prompt) > 0
    return messages and all(isinstance(message, Mapping) and "role" in message for message in prompt)


def prompt_tokens(prompt: str | Sequence[dict], tokenizer, template_options: dict | None = None) -> list[int]:
    """A text behind the tokenizer's special tokens (one that it puts at the end is left out), or chat messages by its
    template and its options, ready to be completed."""
    if isinstance(prompt, str):
        text, first = prompt_text(prompt, tokenizer)
        ids = [*first, *tokenizer(text, add_special_tokens=False).input_ids]
    else:
        ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False, **(template_options or {})
        )
    if not ids:
        raise ValueError(f"prompt: expected at least one token, got none for {prompt!r}")
    return list(ids)


def load_prompt_rows(paths: list[str], texts: bool = False) -> list[dict]:
    """Rows with "prompt" and "answer" from JSONL files, other keys kept; with `texts`, answers are texts or numbers, or
    lists of accepted ones. One ValueError names all bad lines."""
    from .graders import answer_texts
    from .rows import raise_bad_rows

    rows, bad, total = [], [], 0
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                total += 1
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    missing = [key for key in ("prompt", "answer") if not isinstance(row, dict) or key not in row]
                    if missing:
                        raise ValueError(f"expected an object with 'prompt' and 'answer', has no {missing[0]!r}")
                    if not isinstance(row["prompt"], (str, list)) or not row["prompt"]:
                        raise ValueError("prompt: expected a text or chat messages")
                    if texts:
                        answer_texts(row["answer"])
                    rows.append(row)
                except (TypeError, ValueError) as error:
                    bad.append((f"{path}:{number}", str(error)))
    raise_bad_rows(bad, total)
    if not rows:
        raise ValueError(f"--data: expected at least one row, found none in {paths}")
    return rows
