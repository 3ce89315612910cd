# SPDX-License-Identifier: Apache-2.0
"""`--dry-run`: some rows as a training would see them. No model is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_ROWS = 3  # that are printed

_COLOURS = (44, 45, 42, 46, 41, 43)  # backgrounds of a terminal; one for each step, over and over


def print_pairs(features: Sequence[Mapping], tokenizer: Any) -> None:
    """Print tokenized preference rows: the prompt, the steps of both responses, and which of them are compared.

    Args:
        features: Of `tokenize_rows`.
        tokenizer: Of the model.
    """
    counted = sum(len(feature["pairs"]) for feature in features)
    print(f"{len(features)} rows, {counted} pairs of steps; in brackets: what the model reads, and what is not scored")
    for feature in features[:_ROWS]:
        print(f"\n== {feature['source']}")
        for side in ("chosen", "rejected"):
            print(f"-- {side}: {len(feature[f'{side}_input_ids'])} tokens")
            _print_parts(feature[f"{side}_input_ids"], feature[f"{side}_step_ids"], tokenizer)
        pairs = ", ".join(f"{chosen} > {rejected}" for chosen, rejected in feature["pairs"])
        print(f"-- pairs, chosen > rejected: {pairs}; weight {feature['weight']:g}, margin {feature['margin']:g}")


def print_prompts(rows: Sequence[Mapping], args: Any, tokenizer: Any) -> None:
    """Print prompts as the model reads them, their answers, and how the model will be asked after each step.

    Args:
        rows: Of `load_prompt_rows`.
        args: An SSPOConfig.
        tokenizer: Of the model.
    """
    from ..data.prompts import check_rows
    from ..train.sspo_inputs import has_chat, rendering_of

    prompts = check_rows("data", rows, chat=has_chat(tokenizer), required=True, **rendering_of(args, tokenizer))
    print(f"{len(rows)} rows, {args.num_generations} completions of each")
    for row, ids in zip(rows[:_ROWS], prompts, strict=False):
        print(f"\n== {len(ids)} tokens")
        print(_shown(tokenizer.decode(ids), None))
        print(f"-- answer: {row.get('answer')!r}")
        if args.combine != "outcome":
            print(f"-- after each step: {args.asked.text!r}")


def _print_parts(ids: Sequence[int], steps: Sequence[int], tokenizer: Any) -> None:
    """One line or more for each run of tokens of one step; step -1 is not scored."""
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or steps[end] != steps[start]:
            step = steps[start]
            text = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
            print(_shown(text, None if step < 0 else step))
            start = end


def _shown(text: str, step: int | None) -> str:
    if step is None:
        return f"[{text}]"
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return f"{step}: {text}"
    return f"{step}: \x1b[30;{_COLOURS[step % len(_COLOURS)]}m{text}\x1b[0m"
