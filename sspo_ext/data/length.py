# SPDX-License-Identifier: Apache-2.0
"""Which texts have surely more tokens than a limit, known from their characters alone.

A text of 5 MB takes seconds to tokenize. This finds what will be dropped anyway before that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

# How many characters a normalizer may make one of: NFC composes at most 4.
_NORMALIZERS = {"ByteLevel": 1, "Prepend": 1, "NFD": 1, "NFKD": 1, "NFC": 4, "NFKC": 4}

_PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Digits", "Split", "Punctuation")


class LengthBound:
    """Finds texts that surely have more tokens than `max_length`.

    A token covers at most as many characters as the longest one of the vocabulary has. This holds only for a tokenizer
    that loses no character; for others nothing is sure.

    Args:
        tokenizer: a fast one of transformers.
        max_length: the limit in tokens; None: no limit, and nothing is sure.
    """

    def __init__(self, tokenizer: Any, max_length: int | None):
        self.max_length = max_length
        self._characters = None
        self._swallowing: list[str] = []
        if max_length is not None:
            made = json.loads(tokenizer.backend_tokenizer.to_str())
            widest = _widest(made, tokenizer.get_vocab())
            # one token more: the last may reach over the end of what counts
            self._characters = None if widest is None else (max_length + 1) * widest
            self._swallowing = [t["content"] for t in made["added_tokens"] if t["lstrip"] or t["rstrip"]]

    def exceeded(self, text: str) -> bool:
        """Whether the text surely has more tokens than `max_length`."""
        if self._characters is None or len(text) <= self._characters:
            return False
        return not any(token in text for token in self._swallowing)  # such a token takes white space of any length


def _widest(made: Mapping, vocab: Mapping[str, int]) -> int | None:
    """The most characters of a text that one token covers; None: there is no such number."""
    model = made["model"]
    pre = list(_parts(made["pre_tokenizer"], "pretokenizers"))
    normalizers = list(_parts(made["normalizer"], "normalizers"))
    if model["type"] not in ("BPE", "Unigram"):  # a word of any length may be one unknown token
        return None
    if any(part["type"] not in _PRE_TOKENIZERS or part.get("behavior") == "Removed" for part in pre):
        return None
    shrinking = 1
    for part in normalizers:
        if part["type"] == "Replace":
            pattern = part["pattern"].get("String")
            if pattern is None or len(part["content"]) < len(pattern):
                return None
        elif part["type"] in _NORMALIZERS:
            shrinking *= _NORMALIZERS[part["type"]]
        else:
            return None
    if any(part["type"] == "ByteLevel" for part in (*pre, *normalizers)):
        from tokenizers.pre_tokenizers import ByteLevel

        known = all(letter in vocab for letter in ByteLevel.alphabet())
    elif model.get("byte_fallback"):
        known = all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    else:  # one token for each unknown character, or none at all, or one for many
        known = model["type"] == "BPE" and model.get("unk_token") is not None and not model.get("fuse_unk")
    return shrinking * max(map(len, vocab), default=1) if known else None


def _parts(made: Mapping | None, name: str) -> Iterator[Mapping]:
    """The parts of a normalizer or a pre-tokenizer, out of their sequences."""
    if made is None:
        return
    if made["type"] == "Sequence":
        for part in made[name]:
            yield from _parts(part, name)
    else:
        yield made
