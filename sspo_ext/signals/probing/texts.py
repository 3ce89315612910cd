# SPDX-License-Identifier: Apache-2.0
"""Probe texts: what is appended to a state so that the model answers at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..._checks import describe


@dataclass(frozen=True)
class Probe:
    r"""A text that makes the model answer now.

    Attributes:
        text: what is written for the model, or with `turn` asked by the user.
        lead: written before the text if the state does not end a line.
        separator: written between the text and the answer.
        ends: texts that may follow the answer; it is scored with each of them. By default an answer counts however the
            text goes on, so "4" also counts where the model would write "42".
        turn: ask in a turn of the user, instead of continuing the model's own turn. The tokenizer's chat template
            closes the model's turn and opens its next.
        chat_template_kwargs: with `turn`, the options of the chat template; they should be those of the prompt.

    Examples:
        >>> Probe("####", ends=("\n", "."))  # an answer with an end after it
        Probe(text='####', lead='\n', separator=' ', ends=('\n', '.'), turn=False, chat_template_kwargs=None)
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
    "boxed": Probe("So the final answer is \\boxed{", separator=""),
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

_OPEN_END = re.compile(r"[\s({\[$]$")  # the answer follows without a space

_LIKE_A_LANGUAGE = re.compile(r"[A-Za-z]+([-_][A-Za-z]+)?")  # the whole text: "\nAnswer" is no language


def as_probe(probe: str | Probe) -> Probe:
    """Return the Probe that a text or language stands for.

    Args:
        probe: a Probe, which is returned as it is; a language of `PROBES` or its English name, in any case; or another
            text, which then asks for the answer. The answer follows after a space, or without one if the text ends in
            white space, an opening bracket or "$".

    Returns:
        The Probe.

    Raises:
        ValueError: if the text is a single word that reads like a language but is not in `PROBES`, such as "jp" or
            "zh-cn": the model would be asked with that word. To use the word itself, pass Probe("jp").
        TypeError: if `probe` is neither a text nor a Probe.

    Examples:
        >>> as_probe("German").text
        'Die endgültige Antwort ist'
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
    return language or Probe(probe, separator="" if _OPEN_END.search(probe) else " ")


AnyProbe = str | Probe | Sequence[int]

Answer = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
