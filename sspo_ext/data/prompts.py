# SPDX-License-Identifier: Apache-2.0
"""Rows of prompts for sampling: read, checked and tokenized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from .._checks import describe
from .chat import COLUMNS, chat_options
from .encode import encode_prompt
from .graders import answer_texts
from .reading import Source, parse_rows, raise_bad_rows
from .special import SpecialTokens

_KEYS = ("prompt", "answer")


def load_prompt_rows(source: Source, texts: bool = False) -> list[dict]:
    """Read and check rows of prompts and answers.

    Args:
        source: a path of a JSONL file, several paths, or mappings in memory. A row has "prompt", a text or chat
            messages, and "answer". "tools" and "chat_template_kwargs" are the row's options of the chat template.
            Other keys are kept.
        texts: whether an answer must be a text, a number, or a list of accepted ones.

    Returns:
        The rows, as they are.

    Raises:
        ValueError: there is no row, or some rows cannot be used. The message names file, line and reason of each.
        OSError: a file cannot be read.

    Examples:
        >>> from sspo_ext.data.prompts import load_prompt_rows
        >>> load_prompt_rows([{"prompt": "1 + 1 = ", "answer": 2}], texts=True)
        [{'prompt': '1 + 1 = ', 'answer': 2}]
    """

    def parse(where: str, row: Mapping) -> dict:
        missing = [key for key in _KEYS if key not in row]
        if missing:
            raise ValueError(f"expected an object with 'prompt' and 'answer', has no {missing[0]!r}")
        if not isinstance(row["prompt"], str | list) or not row["prompt"]:
            raise ValueError("prompt: expected a text or chat messages")
        chat_options(row)
        if texts:
            answer_texts(row["answer"])
        return dict(row)

    rows, bad = parse_rows(source, parse)
    raise_bad_rows(bad, len(rows) + len(bad))
    if not rows:
        raise ValueError(f"source: expected at least one row, found none in {source!r}")
    return rows


def check_rows(
    name: str,
    dataset: Any,
    *,
    chat: bool,
    answers: bool = False,
    texts: bool = False,
    required: bool = False,
    tokenizer: Any = None,
    chat_template_kwargs: Mapping | None = None,
    special_tokens: str = "error",
) -> list[list[int]]:
    """Check a trainer's dataset of prompts before training starts.

    Args:
        name: of the argument, for the messages.
        dataset: rows with a length, or None.
        chat: whether a prompt may be chat messages.
        answers: whether each row needs an answer.
        texts: whether each answer must be a text, a number, or a list of accepted ones.
        required: whether None is an error.
        tokenizer: whose chat template must take the messages, and whose special tokens no text may spell; None:
            neither is looked at, and nothing is tokenized.
        chat_template_kwargs: options of the chat template for all rows.
        special_tokens: as for `tokenize_row`.

    Returns:
        The token ids of each prompt.

    Raises:
        ValueError: the dataset is not a sequence of rows, or some rows cannot be used. The message names them.
    """
    if dataset is None and not required:
        return []
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or isinstance(dataset, Mapping):
        raise ValueError(f"{name}: expected rows with a length (a list or a datasets.Dataset), got {describe(dataset)}")
    rows = cast("Sequence[Mapping]", dataset)
    special = None if tokenizer is None else SpecialTokens(tokenizer, special_tokens)
    bad, tokens = [], []
    if not len(rows):
        raise ValueError(f"{name}: expected at least one row, got none")
    for i in range(len(rows)):
        row = rows[i]
        if not isinstance(row, Mapping):
            bad.append((f"row {i}", f"expected a mapping, got {describe(row)}"))
            continue
        missing = [key for key in _KEYS[: 1 + answers] if key not in row]
        if missing:
            bad.append((f"row {i}", f"expected {missing[0]!r}, has {sorted(row)}"))
        elif not _is_prompt(row["prompt"], chat):
            expected = "a text or chat messages" if chat else "a text, since the tokenizer has no chat template"
            bad.append((f"row {i}", f"prompt: expected {expected}, not empty, got {describe(row['prompt'])}"))
        else:
            try:
                options = chat_options(row, chat_template_kwargs)
                accepted = answer_texts(row["answer"]) if texts else []
                if special is not None:
                    special.check_prompt(row["prompt"], **{name: row.get(name) for name in COLUMNS})
                    special.check_answers(accepted)
                    tokens.append(prompt_tokens(row["prompt"], tokenizer, options))
            except (TypeError, ValueError) as error:
                bad.append((f"row {i}", str(error)))
    try:
        raise_bad_rows(bad, len(rows))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return tokens


def _is_prompt(prompt: Any, chat: bool) -> bool:
    if isinstance(prompt, str):
        return bool(prompt)
    messages = chat and isinstance(prompt, Sequence) and len(prompt) > 0
    return messages and all(isinstance(message, Mapping) and "role" in message for message in prompt)


def prompt_tokens(prompt: str | Sequence[Mapping], tokenizer, options: Mapping | None = None) -> list[int]:
    """Tokenize a prompt so that a model can complete it.

    Args:
        prompt: a text, which follows the special tokens that the tokenizer puts first unless it begins with them (one
            that the tokenizer puts at the end is left out); or chat messages, which the tokenizer's chat template
            writes. Messages that end in words of the assistant are continued.
        tokenizer: of transformers.
        options: of the chat template, see `chat_options`.

    Returns:
        Token ids, at least one.

    Raises:
        ValueError: the prompt has no token, or the chat template refuses it.
    """
    ids = encode_prompt(prompt, tokenizer, options or {}).ids
    if not ids:
        raise ValueError(f"prompt: expected at least one token, got none for {describe(prompt)}")
    return ids
