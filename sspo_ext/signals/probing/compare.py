# SPDX-License-Identifier: Apache-2.0
"""Probes compared: what the values after each say about the same completions, and which to take."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..._checks import check_kind, describe
from ..values import StepBatch
from .likelihood import probes_likelihoods
from .options import NEAR_ZERO
from .states import States
from .texts import Probe

LEAST_RISE = 0.01  # a hundredth of the scale of values, as `min_signal` of SSPOTrainer

Progress = Callable[[int, int], Any]


@dataclass(frozen=True)
class ProbeTrial:
    """What the values after one probe say about the completions. NaN stands for a mean or a comparison of nothing.

    Attributes:
        name: of the probe.
        probe: the probe.
        before: the mean value in right completions, before the first step that writes the answer.
        after: the mean value in right completions after that step, and after each that follows.
        auc: the chance that the value before the last step of a right completion is above that of a wrong one; a tie
            counts one half.
        near_zero: the share of values under 1e-3 of all that SSPOTrainer asks for, which are those before each step.
    """

    name: str
    probe: Probe
    before: float
    after: float
    auc: float
    near_zero: float

    @property
    def rise(self) -> float:
        """How much the value rises when the answer is reached."""
        return self.after - self.before

    @property
    def score(self) -> float:
        """The rise, times the share of values that are not near zero.

        The rise is the largest step advantage that there is. But a text after which the model repeats its last number
        rises as well, and is near zero in all states before.
        """
        return self.rise * (1 - self.near_zero)


@dataclass(frozen=True)
class ProbeChoice:
    """Probes compared, the best first.

    Attributes:
        best: the name of the probe to take, or None.
        reason: why, in one line.
        trials: one for each probe, by falling score.
        completions: the number of completions.
        right: how many of them are right.
        reached: how many right ones `before` and `after` were measured in: those without the answer in the question.
    """

    best: str | None
    reason: str
    trials: tuple[ProbeTrial, ...]
    completions: int
    right: int
    reached: int

    def table(self) -> str:
        """The trials as a table in Markdown, and the reason under it."""
        rows = [
            "| probe | text | before | after | AUC | under 0.001 | score |",
            "| --- | --- | --: | --: | --: | --: | --: |",
        ]
        for t in self.trials:
            text = t.probe.text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "\\n")
            turn = " (user's turn)" if t.probe.turn else ""
            rows.append(
                f"| {t.name.replace('|', chr(92) + '|')} | {text}{turn} | {t.before:.3f} | {t.after:.3f} | {t.auc:.2f} "
                f"| {t.near_zero:.0%} | {t.score:.3f} |"
            )
        return "\n".join([*rows, "", self.reason])

    def to_dict(self) -> dict[str, Any]:
        """The same in types of JSON; NaN is None."""
        trials = [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(t).items()}
            for t in self.trials
        ]
        return {**asdict(self), "trials": trials}


def compare_probes(
    model: nn.Module,
    tokenizer,
    batch: StepBatch,
    answers: Sequence[Any],
    rewards: Sequence[float],
    probes: Mapping[str, Probe],
    *,
    engine: str = "auto",
    max_tokens: int = 4096,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> ProbeChoice:
    """Compare probes on completions that are there already, as `choose_probe` does on those that it samples.

    A sequence is read once for all of the probes.

    Args:
        model: the policy that wrote the completions.
        tokenizer: its tokenizer.
        batch: B prompts and their completions in steps.
        answers: B answers: a text, a number, or several.
        rewards: B numbers; 1 and above is right.
        probes: the probes by name, as `named_probes` gives them.
        engine: as in `probe_step_values`.
        max_tokens: the budget of one forward in tokens.
        batch_size: sequences between two calls of `progress`.
        progress: called with (sequences done, sequences in all).

    Returns:
        ProbeChoice.

    Raises:
        ValueError: if an argument does not fit, or an answer is blank.
        TypeError: if an argument has the wrong type.
    """
    check_kind("batch", batch, StepBatch, "a StepBatch")
    for name, given in (("answers", answers), ("rewards", rewards)):
        if len(given) != len(batch):
            raise ValueError(f"{name}: expected one for each of {len(batch)} sequences, got {len(given)}")
    if not len(batch) or not probes:
        raise ValueError(f"batch, probes: expected at least one each, got {len(batch)} and {len(probes)}")
    texts = [answer_words(answer) for answer in answers]
    values: dict[str, list[list[float]]] = {name: [] for name in probes}
    for start in range(0, len(batch), batch_size):
        if progress is not None:
            progress(start, len(batch))
        some = StepBatch(batch.prompt_ids[start : start + batch_size], batch.step_ids[start : start + batch_size])
        states = [States(model, some, probe, tokenizer) for probe in probes.values()]
        found = probes_likelihoods(
            model, states, texts[start : start + batch_size], reduce="joint", engine=engine, max_tokens=max_tokens
        )
        counts = [len(steps) + 1 for steps in some.step_ids]
        for name, flat in zip(probes, found, strict=True):
            values[name] += [part.tolist() for part in flat.cpu().split(counts)]
    if progress is not None:
        progress(len(batch), len(batch))
    right = [reward >= 1 for reward in rewards]
    reached = [
        _reached(tokenizer, batch, b, words) if ok else None
        for b, (words, ok) in enumerate(zip(texts, right, strict=True))
    ]
    trials = [_trial(name, probe, values[name], right, reached) for name, probe in probes.items()]
    trials.sort(key=lambda t: math.inf if math.isnan(t.score) else -t.score)
    measured = sum(k is not None for k in reached)
    best, reason = _decide(trials, len(batch), sum(right), measured)
    return ProbeChoice(best, reason, tuple(trials), len(batch), sum(right), measured)


def answer_words(answer: Any) -> list[str]:
    """Return the accepted answers as texts, without white space around them.

    Raises:
        ValueError: if there is none, or one is blank.
        TypeError: if one is neither a text nor a number.
    """
    many = answer if isinstance(answer, (list, tuple)) else [answer]
    for one in many:
        if isinstance(one, bool) or not isinstance(one, (str, int, float)):
            raise TypeError(f"answers: expected texts and numbers, got {describe(one)}")
    texts = [str(one).strip() for one in many]
    if not texts or not all(texts):
        raise ValueError(f"answers: expected a text that is not blank, or several, got {answer!r}")
    return texts


def holds(text: str, answer: str) -> bool:
    """Whether a text has the answer as a word: no digit goes on with a number, no Latin letter with a word."""
    before, after = answer[0], answer[-1]
    left = r"(?<![\d.,])" if before.isdigit() else r"(?<![A-Za-z])" if before.isascii() and before.isalpha() else ""
    right = r"(?!\d|[.,]\d)" if after.isdigit() else r"(?![A-Za-z])" if after.isascii() and after.isalpha() else ""
    return re.search(left + re.escape(answer) + right, text) is not None


def _reached(tokenizer, batch: StepBatch, b: int, answers: list[str]) -> int | None:
    """Return the number of the first step that writes the answer, from 1; None where the question holds it already."""

    def read(ids: list[int]) -> bool:
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return any(holds(text, answer) for answer in answers)

    steps, so_far = batch.step_ids[b], []
    if not steps or read(list(batch.prompt_ids[b])):
        return None
    for k, step in enumerate(steps, 1):
        so_far += step
        if read(so_far):
            return k
    return len(steps)  # a grader accepts other spellings


def _trial(
    name: str, probe: Probe, values: list[list[float]], right: list[bool], reached: list[int | None]
) -> ProbeTrial:
    known = [(v, k) for v, k in zip(values, reached, strict=True) if k is not None]
    last = [v[-2] if len(v) > 1 else v[-1] for v in values]  # what comes after the last step is not asked in training
    asked = [x for v in values for x in v[:-1]]
    return ProbeTrial(
        name, probe,
        before=_mean([x for v, k in known for x in v[:k]]), after=_mean([x for v, k in known for x in v[k:]]),
        auc=auc([x for x, ok in zip(last, right, strict=True) if ok],
                [x for x, ok in zip(last, right, strict=True) if not ok]),
        near_zero=_mean([float(x < NEAR_ZERO) for x in asked]),
    )  # fmt: skip


def _decide(trials: Sequence[ProbeTrial], completions: int, right: int, measured: int) -> tuple[str | None, str]:
    """The name of the best probe, if there is one, and why."""
    if not measured:
        why = f"none of {completions} completions is right" if not right else "every question holds its answer already"
        return None, f"Take none yet: {why}. Easier prompts, more or longer completions, or another grader may help."
    best = trials[0]
    if best.rise < LEAST_RISE or best.near_zero == 1:
        most = max(trials, key=lambda t: t.rise)
        return None, (
            f"Take none of these: no value rises by {LEAST_RISE:g} when the answer is reached, or all are near zero "
            f"before the last step (most: {most.rise:.4f}, {most.name!r}). Try texts of your own, graded values "
            "(mode='graded') or logarithms (reduce='logprob')."
        )
    aside = "" if math.isnan(best.auc) else f" Before the last step it tells right from wrong with AUC {best.auc:.2f}."
    return best.name, (
        f"Take {best.name!r}: its value rises from {best.before:.3f} to {best.after:.3f} when the answer is reached "
        f"(in {measured} right completions of {completions}), and {1 - best.near_zero:.0%} of its values are not near "
        f"zero, the best score of {len(trials)}.{aside}"
    )


def auc(high: Sequence[float], low: Sequence[float]) -> float:
    """Return the chance that one of `high` is above one of `low`, where a tie counts one half; NaN for none."""
    if not high or not low:
        return math.nan
    difference = torch.tensor(high, dtype=torch.float64)[:, None] - torch.tensor(low, dtype=torch.float64)
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
