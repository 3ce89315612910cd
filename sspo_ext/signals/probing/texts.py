"""Probe texts: what is appended to a chain so that the model answers at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..._checks import describe


@dataclass(frozen=True)
class Probe:
    """A text that makes the model answer now.

    text       what is said for the model, or with `turn` asked by the user
    lead       put before it where the state does not end a line
    separator  between the text and the answer
    ends       texts that may follow the answer, which is then scored with any of them. With the default, an answer
               counts however it goes on, "4" also where the model would go on to "42"
    turn       ask in a turn of the user's (the tokenizer's chat template closes the model's turn and opens its next)
               instead of going on in the model's turn
    chat_template_kwargs  with `turn`, the template's options: those the prompt was made with
    """

    text: str
    lead: str = "\n"
    separator: str = " "
    ends: tuple[str, ...] = ("",)
    turn: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = field(default=None, hash=False)


PROBES = {
    "en": Probe("The final answer is"),
    "zh": Probe("最终答案是", separator=""),
    "ja": Probe("最終的な答えは", separator=""),
    "ko": Probe("최종 답은"),
    "de": Probe("Die endgültige Antwort ist"),
    "fr": Probe("La réponse finale est"),
    "es": Probe("La respuesta final es"),
    "ru": Probe("Окончательный ответ:"),
    "symbol": Probe("####"),
}

_NAMES = {
    "english": "en",
    "chinese": "zh",
    "japanese": "ja",
    "korean": "ko",
    "german": "de",
    "french": "fr",
    "spanish": "es",
    "russian": "ru",
}

_LIKE_A_LANGUAGE = re.compile(r"[A-Za-z]+([-_][A-Za-z]+)?")  # nothing around it: "\nAnswer" is a text


def as_probe(probe: str | Probe) -> Probe:
    """A Probe as it is; a language of `PROBES`, or its English name, in any case; any other text, which then asks for
    the answer.

    Raises ValueError for a word that reads like a language and is none, "jp" or "zh-cn": the model would be asked with
    that word.
    """
    if isinstance(probe, Probe):
        return probe
    if not isinstance(probe, str):
        raise TypeError(f"probe: expected a language, a text or a Probe, got {describe(probe)}")
    word = probe.strip().lower()
    language = PROBES.get(_NAMES.get(word, word))
    if language is None and _LIKE_A_LANGUAGE.fullmatch(probe):
        raise ValueError(
            f"probe: expected a language ({', '.join(PROBES)}) or a text that asks for the answer, got {probe!r}, "
            f"which reads like a language; if this word is the text, pass Probe({probe!r}), or {probe + ':'!r}"
        )
    return language or Probe(probe)


AnyProbe = str | Probe | Sequence[int]

Answer = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
