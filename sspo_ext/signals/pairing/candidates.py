"""Next steps that a model itself would take, ranked by what becomes of them: the source of step preferences.

At a state (a question and some steps) a few next steps are sampled, equal texts are merged, and each is ranked by what
it is worth: what comes of it when the model goes on greedily, what a probe after it says, or both. Two steps are only
ever compared after the very same state. How SSPO's authors rank steps, and whether they do, is not public: all of this
is our reconstruction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..._checks import check_choice, check_count, check_not_negative, check_shape
from ..branches.branch import Branch
from ..branches.sample import sample_branches
from ..branches.score import branch_logps
from ..probing.likelihood import likelihood_values
from ..probing.states import States, special_ids
from ..probing.texts import AnyProbe
from ..split import SplitBy, split_text
from ..values import StepBatch

VALUES = ("continuation", "probe", "both")


@dataclass(frozen=True)
class Candidate:
    """A next step. `text` is without white space around it; equal texts are one candidate."""

    ids: tuple[int, ...]  # without special tokens
    text: str
    count: int  # how often it was sampled, or found
    ended: bool  # the model ended its turn, or the response was complete, with this step
    value: float = float("nan")
    logp: float | None = None  # of all its tokens, by the model that was traced
    continuation: str | None = None  # the greedy rest of the response


@dataclass(frozen=True)
class Node:
    """A state, the first `step` steps of a sequence, and what may follow it."""

    sequence: int
    step: int
    candidates: tuple[Candidate, ...]


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
    """Candidates for the next step at every state, with their values and log-probs.

    Args:
        model, tokenizer: any Hugging Face causal LM.
        batch, answers: sequences and the gold answer of each, as for `probe_step_values`.
        states: (sequence, number of steps before) of each state; None: every state that a step follows, and the
            question of a sequence without steps.
        num_candidates: samples at each state, at `temperature`. One that is empty or did not end within
            `max_step_tokens` is dropped.
        value: "continuation": gamma ** (steps until the greedy continuation ends) * reward of the whole response, so
            a step that ends the response has the reward itself; a continuation that does not end within
            `max_continuation_tokens` has 0. "probe": likelihood of the gold answer after the step. "both": of the
            latter the `probe_share`, the rest of the former.
        grader: grader(text of the response, gold answer) -> reward; for "continuation" and "both".
        split_by: where steps end, as for `split_text`; not "numbered", which shows only after a step.
        final: a regular expression; a response whose text it matches is complete, even without end of sequence.
        seed, engine, max_tokens: of sampling and scoring.

    Returns one Node for each state, in order; candidates by value, the best first.

    Raises ValueError or TypeError naming the argument that does not fit.
    """
    check_candidate_options(
        value=value, num_candidates=num_candidates, gamma=gamma, probe_share=probe_share, split_by=split_by,
        final=final, max_step_tokens=max_step_tokens, max_continuation_tokens=max_continuation_tokens,
        temperature=temperature,
    )  # fmt: skip
    if value != "probe" and not callable(grader):
        raise ValueError(f"grader: expected a function of a response and its gold answer for {value!r}, got {grader!r}")
    if len(answers) != len(batch):
        raise ValueError(f"answers: expected one for each of {len(batch)} sequences, got {len(answers)}")
    if states is None:
        states = [(b, k) for b, steps in enumerate(batch.step_ids) for k in range(max(len(steps), 1))]
    for b, k in states:
        if not 0 <= b < len(batch) or not 0 <= k <= len(batch.step_ids[b]):
            raise ValueError(
                f"states: expected (sequence, number of its steps) of {len(batch)} sequences, got {(b, k)}"
                + (f", which has {len(batch.step_ids[b])} steps" if 0 <= b < len(batch) else "")
            )
    sampler = "auto" if engine == "packed" else engine  # which only scores
    found = _sample(
        model, tokenizer, batch, states, num_candidates, split_by, final, max_step_tokens, temperature, seed, sampler,
        max_tokens,
    )  # fmt: skip
    flat = [(n, c) for n, node in enumerate(found) for c in node.candidates]
    trunks = [batch.sequence(b) for b in range(len(batch))]
    cuts = [batch.boundaries(b)[k] for b, k in states]
    branches = [Branch(states[n][0], cuts[n], c.ids) for n, c in flat]
    scores = {"engine": engine, "max_tokens": max_tokens}
    logps = branch_logps(model, trunks, branches, **scores).sums().tolist()
    values = [0.0] * len(flat)
    rest: list[str | None] = [None] * len(flat)
    if value != "probe":
        values, rest = _continue(
            model, tokenizer, batch, answers, states, flat, branches, gamma, grader, split_by, final,
            max_continuation_tokens, sampler, max_tokens,
        )  # fmt: skip
    if value != "continuation":
        at = [(*states[n], c.ids) for n, c in flat]
        probed = likelihood_values(
            model, States(model, batch, probe, tokenizer, at), answers, reduce="joint", **scores
        ).tolist()
        if not all(map(math.isfinite, probed)):
            raise ValueError("model: expected a probability of the answer after every candidate, got NaN")
        share = 1.0 if value == "probe" else probe_share
        values = [share * p + (1 - share) * v for p, v in zip(probed, values, strict=True)]
    done: list[list[Candidate]] = [[] for _ in found]
    for (n, c), v, logp, text in zip(flat, values, logps, rest, strict=True):
        done[n].append(replace(c, value=v, logp=logp, continuation=text))
    return [
        replace(node, candidates=tuple(sorted(some, key=lambda c: -c.value)))
        for node, some in zip(found, done, strict=True)
    ]


def check_candidate_options(
    *,
    value: str = "continuation",
    num_candidates: int = 12,
    gamma: float = 0.9,
    probe_share: float = 0.5,
    split_by: SplitBy = "newline",
    final: str | re.Pattern | None = None,
    max_step_tokens: int = 96,
    max_continuation_tokens: int = 256,
    temperature: float = 1.0,
) -> None:
    """What `trace_candidates` can say of its options without a model."""
    check_choice("value", value, VALUES)
    for name, number in (("gamma", gamma), ("probe_share", probe_share)):
        check_not_negative(name, number)
        if number > 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {number!r}")
    check_count("num_candidates", num_candidates)
    check_count("max_step_tokens", max_step_tokens)
    check_count("max_continuation_tokens", max_continuation_tokens)
    check_not_negative("temperature", temperature)
    step_end(split_by)
    try:
        re.compile(final or "")
    except re.error as error:
        raise ValueError(f"final: {final!r} is no regular expression: {error}") from error


def nodes_from_rollouts(batch: StepBatch, step_advantages: Tensor, tokenizer) -> list[Node]:
    """States at which rollouts of one prompt part, with the steps they took and the mean advantage of each.

    batch            rollouts; those with the same prompt tokens may share states
    step_advantages  (S,) float, of `step_gae`: the value of a step is its mean over the rollouts that took it there

    Steps are compared only after the same tokens: prompt and all steps before. Where every rollout goes on with the
    same text there is no node. A text is one candidate, whether rollouts ended with it or went on: rows of pairs hold
    texts, and as two candidates it could be preferred to another text and that one to it. It counts as `ended`, and a
    row of it gets an end of sequence, only if every rollout ended there.

    Few rollouts meet beyond their first steps, and the mean of few is mostly luck: for training `trace_candidates` at
    chosen states serves better.
    """
    check_shape("step_advantages", step_advantages, (sum(map(len, batch.step_ids)),))
    advantages = iter(step_advantages.tolist())
    places: dict[tuple, dict[str, list]] = {}
    first: dict[tuple, tuple[int, int]] = {}
    for b, (prompt, steps) in enumerate(zip(batch.prompt_ids, batch.step_ids, strict=True)):
        key: tuple = (tuple(prompt),)
        for k, step in enumerate(steps):
            text = tokenizer.decode(step, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
            first.setdefault(key, (b, k))
            entry = places.setdefault(key, {}).setdefault(text, [tuple(step), True, []])
            entry[1] = entry[1] and k == len(steps) - 1
            entry[2].append(next(advantages))
            key = (*key, tuple(step))
    nodes = []
    for key, options in places.items():
        some = [
            Candidate(ids, text, len(of), ended, sum(of) / len(of))
            for text, (ids, ended, of) in options.items()
            if text
        ]
        if len(some) > 1:
            nodes.append(Node(*first[key], tuple(sorted(some, key=lambda c: -c.value))))
    return nodes


def _sample(
    model, tokenizer, batch, states, num_candidates, split_by, final, max_step_tokens, temperature, seed, engine,
    max_tokens,
) -> list[Node]:  # fmt: skip
    special = special_ids(model, tokenizer)
    ends = step_end(split_by)
    final = re.compile(final) if isinstance(final, str) else final

    def text_of(ids: Sequence[int]) -> str:
        plain = [i for i in ids if i not in special]
        return tokenizer.decode(plain, clean_up_tokenization_spaces=False)

    branches = [Branch(b, batch.boundaries(b)[k], ()) for b, k in states]
    sampled = sample_branches(
        model, [batch.sequence(b) for b in range(len(batch))], branches, num_candidates,
        max_new_tokens=max_step_tokens, stop=lambda ids: ends(text_of(ids)), eos_token_ids=sorted(special),
        temperature=temperature, seed=seed, engine=engine, max_tokens=max_tokens,
    )  # fmt: skip
    nodes = []
    for (b, k), rows in zip(states, sampled, strict=True):
        merged: dict[str, Candidate] = {}
        for ids in rows:
            text = text_of(ids)
            closed = ids[-1] in special
            if not text.strip() or not (closed or ends(text)):
                continue
            ended = closed or final is not None and final.search(text) is not None
            plain = tuple(i for i in ids if i not in special)
            old = merged.get(text.strip())
            new = Candidate(plain, text.strip(), 1, ended)
            merged[text.strip()] = new if old is None else replace(old, count=old.count + 1, ended=old.ended or ended)
        nodes.append(Node(b, k, tuple(merged.values())))
    return nodes


def _continue(
    model, tokenizer, batch, answers, states, flat, branches, gamma, grader, split_by, final, max_new_tokens, engine,
    max_tokens,
) -> tuple[list[float], list[str]]:  # fmt: skip
    special = special_ids(model, tokenizer)
    final = re.compile(final) if isinstance(final, str) else final
    open_ = [i for i, (_, c) in enumerate(flat) if not c.ended]

    def text_of(ids: Sequence[int]) -> str:
        return tokenizer.decode([i for i in ids if i not in special], clean_up_tokenization_spaces=False)

    def complete(ids: list[int]) -> bool:
        return final is not None and final.search(text_of(ids)) is not None

    rest: list[list[int]] = [[] for _ in flat]
    sampled = sample_branches(
        model, [batch.sequence(b) for b in range(len(batch))], [branches[i] for i in open_], 1,
        max_new_tokens=max_new_tokens, stop=complete, eos_token_ids=sorted(special), temperature=0.0, engine=engine,
        max_tokens=max_tokens,
    )  # fmt: skip
    for i, (ids,) in zip(open_, sampled, strict=True):
        rest[i] = ids
    values = []
    for (n, candidate), ids in zip(flat, rest, strict=True):
        b, k = states[n]
        if not (candidate.ended or ids and ids[-1] in special or complete(ids)):
            values.append(0.0)
            continue
        before = [token for step in batch.step_ids[b][:k] for token in step]
        response = text_of([*before, *candidate.ids, *ids])
        reward = float(grader(response, answers[b]))
        if not math.isfinite(reward):
            raise ValueError(f"grader: expected a finite number, got {reward} for the response {response!r}")
        values.append(gamma ** len(split_text(text_of(ids).strip(), split_by)) * reward)
    return values, [text_of(ids) for ids in rest]


def step_end(split_by: SplitBy) -> Callable[[str], bool]:
    """Whether a step's text, as it is being written, has come to its end."""
    split_text("", split_by)  # checks the name or expression
    if split_by == "numbered":
        raise ValueError("split_by: 'numbered' shows where a step starts, never that one has ended")
    if split_by in ("newline", "blank_line"):
        pattern = re.compile(r"\S[^\n]*\n" if split_by == "newline" else r"\S[\s\S]*\n[ \t\r\f\v]*\n")
        return lambda text: pattern.search(text) is not None
    pattern = re.compile(split_by)
    return lambda text: any(match.end() > 0 for match in pattern.finditer(text))
