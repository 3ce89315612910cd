# SPDX-License-Identifier: Apache-2.0
"""Special tokens in the texts of a row. A tokenizer makes the token of every text that spells one.

So data could end a turn, open another in anyone's name, or end a response early.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .._checks import check_choice

SPECIAL_TOKENS = ("error", "allow")


def first_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    plain, full = (list(tokenizer("a", add_special_tokens=some)["input_ids"]) for some in (False, True))
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return full[:at]


class SpecialTokens:
    """Refuses texts that spell a special token of the tokenizer.

    The tokenizer's own frame of a text is no forgery: the tokens that it puts first, and an end of sequence at the end.

    Args:
        tokenizer: of transformers.
        handling: "error": such a text is refused. "allow": nothing is looked at.
    """

    def __init__(self, tokenizer: Any, handling: str = "error"):
        check_choice("special_tokens", handling, SPECIAL_TOKENS)
        names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        names |= set(tokenizer.all_special_tokens)
        longest_first = sorted(filter(None, names), key=len, reverse=True)
        wanted = handling == "error" and longest_first
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if wanted else None
        self._first = "".join(tokenizer.convert_ids_to_tokens(first_tokens(tokenizer))) if wanted else ""
        self._end = tokenizer.eos_token or ""

    def check_prompt(self, prompt: Any, **columns: Any) -> None:
        """ValueError for a prompt, or a column that the chat template is given, that spells a special token."""
        self._check("prompt", prompt.removeprefix(self._first) if isinstance(prompt, str) else prompt)
        for name, value in columns.items():
            self._check(name, value)

    def check_response(self, name: str, response: str | Sequence[str], *, chat: bool) -> None:
        """ValueError for a response that spells a special token before its end, or in a chat at all."""
        steps = [response] if isinstance(response, str) else response
        end = "" if chat else self._end
        for k, step in enumerate(steps):
            where = name if isinstance(response, str) else f"{name}: step {k}"
            self._check(where, step.removesuffix(end) if k == len(steps) - 1 else step)

    def check_answers(self, answers: Any) -> None:
        """ValueError for an answer that spells a special token: the probe scores its tokens."""
        self._check("answer", answers)

    def _check(self, name: str, value: Any) -> None:
        check_unicode(name, value)
        if self._pattern is None:
            return
        for text in _texts(value):
            found = self._pattern.search(text)
            if found is not None:
                raise ValueError(
                    f"{name}: expected a text, got one that spells the special token {found.group()!r}, which the "
                    "tokenizer would put there; take it out, or allow it by special_tokens 'allow'"
                )


def check_unicode(name: str, value: Any) -> None:
    """ValueError for a text with half of a surrogate pair: no tokenizer reads it, and no file holds it."""
    for text in _texts(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            at = error.start
            raise ValueError(
                f"{name}: expected Unicode text, got the lone surrogate {text[at]!r} at character {at}"
            ) from None


def _texts(value: Any) -> Iterator[str]:
    """All texts inside a value of JSON types, however deep."""
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, Sequence):
            todo += value
