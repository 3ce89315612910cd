# SPDX-License-Identifier: Apache-2.0
"""The texts of a row as token ids: a prompt, and a response behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from ..signals.split import SplitBy, split_text
from .chat import render_prompt, render_response
from .length import LengthBound
from .special import first_tokens


class UnusableRow(ValueError):
    """A well-formed row that leaves nothing to compare. Many rows can share the message, which says why."""


class TooLong(UnusableRow):
    """A row over `max_length`."""

    def __init__(self, max_length: int | None):
        super().__init__(f"longer than max_length={max_length}")


def check_bound(bound: LengthBound, text: str) -> None:
    """TooLong if the text surely exceeds the bound."""
    if bound.exceeded(text):
        raise TooLong(bound.max_length)


def _encode(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def encode_response(tokenizer, prompt: Prompt, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The response's token ids, and their offsets in its text."""
    ids, offsets = _encode(tokenizer, prompt.text + text)
    n, at = len(prompt.text_ids), len(prompt.text)
    inside = all(start >= at for start, _ in offsets[n:]) and all(end <= at for _, end in offsets[:n])
    if ids[:n] == prompt.text_ids and inside:
        ids, offsets = ids[n:], [(start - at, end - at) for start, end in offsets[n:]]
    else:
        ids, offsets = _encode(tokenizer, text)
    if not ids:
        raise UnusableRow("whose response has no tokens")
    return ids, offsets


class Prompt(NamedTuple):
    """A prompt as the model reads it."""

    text: str
    text_ids: list[int]  # of the text alone
    ids: list[int]  # with the special tokens that the tokenizer puts first


def encode_prompt(
    prompt: str | Sequence[Mapping], tokenizer, options: Mapping, bound: LengthBound | None = None
) -> Prompt:
    """Tokenize a prompt: a text, which follows the special tokens that the tokenizer puts first, or chat messages.

    A chat template writes its own special tokens, and a text may begin with them. `options`: of `chat_options`.
    TooLong, before it is tokenized, if it surely exceeds `bound`.
    """
    chat = not isinstance(prompt, str)
    text = render_prompt(prompt, tokenizer, options) if chat else prompt
    if bound is not None:
        check_bound(bound, text)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    first = [] if chat else first_tokens(tokenizer)
    return Prompt(text, ids, ids if ids[: len(first)] == first else [*first, *ids])


def response_text(
    messages: str | Sequence[Mapping],
    prompt: str,
    response: str | Sequence[str],
    tokenizer,
    split_by: SplitBy,
    finish: bool,
    options: Mapping,
) -> tuple[str, list[int], bool]:
    """Lay out a response behind its prompt.

    Args:
        messages: the prompt, a text or chat messages.
        prompt: its text, of `encode_prompt`.
        response: a text, which `split_by` splits, or a list of steps.
        tokenizer: its chat template writes the response to chat messages.
        split_by: as for `split_text`.
        finish: whether the response goes to its end, the end of the model's turn.
        options: of `chat_options`.

    Returns:
        The response's text; the edges of its steps, 0 and the text's length included; whether the end of sequence is to
        be appended.
    """
    if isinstance(response, str):
        text, edges = response, [0, *(end for _, end in split_text(response, split_by))]
    else:
        text, edges = "".join(response), [0, *accumulate(map(len, response))]
    if isinstance(messages, str):
        return text, edges, finish
    written, at = render_response(messages, prompt, text, tokenizer, options)
    content = text.strip()
    end = at + len(content)
    written = written.rstrip() if finish else written[:end]
    moved = at - text.index(content)  # from a place in the text to the same place in `written`
    inner = {edge + moved for edge in edges[1:-1] if 0 <= edge + moved <= len(written)}
    return written, sorted(inner | {0, len(written)}), finish and len(written) == end
