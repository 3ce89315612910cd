# SPDX-License-Identifier: Apache-2.0
"""The types of step preferences: a candidate for the next step, and the state that it follows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A possible next step.

    Attributes:
        ids: its token ids, without special tokens.
        text: its text, without white space around it. Equal texts after a state are one candidate.
        count: how often it was sampled or found.
        ended: whether the response was complete with this step: the model ended its turn, or the text is final.
        value: what the step is worth; NaN before it is known.
        logp: the log-prob of all its tokens, by the model that was traced; None if it is not known.
        continuation: the greedy rest of the response; None if none was made.
        written: its text as it stands after the state, white space included; None if it is not known.
    """

    ids: tuple[int, ...]
    text: str
    count: int
    ended: bool
    value: float = float("nan")
    logp: float | None = None
    continuation: str | None = None
    written: str | None = None


@dataclass(frozen=True)
class Node:
    """A state, which is the first `step` steps of a sequence, with candidates for the next step.

    Attributes:
        sequence: index of the sequence in the batch.
        step: how many steps of the sequence come before.
        candidates: the candidates, the best first.
    """

    sequence: int
    step: int
    candidates: tuple[Candidate, ...]


def best_first(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Sort candidates by value, the best first; equal ones keep their order."""
    return tuple(sorted(candidates, key=lambda c: -c.value))


def text_after(tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """Decode token ids as they stand after others: alone, a first token may lose its space.

    Args:
        tokenizer: any Hugging Face tokenizer.
        before: the token ids before them, without special tokens; the last few are enough.
        ids: token ids.

    Returns:
        Their text, without special tokens.
    """

    def text(some: Sequence[int]) -> str:
        return tokenizer.decode(list(some), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    context = before[-8:]
    head, whole = text(context), text([*context, *ids])
    return whole[len(head) :] if whole.startswith(head) else text(ids)
