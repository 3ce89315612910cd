# SPDX-License-Identifier: Apache-2.0
"""Candidates for the next step that a model itself would take, with values: the source of step preferences."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from ..._checks import check_choice, check_count, check_not_negative
from ..branches.branch import Branch, Trunks
from ..branches.sample import sample_branches
from ..branches.score import branch_logps
from ..probing.likelihood import likelihood_values
from ..probing.states import States, special_ids
from ..probing.texts import AnyProbe
from ..split import SplitBy, split_text
from ..values import StepBatch
from .node import Candidate, Node, best_first, text_after

VALUES = ("continuation", "probe", "both")


@dataclass(frozen=True, kw_only=True)
class CandidateOptions:
    """The options of `trace_candidates`, which documents them.

    Making one raises ValueError or TypeError for a value that does not fit; `engine`, `max_tokens` and `seed` are
    checked when they are used.
    """

    num_candidates: int = 12
    value: str = "continuation"
    gamma: float = 0.9
    probe_share: float = 0.5
    split_by: SplitBy = "newline"
    final: str | re.Pattern | None = None
    max_step_tokens: int = 96
    max_continuation_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    engine: str = "auto"
    max_tokens: int = 8192

    def __post_init__(self) -> None:
        check_choice("value", self.value, VALUES)
        for name in ("gamma", "probe_share"):
            number = getattr(self, name)
            check_not_negative(name, number)
            if number > 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {number!r}")
        check_count("num_candidates", self.num_candidates)
        check_count("max_step_tokens", self.max_step_tokens)
        check_count("max_continuation_tokens", self.max_continuation_tokens)
        check_not_negative("temperature", self.temperature)
        step_end(self.split_by)
        try:
            re.compile(self.final or "")
        except re.error as error:
            raise ValueError(f"final: {self.final!r} is no regular expression: {error}") from error

    @property
    def sampler(self) -> str:
        """The engine that samples: "packed" only scores."""
        return "auto" if self.engine == "packed" else self.engine


def trace_candidates(
    model: nn.Module,
    tokenizer,
    batch: StepBatch,
    answers: Sequence[Any],
    *,
    states: Sequence[tuple[int, int]] | None = None,
    num_candidates: int = 12,
    value: str = "continuation",
    gamma: float = 0.9,
    grader: Callable[[str, Any], float] | None = None,
    probe: AnyProbe = "en",
    probe_share: float = 0.5,
    split_by: SplitBy = "newline",
    final: str | re.Pattern | None = None,
    max_step_tokens: int = 96,
    max_continuation_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    engine: str = "auto",
    max_tokens: int = 8192,
) -> list[Node]:
    r"""Sample candidates for the next step at every state, and compute their values and log-probs.

    At a state (a question with some steps) a few next steps are sampled and equal texts are merged. Candidates are
    compared only if they follow the same state. Whether and how SSPO's authors rank steps is not public: all of this is
    our reconstruction.

    Args:
        model: any Hugging Face causal LM, wrapped or not.
        tokenizer: its tokenizer.
        batch: B sequences, as for `probe_step_values`.
        answers: B gold answers, as for `probe_step_values`.
        states: (sequence, number of steps before) of each state. None means every state that a step of the batch
            follows, and the question of a sequence without steps.
        num_candidates: steps sampled at each state. A step that is empty, or that does not end within
            `max_step_tokens`, is dropped.
        value: what a candidate is worth.

            * "continuation": gamma ** n * reward, where the reward is the grade of the whole response and n is the
              number of steps in which the model's greedy continuation ends. A step that ends the response has the
              reward itself. A continuation that does not end within `max_continuation_tokens` has value 0.
            * "probe": the likelihood of the gold answer after the step, see `probe_step_values`.
            * "both": probe_share * "probe" + (1 - probe_share) * "continuation".
        gamma: with "continuation" and "both", the discount of a step, in [0, 1].
        grader: with "continuation" and "both", grader(text of the response, gold answer) -> finite reward.
        probe: with "probe" and "both", the probe.
        probe_share: with "both", the share of the probe, in [0, 1].
        split_by: where a step ends, as for `split_text`. Not "numbered", which shows only where the next one starts.
        final: a regular expression, or None. A response that it matches is complete, even without end of sequence.
        max_step_tokens: the largest number of tokens of a candidate.
        max_continuation_tokens: the largest number of tokens of a continuation.
        temperature: the temperature at which candidates are sampled.
        seed: the seed of the random numbers.
        engine: how states are computed: "auto", "packed", "cached" or "separate", see `branch_logps`. Sampling uses
            "auto" in place of "packed", which only scores.
        max_tokens: the budget of one forward in tokens.

    Returns:
        One node for each state, in their order. Its candidates are sorted by value, the best first.

    Raises:
        ValueError: if an argument does not fit, or a reward or probability is not finite.
        TypeError: if an argument has the wrong type.

    Examples:
        >>> batch = StepBatch([tokenizer("6 + 13 + 7 = ?\n").input_ids], [[]])
        >>> nodes = trace_candidates(
        ...     model, tokenizer, batch, ["26"], grader=lambda text, answer: float(answer in text),
        ...     num_candidates=2, max_step_tokens=8, max_continuation_tokens=8,
        ... )
        >>> pairs = pair_candidates(nodes)
    """
    options = CandidateOptions(
        num_candidates=num_candidates, value=value, gamma=gamma, probe_share=probe_share, split_by=split_by,
        final=final, max_step_tokens=max_step_tokens, max_continuation_tokens=max_continuation_tokens,
        temperature=temperature, seed=seed, engine=engine, max_tokens=max_tokens,
    )  # fmt: skip
    return _trace(model, tokenizer, batch, answers, states, grader, probe, options)


class _Found(NamedTuple):
    """A sampled candidate, and where it was found."""

    place: int  # of its node among the nodes
    node: Node
    candidate: Candidate
    branch: Branch


class _Texts:
    """The texts of a model's tokens, and where they end."""

    def __init__(self, model: nn.Module, tokenizer, options: CandidateOptions):
        self.tokenizer = tokenizer
        self.special = special_ids(model, tokenizer)
        self.step_ended = step_end(options.split_by)
        self.final = re.compile(options.final) if isinstance(options.final, str) else options.final

    def plain(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return the token ids without special tokens."""
        return tuple(i for i in ids if i not in self.special)

    def of(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self.tokenizer.decode(list(self.plain(ids)), clean_up_tokenization_spaces=False)

    def closed(self, ids: Sequence[int]) -> bool:
        """Tell whether the model ended its turn with these tokens."""
        return len(ids) > 0 and ids[-1] in self.special

    def complete(self, ids: Sequence[int]) -> bool:
        """Tell whether the text of these tokens matches `final`."""
        return self.final is not None and self.final.search(self.of(ids)) is not None


def _trace(
    model: nn.Module,
    tokenizer,
    batch: StepBatch,
    answers: Sequence[Any],
    states: Sequence[tuple[int, int]] | None,
    grader: Callable[[str, Any], float] | None,
    probe: AnyProbe,
    options: CandidateOptions,
) -> list[Node]:
    """Run `trace_candidates` with its options in one object."""
    if options.value != "probe" and not callable(grader):
        raise ValueError(
            f"grader: expected a function of a response and its gold answer for {options.value!r}, got {grader!r}"
        )
    if len(answers) != len(batch):
        raise ValueError(f"answers: expected one for each of {len(batch)} sequences, got {len(answers)}")
    states = _checked_states(batch, states)
    texts = _Texts(model, tokenizer, options)
    trunks = [batch.sequence(b) for b in range(len(batch))]
    starts = [Branch(b, batch.boundaries(b)[k], ()) for b, k in states]
    nodes = _sample(model, trunks, states, starts, texts, options)
    found = [
        _Found(n, node, c, start._replace(ids=c.ids))
        for n, (node, start) in enumerate(zip(nodes, starts, strict=True))
        for c in node.candidates
    ]
    scored = branch_logps(
        model, trunks, [f.branch for f in found], engine=options.engine, max_tokens=options.max_tokens
    )
    values, rest = [0.0] * len(found), [None] * len(found)
    if options.value != "probe":
        values, rest = _continue(model, trunks, batch, answers, found, texts, grader, options)
    if options.value != "continuation":
        at = [(f.node.sequence, f.node.step, f.candidate.ids) for f in found]
        probed = likelihood_values(
            model, States(model, batch, probe, tokenizer, at), answers, reduce="joint", engine=options.engine,
            max_tokens=options.max_tokens,
        ).tolist()  # fmt: skip
        if not all(map(math.isfinite, probed)):
            raise ValueError("model: expected a probability of the answer after every candidate, got NaN")
        share = 1.0 if options.value == "probe" else options.probe_share
        values = [share * p + (1 - share) * v for p, v in zip(probed, values, strict=True)]
    done: list[list[Candidate]] = [[] for _ in nodes]
    for f, v, logp, text in zip(found, values, scored.sums().tolist(), rest, strict=True):
        done[f.place].append(replace(f.candidate, value=v, logp=logp, continuation=text))
    return [replace(node, candidates=best_first(some)) for node, some in zip(nodes, done, strict=True)]


def _checked_states(batch: StepBatch, states: Sequence[tuple[int, int]] | None) -> Sequence[tuple[int, int]]:
    if states is None:
        return [(b, k) for b, steps in enumerate(batch.step_ids) for k in range(max(len(steps), 1))]
    for b, k in states:
        if not 0 <= b < len(batch) or not 0 <= k <= len(batch.step_ids[b]):
            raise ValueError(
                f"states: expected (sequence, number of its steps) of {len(batch)} sequences, got {(b, k)}"
                + (f", which has {len(batch.step_ids[b])} steps" if 0 <= b < len(batch) else "")
            )
    return states


def _sample(
    model: nn.Module,
    trunks: Trunks,
    states: Sequence[tuple[int, int]],
    starts: Sequence[Branch],
    texts: _Texts,
    options: CandidateOptions,
) -> list[Node]:
    """Sample next steps at every state, and merge equal texts."""
    sampled = sample_branches(
        model, trunks, starts, options.num_candidates, max_new_tokens=options.max_step_tokens,
        stop=lambda ids: texts.step_ended(texts.of(ids)), eos_token_ids=sorted(texts.special),
        temperature=options.temperature, seed=options.seed, engine=options.sampler, max_tokens=options.max_tokens,
    )  # fmt: skip
    nodes = []
    for (b, k), start, rows in zip(states, starts, sampled, strict=True):
        merged: dict[str, Candidate] = {}
        for ids in rows:
            text, closed = texts.of(ids), texts.closed(ids)
            if not text.strip() or not (closed or texts.step_ended(text)):
                continue
            written = text_after(texts.tokenizer, texts.plain(trunks[b][: start.cut]), texts.plain(ids))
            new = Candidate(texts.plain(ids), text.strip(), 1, closed or texts.complete(ids), written=written)
            old = merged.get(new.text)
            if old is not None:
                new = replace(old, count=old.count + 1, ended=old.ended or new.ended)
            merged[new.text] = new
        nodes.append(Node(b, k, tuple(merged.values())))
    return nodes


def _continue(
    model: nn.Module,
    trunks: Trunks,
    batch: StepBatch,
    answers: Sequence[Any],
    found: Sequence[_Found],
    texts: _Texts,
    grader: Callable[[str, Any], float] | None,
    options: CandidateOptions,
) -> tuple[list[float], list[str]]:
    """Continue every candidate greedily; return the values and texts of the continuations."""
    assert grader is not None
    unfinished = [i for i, f in enumerate(found) if not f.candidate.ended]
    rest: list[list[int]] = [[] for _ in found]
    sampled = sample_branches(
        model, trunks, [found[i].branch for i in unfinished], 1, max_new_tokens=options.max_continuation_tokens,
        stop=texts.complete, eos_token_ids=sorted(texts.special), temperature=0.0, engine=options.sampler,
        max_tokens=options.max_tokens,
    )  # fmt: skip
    for i, (ids,) in zip(unfinished, sampled, strict=True):
        rest[i] = ids
    values = []
    for f, ids in zip(found, rest, strict=True):
        if not (f.candidate.ended or texts.closed(ids) or texts.complete(ids)):
            values.append(0.0)
            continue
        b, k = f.node.sequence, f.node.step
        before = [token for step in batch.step_ids[b][:k] for token in step]
        response = texts.of([*before, *f.candidate.ids, *ids])
        reward = float(grader(response, answers[b]))
        if not math.isfinite(reward):
            raise ValueError(f"grader: expected a finite number, got {reward} for the response {response!r}")
        values.append(options.gamma ** len(split_text(texts.of(ids).strip(), options.split_by)) * reward)
    return values, [texts.of(ids) for ids in rest]


def step_end(split_by: SplitBy) -> Callable[[str], bool]:
    """Make a function that tells whether a step's text, while it is written, has come to its end."""
    split_text("", split_by)  # checks the name or expression
    if split_by == "numbered":
        raise ValueError("split_by: 'numbered' shows where a step starts, never that one has ended")
    if split_by in ("newline", "blank_line"):
        pattern = re.compile(r"\S[^\n]*\n" if split_by == "newline" else r"\S[\s\S]*\n[ \t\r\f\v]*\n")
        return lambda text: pattern.search(text) is not None
    pattern = re.compile(split_by)
    return lambda text: any(match.end() > 0 for match in pattern.finditer(text))
