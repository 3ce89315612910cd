# SPDX-License-Identifier: Apache-2.0
"""The states that are probed, as tokens: a prompt, the steps so far, the probe and an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..._checks import describe
from ..values import StepBatch
from .texts import Probe, as_probe


class State(NamedTuple):
    """Where a probe is put: after the first `cut` tokens of a sequence, and after `more` tokens that are not in it."""

    sequence: int
    cut: int
    more: Sequence[int] = ()


class States:
    """The states of a batch, and the probe's tokens after each.

    By default they are all prefixes of the batch, in the order of StepValues. `at` gives others, as (sequence, number
    of steps, tokens after these steps). Special tokens at the end of a state are left out.
    """

    def __init__(
        self,
        model: nn.Module | None,
        batch: StepBatch,
        probe: Any,
        tokenizer,
        at: Sequence[tuple[int, int, Any]] | None = None,
    ):
        self.tokenizer = tokenizer
        self.trunks = [batch.sequence(b) for b in range(len(batch))]
        self.probes = _resolve(probe, len(batch), tokenizer)
        special = special_ids(model, tokenizer)
        if at is None:
            at = [(b, k, ()) for b in range(len(batch)) for k in range(len(batch.step_ids[b]) + 1)]
        boundaries = [batch.boundaries(b) for b in range(len(batch))]
        self.at: list[State] = []
        for b, k, more in at:
            cut, more = boundaries[b][k], list(more)
            while more and more[-1] in special:
                more.pop()
            while not more and cut > boundaries[b][0] and self.trunks[b][cut - 1] in special:
                cut -= 1
            self.at.append(State(b, cut, more))
        self._ends_line: dict[int, bool] = {}
        self._encoded: dict[tuple, tuple[list[int], list[list[int]]]] = {}

    def probe_ids(self, state: State) -> list[int]:
        """Return the probe's tokens after a state."""
        probe = self.probes[state.sequence]
        return list(probe) if not isinstance(probe, Probe) else _encode(self.tokenizer, *self._before(state))

    def encoded(self, state: State, answer: Any) -> tuple[list[int], list[list[int]]]:
        """Return the probe's tokens after a state, and the tokens of each accepted answer after the probe."""
        is_text = isinstance(self.probes[state.sequence], Probe)
        key = (state.sequence, self._before(state) if is_text else None)
        if key not in self._encoded:
            self._encoded[key] = self.probe_ids(state), self._spellings(state, answer)
        return self._encoded[key]

    def _spellings(self, state: State, answer: Any) -> list[list[int]]:
        probe = self.probes[state.sequence]
        if isinstance(probe, Probe) and isinstance(answer, (int, float)) and not isinstance(answer, bool):
            answer = str(answer)
        many = _several(answer)
        if isinstance(probe, Probe) and all(isinstance(a, str) for a in many):
            if not many or not all(a.strip() for a in many):
                raise ValueError(
                    f"answers: expected at least one text, none of them blank, got {answer!r} for sequence "
                    f"{state.sequence}"
                )
            before = "".join(self._before(state))
            return [_encode(self.tokenizer, before, probe.separator + a + end) for a in many for end in probe.ends]
        if self.tokenizer is not None:
            many = [_encode(self.tokenizer, "", a) if isinstance(a, str) else a for a in many]
        if not many or not all(_is_ids(a) and len(a) for a in many):
            raise ValueError(
                f"answers: expected a text (with a tokenizer), token ids, or several, got {answer!r} for sequence "
                f"{state.sequence}"
            )
        return [list(a) for a in many]

    def _before(self, state: State) -> tuple[str, str]:
        """Return (a short text that stands for the state's, the probe's text after it)."""
        probe = self.probes[state.sequence]
        assert isinstance(probe, Probe)
        if probe.turn:
            return "a", _asked(self.tokenizer, probe)
        last = state.more[-1] if state.more else self.trunks[state.sequence][state.cut - 1]
        if last not in self._ends_line:
            text = self.tokenizer.decode([last], clean_up_tokenization_spaces=False)
            self._ends_line[last] = text.endswith("\n")
        ended = not probe.lead or self._ends_line[last]
        return ("a\n", probe.text) if ended else ("a", probe.lead + probe.text)


def special_ids(model: nn.Module | None, tokenizer) -> set[int]:
    """Return the tokens that end or pad a text: the tokenizer's, and the model's own ends of sequence."""
    found: set[int] = set() if tokenizer is None else set(tokenizer.all_special_ids)
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        found |= set(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])
    return found


def _resolve(probe: Any, batch: int, tokenizer) -> list[Probe | Sequence[int]]:
    """Return one Probe, or list of token ids, for each sequence."""
    if isinstance(probe, (str, Probe)) or _is_ids(probe):
        given: list[Any] = [probe] * batch
    elif isinstance(probe, Sequence) and len(probe) == batch:
        given = list(probe)
    else:
        raise ValueError(
            f"probe: expected a text, a Probe, token ids, or a text or Probe for each of {batch} sequences, got "
            f"{describe(probe)}"
        )
    found = []
    for one in given:
        if isinstance(one, str):
            one = as_probe(one)
        if isinstance(one, Probe):
            if tokenizer is None:
                raise ValueError("tokenizer: expected one, since the probe is a text")
            if not one.text.strip() or not one.ends:
                raise ValueError(f"probe: expected a text and at least one end (which may be ''), got {one!r}")
        elif not _is_ids(one):
            raise ValueError(f"probe: expected a text, a Probe or token ids, got {describe(one)}")
        found.append(one)
    return found


def _several(answer: Any) -> list[Any]:
    """Return one answer, or several, as a list."""
    if isinstance(answer, str) or _is_ids(answer) or not isinstance(answer, Iterable):
        return [answer]
    return list(answer)


def _is_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(i, int) for i in value)


def _encode(tokenizer, before: str, text: str) -> list[int]:
    """Return the tokens of `text` as it reads after `before`, or of `text` alone if a token would span both."""
    first = tokenizer(before, add_special_tokens=False)["input_ids"]
    full = tokenizer(before + text, add_special_tokens=False)["input_ids"]
    if full[: len(first)] == first and len(full) > len(first):
        return full[len(first) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _asked(tokenizer, probe: Probe) -> str:
    """Return what the chat template writes after the model's text when the user asks for the answer."""
    mark = "@@"
    messages = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": probe.text}], tokenize=False, add_generation_prompt=True,
        **(probe.chat_template_kwargs or {}),
    )  # fmt: skip
    return text[text.rindex(mark) + len(mark) :]
