"""What a state is worth to the model itself: it is made to answer after each of its steps.

SSPO (arXiv 2508.12604) calls this verbal value probing; its prompt and its exact value are not public, so the texts,
the two values and their defaults here are our reconstruction. V_k is on the scale of E[reward | answer after step k]:

    likelihood   the probability of the gold answer after the probe
    graded       the share of a few short sampled answers that a grader accepts
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .._checks import check_choice, check_count, check_not_negative, describe
from .branches import ENGINES, SAMPLING_ENGINES, Branch, branch_logps
from .values import StepBatch, StepValues


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


def probe_step_values(
    model: nn.Module,
    batch: StepBatch,
    probe: AnyProbe | Sequence[str | Probe],
    answers: Sequence[Answer] | Sequence[Any],
    *,
    mode: str = "likelihood",
    reduce: str = "joint",
    engine: str = "auto",
    max_tokens: int = 4096,
    tokenizer=None,
    grader: Callable[[str, Any], float] | None = None,
    num_samples: int = 5,
    max_answer_tokens: int = 10,
    temperature: float = 0.6,
    seed: int = 0,
) -> StepValues:
    """V_0..V_K of every sequence, in [0, 1]: after the question alone and after each of its K steps. No gradient.

    Args:
        model: any Hugging Face causal LM; runs in eval mode, and its modes are restored.
        batch: prompts (with the chat template's tokens, where there is one) and steps. Special tokens at the end of a
            response are left out before the probe: V_K is asked of the text.
        probe: a language of `PROBES`, any other text, a `Probe`, or token ids; or one text or Probe for each sequence.
            See `as_probe`.
        answers: (B,) the gold answer of each sequence. "likelihood": a text, several accepted texts, or the same in
            token ids; a number after a probe that is a text is taken as its text. "graded": whatever `grader` takes.
        mode: "likelihood" or "graded".
        reduce: "likelihood": "joint", exp(sum of log p) over the answer's tokens, the probability of the answer; or
            "mean", exp(mean of log p), which overstates long answers: with exact-match rewards the model then learns
            never to answer. Several texts: "joint" adds their probabilities, as different texts of which none is the
            beginning of another exclude each other (one that begins with another counts as that other); "mean" takes
            the largest, as it has no such meaning.
        engine: "separate", "packed", "cached" or "auto", see `sspo_ext.signals.branches`. "graded" samples from a
            cache: "separate", "cached" or "auto".
        max_tokens: budget of one forward, in tokens.
        tokenizer: needed for texts, and for "graded".
        grader: "graded": grader(text of a sampled answer, the sequence's answer) -> 0..1 or bool.
        num_samples, max_answer_tokens, temperature, seed: "graded": how answers are sampled; temperature 0 is one
            greedy answer. An answer ends with its line or with the model's turn. Each answer has its own random
            numbers, so they depend neither on the engine nor on the batch.

    Returns:
        StepValues on the model's device, float32.

    Raises:
        ValueError, TypeError: an argument that does not fit, or has no effect in this mode, by name; values that are
            not finite (on the host).

    Example::

        >>> batch = StepBatch([tokenizer("6 + 13 + 7 = ?\\n").input_ids], [[tokenizer("6 + 13 = 19\\n").input_ids]])
        >>> probe_step_values(model, batch, "####", ["26"], tokenizer=tokenizer).to_lists()  # [[V_0, V_1]]
    """
    check_probe_options(
        mode=mode, reduce=reduce, engine=engine, max_tokens=max_tokens, grader=grader, num_samples=num_samples,
        max_answer_tokens=max_answer_tokens, temperature=temperature, seed=seed,
    )  # fmt: skip
    if not isinstance(batch, StepBatch):
        raise TypeError(f"batch: expected a StepBatch, got {describe(batch)}")
    if len(answers) != len(batch):
        raise ValueError(f"answers: expected one for each of {len(batch)} sequences, got {len(answers)}")
    states = States(model, batch, probe, tokenizer)
    if mode == "graded":
        from .graded import graded_values

        values = graded_values(
            model, states, answers, tokenizer, grader, num_samples=num_samples, max_answer_tokens=max_answer_tokens,
            temperature=temperature, seed=seed, engine=engine, max_tokens=max_tokens,
        )  # fmt: skip
    else:
        values = likelihood_values(model, states, answers, reduce=reduce, engine=engine, max_tokens=max_tokens)
    counts = [len(batch.step_ids[b]) + 1 for b in range(len(batch))]
    return StepValues.from_tensor(values, torch.from_numpy(np.cumsum([0, *counts])))


def check_probe_options(
    *,
    mode: str = "likelihood",
    reduce: str = "joint",
    engine: str = "auto",
    max_tokens: int = 4096,
    grader: Any = None,
    num_samples: int = 5,
    max_answer_tokens: int = 10,
    temperature: float = 0.6,
    seed: int = 0,
) -> None:
    """What `probe_step_values` can say of its options without a model: values, and those without effect in a mode."""
    check_choice("mode", mode, ("likelihood", "graded"))
    check_choice("reduce", reduce, ("joint", "mean"))
    check_choice("engine", engine, ("auto", *(ENGINES if mode == "likelihood" else SAMPLING_ENGINES)))
    check_count("max_tokens", max_tokens)
    check_count("seed", seed, 0)
    check_count("num_samples", num_samples)
    check_count("max_answer_tokens", max_answer_tokens)
    check_not_negative("temperature", temperature)
    idle = {"reduce": reduce != "joint"}
    if mode == "likelihood":
        idle = {"grader": grader is not None, "num_samples": num_samples != 5}
        idle |= {"max_answer_tokens": max_answer_tokens != 10, "temperature": temperature != 0.6}
    for name in (name for name, given in idle.items() if given):
        raise ValueError(f"{name}: has no effect with mode {mode!r}; leave it out, or choose the other mode")


class State(NamedTuple):
    """Where a probe is put: after the first `cut` tokens of a sequence and some more that are not in it."""

    sequence: int
    cut: int
    more: Sequence[int] = ()


class States:
    """The states of a batch, and the probe's tokens in each.

    `at` are all of its prefixes in the order of StepValues, unless given as (sequence, number of steps, tokens after
    them). Special tokens at a state's end are left out.
    """

    def __init__(
        self,
        model: nn.Module,
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
        probe = self.probes[state.sequence]
        return list(probe) if not isinstance(probe, Probe) else _encode(self.tokenizer, *self._before(state))

    def encoded(self, state: State, answer: Answer) -> tuple[list[int], list[list[int]]]:
        """The probe's tokens and those of each accepted answer after it."""
        is_text = isinstance(self.probes[state.sequence], Probe)
        key = (state.sequence, self._before(state) if is_text else None)
        if key not in self._encoded:
            self._encoded[key] = self.probe_ids(state), self._spellings(state, answer)
        return self._encoded[key]

    def _spellings(self, state: State, answer: Answer) -> list[list[int]]:
        probe = self.probes[state.sequence]
        if isinstance(probe, Probe) and isinstance(answer, (int, float)) and not isinstance(answer, bool):
            answer = str(answer)
        whole = isinstance(answer, str) or _is_ids(answer) or not isinstance(answer, Iterable)
        many = [answer] if whole else list(answer)
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
        """(a stand-in for the state's text, the probe's text after it)"""
        probe = self.probes[state.sequence]
        if probe.turn:
            return "a", _asked(self.tokenizer, probe)
        last = state.more[-1] if state.more else self.trunks[state.sequence][state.cut - 1]
        if last not in self._ends_line:
            text = self.tokenizer.decode([last], clean_up_tokenization_spaces=False)
            self._ends_line[last] = text.endswith("\n")
        ended = not probe.lead or self._ends_line[last]
        return ("a\n", probe.text) if ended else ("a", probe.lead + probe.text)


def likelihood_values(
    model: nn.Module, states: States, answers: Sequence[Answer], *, reduce: str, engine: str, max_tokens: int
) -> torch.Tensor:  # (states,) float32 in [0, 1]
    branches, counts = [], []
    for state in states.at:
        probe, spellings = states.encoded(state, answers[state.sequence])
        spellings = _distinct(spellings, reduce)
        given = [*state.more, *probe]
        branches += [Branch(state.sequence, state.cut, [*given, *ids], len(given)) for ids in spellings]
        counts.append(len(spellings))
    logps = branch_logps(model, states.trunks, branches, engine=engine, max_tokens=max_tokens)
    scores = logps.sums()
    if reduce == "mean":
        scores = scores / logps.offsets.diff()
    offsets = torch.tensor([0, *np.cumsum(counts)], device=scores.device)
    how = "sum" if reduce == "joint" else "max"
    return torch.segment_reduce(scores.exp(), how, offsets=offsets).clamp(0, 1)


def _distinct(spellings: list[list[int]], reduce: str) -> list[list[int]]:
    """Events that exclude each other: no text twice, and for sums none that begins with another."""
    kept: list[list[int]] = []
    for ids in sorted(spellings, key=len):
        if not any(ids[: len(other)] == other if reduce == "joint" else ids == other for other in kept):
            kept.append(ids)
    return kept


def special_ids(model: nn.Module, tokenizer) -> set[int]:
    """Tokens that end or pad a text: the tokenizer's, and the model's own ends of sequence."""
    found = set(() if tokenizer is None else tokenizer.all_special_ids)
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        found |= set(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])
    return found


def _resolve(probe: Any, batch: int, tokenizer) -> list:
    """One Probe, or list of token ids, for each sequence."""
    many = not isinstance(probe, (str, Probe)) and not _is_ids(probe)
    if many and (not isinstance(probe, Sequence) or len(probe) != batch):
        raise ValueError(
            f"probe: expected a text, a Probe, token ids, or a text or Probe for each of {batch} sequences, got "
            f"{describe(probe)}"
        )
    found = []
    for one in probe if many else [probe] * batch:
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


def _is_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(i, int) for i in value)


def _encode(tokenizer, before: str, text: str) -> list[int]:
    """Token ids of `text` as it reads after `before`, or by itself where a token would reach over both."""
    head = tokenizer(before, add_special_tokens=False)["input_ids"]
    full = tokenizer(before + text, add_special_tokens=False)["input_ids"]
    if full[: len(head)] == head and len(full) > len(head):
        return full[len(head) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _asked(tokenizer, probe: Probe) -> str:
    """What the chat template writes after the model's text when the user asks for the answer."""
    mark = "@@"
    messages = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": probe.text}], tokenize=False, add_generation_prompt=True,
        **(probe.chat_template_kwargs or {}),
    )  # fmt: skip
    return text[text.rindex(mark) + len(mark) :]
