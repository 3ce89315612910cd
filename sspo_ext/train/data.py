"""Preference rows from local JSONL files: read, checked, normalised. No tokenizer and no torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike


def load_preference_rows(
    source: str | PathLike | Iterable[str | PathLike] | Iterable[Mapping],
    *,
    step_separator: str = "\n",
) -> list[dict]:
    """Preference rows in one normal form, from JSONL files or from rows already in memory.

    Each returned row: {"prompt": str | list[message], "chosen": str | list[str], "rejected": str | list[str],
    "branch": int | None, "partial": bool, "weight": float, "margin": float, "source": "file:line"}.
    """
    raise NotImplementedError


def load_gsm8k_solutions(
    path: str | PathLike,
    *,
    held_out: float = 0.2,
    max_pairs: int = 1,
    prompt_template: str = "Question: {question}\nAnswer:\n",
) -> tuple[list[dict], list[dict]]:
    """(train rows, held-out rows) from a file in the form of example_model_solutions.jsonl, split by question."""
    raise NotImplementedError
