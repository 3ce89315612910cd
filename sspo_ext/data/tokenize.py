# SPDX-License-Identifier: Apache-2.0
"""From a preference row to token ids, labels, step ids and the pairs of steps to compare."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

from .._checks import check_choice, check_count, describe
from ..signals.pairing.pairs import divergence_index
from ..signals.split import SplitBy, split_text, token_step_ids
from .chat import COLUMNS, chat_options
from .encode import TooLong, UnusableRow, check_bound, encode_prompt, encode_response, response_text
from .length import LengthBound
from .reading import name_some, raise_bad_rows
from .rows import check_branch
from .special import SpecialTokens

logger = logging.getLogger(__name__)

PAIR_BY = ("index", "branch", "sequence")

OVERFLOW = ("drop", "cut", "error")

TOKEN_WEIGHTS = ("uniform", "divergence")


def tokenize_row(
    row: Mapping,
    tokenizer,
    *,
    split_by: SplitBy = "newline",
    pair_by: str = "index",
    max_length: int | None = None,
    overflow: str = "drop",
    add_eos: bool = True,
    skip_shared: bool = True,
    token_weights: str = "uniform",
    chat_template_kwargs: Mapping | None = None,
    special_tokens: str = "error",
) -> dict:
    """Tokenize one row of `load_preference_rows` for `StepPreferenceCollator`.

    Prompt and response are tokenized as one text if this leaves the prompt's tokens as they are alone, because the
    model sees those before it writes. Otherwise a token spans the border, and each is tokenized alone. Special tokens
    that the tokenizer puts first come first; a chat template writes its own. With a chat template, the response is all
    that the template adds, up to the end of the turn. With `partial` or without `add_eos` it ends with the content's
    last character. A prompt that ends in words of the assistant is continued: the response goes on in the same turn.

    Args:
        row: {"prompt", "chosen", "rejected"} and the optional keys of `load_preference_rows`.
        tokenizer: a fast tokenizer of transformers, whose offsets place the steps. It needs a chat template if the
            prompt is a list of messages.
        split_by: how a text becomes steps, see `split_text`. A list of steps is taken as it is.
        pair_by: "index": step k against step k; steps without a partner are left out. "branch": only the first step
            that differs. "sequence": the whole response is one step (DPO). A row with a `branch` compares that step
            alone, unless "sequence". Both responses have the same tokens before it: if a token spans the border, the
            step begins where the tokens part.
        max_length: most tokens of the prompt and the scored part of the response.
        overflow: what happens to a row over `max_length`. "drop": UnusableRow. "cut": pairs are left out whose steps
            do not fit whole; UnusableRow if none fits. "error": ValueError. Prompts and steps are never shortened.
        add_eos: append the end of sequence to each response that is not `partial`. It belongs to the last step.
        skip_shared: "index" only: leave out leading steps that have the same tokens in both responses. Their contexts
            are the same too, so their difference and its gradient are 0 for every model. They would only dilute the
            mean.
        token_weights: "uniform": all tokens of a step count. "divergence": only the first token counts in which the
            two steps differ, so a pair compares two logits of one position. The steps must follow the same tokens:
            `pair_by` "branch" or "sequence", or a row with a `branch`.
        chat_template_kwargs: options of the chat template, such as {"enable_thinking": False}. A row's own, in its
            columns "chat_template_kwargs" and "tools", come before these.
        special_tokens: what happens to a row with a text that spells a special token, such as "<|im_end|>". "error":
            ValueError. "allow": the tokenizer makes the token of it, as it must for prompts that a template wrote
            beforehand. The tokenizer's own first tokens of a prompt and an end of sequence after a response that is no
            chat are always taken for what they are.

    Returns:
        {"chosen_input_ids", "chosen_labels", "chosen_step_ids", "rejected_input_ids", "rejected_labels",
        "rejected_step_ids": lists of int, of equal length within a response; "pairs": [[chosen step, rejected step],
        ...]; "weight", "margin", "source"}. Labels are not shifted. Only steps in a pair are scored, and they are
        numbered 0, 1, 2, ...; all other tokens have label -100 and step id -1. Tokens after the last scored one are
        left out: a causal model's scores do not depend on them.

    Raises:
        UnusableRow: the row leaves nothing to compare.
        ValueError: an option or a value of the row does not fit.
        TypeError: the tokenizer is not a fast one.

    Examples:
        >>> from sspo_ext.data.tokenize import tokenize_row
        >>> row = {"prompt": "6 + 13 = ", "chosen": "19", "rejected": "18"}
        >>> tokenize_row(row, tokenizer, pair_by="sequence")["pairs"]
        [[0, 0]]
    """
    options = _Options(
        split_by, pair_by, max_length, overflow, add_eos, skip_shared, token_weights, chat_template_kwargs,
        special_tokens,
    )  # fmt: skip
    return _Tokenizing(tokenizer, options).feature(row)[0]


def tokenize_rows(rows: Iterable[Mapping], tokenizer, **options: Any) -> list[dict]:
    """Apply `tokenize_row` to all rows.

    Unusable rows are left out. One warning counts them by reason and names some.

    Args:
        rows: of `load_preference_rows`.
        tokenizer: as for `tokenize_row`.
        **options: of `tokenize_row`.

    Returns:
        The features of each usable row, in order.

    Raises:
        ValueError: an option does not fit, some rows are wrong (the message names each), or no row is left.
        TypeError: an unknown option, or a tokenizer that is not a fast one.
    """
    tokenizing = _Tokenizing(tokenizer, _Options(**options))
    if isinstance(rows, str | Mapping):
        raise TypeError(f"rows: expected the rows that load_preference_rows returns, got {describe(rows)}")
    features, bad = [], []
    left_out: dict[str, list[str]] = defaultdict(list)
    cut: list[str] = []
    total = 0
    for total, row in enumerate(rows, 1):  # noqa: B007
        where = (row.get("source") if isinstance(row, Mapping) else None) or f"row {total - 1}"
        try:
            feature, num_cut = tokenizing.feature(row)
            features.append(feature)
            cut += [where] if num_cut else []
        except UnusableRow as reason:
            left_out[str(reason)].append(where)
        except ValueError as error:
            bad.append((where, str(error)))
    raise_bad_rows(bad, total)
    reasons = [f"{len(names)} {reason} ({name_some(names)})" for reason, names in left_out.items()]
    if reasons:
        logger.warning("%d of %d rows are left out: %s", total - len(features), total, "; ".join(reasons))
    if cut:
        logger.warning("%d of %d rows lose steps over max_length (%s)", len(cut), total, name_some(cut))
    if not features:
        raise ValueError(
            f"rows: nothing to train on is left of {total} rows: {'; '.join(reasons) or 'there were none'}"
        )
    return features


@dataclass(frozen=True)
class _Options:
    """The options of `tokenize_row`."""

    split_by: SplitBy = "newline"
    pair_by: str = "index"
    max_length: int | None = None
    overflow: str = "drop"
    add_eos: bool = True
    skip_shared: bool = True
    token_weights: str = "uniform"
    chat_template_kwargs: Mapping | None = None
    special_tokens: str = "error"

    def __post_init__(self) -> None:
        check_choice("pair_by", self.pair_by, PAIR_BY)
        check_choice("overflow", self.overflow, OVERFLOW)
        check_choice("token_weights", self.token_weights, TOKEN_WEIGHTS)
        split_text("", self.split_by)
        if self.max_length is not None:
            check_count("max_length", self.max_length)


class _Response(NamedTuple):
    ids: list[int]
    steps: list[int]  # of each token: the index of its step in the text
    dense: list[int]  # of each token: its step among those that own a token

    @classmethod
    def of(cls, ids: list[int], steps: list[int]) -> _Response:
        number = {step: n for n, step in enumerate(dict.fromkeys(steps))}
        return cls(ids, steps, [number[step] for step in steps])

    def at(self, step: int) -> list[int]:
        return [i for i, s in zip(self.ids, self.steps, strict=True) if s == step]


class _Pair(NamedTuple):
    """Chosen and rejected response."""

    chosen: _Response
    rejected: _Response


class _Tokenizing:
    """Tokenizes rows; what the tokenizer alone decides is found once."""

    def __init__(self, tokenizer, options: _Options):
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(
                f"tokenizer: expected a fast one, whose offsets place the steps, got {type(tokenizer).__name__}"
            )
        self.tokenizer, self.options = tokenizer, options
        self.special = SpecialTokens(tokenizer, options.special_tokens)
        # with overflow="error" the message says how long a row is
        self.bound = LengthBound(tokenizer, None if options.overflow == "error" else options.max_length)

    def feature(self, row: Mapping) -> tuple[dict, int]:
        """The features, and how many pairs were cut away."""
        _check_form(row)
        self.special.check_prompt(row["prompt"], **{name: row[name] for name in COLUMNS if name in row})
        for name in _Pair._fields:
            self.special.check_response(name, row[name], chat=not isinstance(row["prompt"], str))
        return _tokenize(row, self.tokenizer, self.options, self.bound)


def _check_form(row: Any) -> None:
    """ValueError unless the row has the form that `load_preference_rows` gives it."""
    hint = "load_preference_rows brings rows into this form"
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a mapping with prompt, chosen and rejected, got {describe(row)}; {hint}")
    missing = [name for name in ("prompt", *_Pair._fields) if row.get(name) is None]
    if missing:
        raise ValueError(f"expected prompt, chosen and rejected, got no {missing[0]}; {hint}")
    if not isinstance(row["prompt"], str | Sequence):
        raise ValueError(f"prompt: expected a text or chat messages, got {describe(row['prompt'])}")
    for name in _Pair._fields:
        steps = [row[name]] if isinstance(row[name], str) else row[name]
        if not isinstance(steps, Sequence) or not steps or not all(isinstance(step, str) for step in steps):
            raise ValueError(f"{name}: expected a text or a list of steps, got {describe(row[name])}; {hint}")


def _tokenize(row: Mapping, tokenizer, options: _Options, bound: LengthBound) -> tuple[dict, int]:
    prompt_ids, sides = _encode_sides(row, tokenizer, options, bound)
    branch = row.get("branch")
    if options.pair_by == "sequence":
        sides = _Pair(*(side._replace(dense=[0] * len(side.ids)) for side in sides))
    pairs = _pairs(sides, options, branch)
    if options.token_weights == "divergence":
        if options.pair_by == "index" and branch is None:
            raise ValueError(
                "token_weights: 'divergence' needs steps that follow the same tokens: pair_by='branch' or 'sequence', "
                "or rows with a branch"
            )
        sides = _only_divergence(sides, pairs[0])
    fits = _fitting(sides, pairs, len(prompt_ids), options)
    feature: dict[str, Any] = {}
    for name, side, kept in zip(_Pair._fields, sides, zip(*fits, strict=True), strict=True):
        feature |= _features(name, prompt_ids, side, kept)
    feature["pairs"] = [[k, k] for k in range(len(fits))]  # renumbered, and each step is in one pair
    feature |= {"weight": row.get("weight", 1.0), "margin": row.get("margin", 0.0), "source": row.get("source")}
    return feature, len(pairs) - len(fits)


def _encode_sides(row: Mapping, tokenizer, options: _Options, bound: LengthBound) -> tuple[list[int], _Pair]:
    """The tokens of the prompt, and both responses."""
    finish = options.add_eos and not row.get("partial", False)
    template = chat_options(row, options.chat_template_kwargs)
    prompt = encode_prompt(row["prompt"], tokenizer, template, bound)
    sides, texts, starts = [], [], []
    branch = row.get("branch")
    for name in _Pair._fields:
        text, edges, end = response_text(
            row["prompt"], prompt.text, row[name], tokenizer, options.split_by, finish, template
        )
        check_bound(bound, text[: _surely_scored(edges, branch, options)])
        ids, offsets = encode_response(tokenizer, prompt, text)
        if end:
            if tokenizer.eos_token_id is None:
                raise ValueError("add_eos: the tokenizer has no end-of-sequence token; pass add_eos=False")
            if ids[-1] != tokenizer.eos_token_id:
                ids, offsets = [*ids, tokenizer.eos_token_id], [*offsets, (0, 0)]
        spans = list(pairwise(edges))
        sides.append(_Response.of(ids, token_step_ids(text, offsets, spans, dense=False)))
        texts.append([text[a:b] for a, b in spans])
        if branch is not None and branch < len(spans):
            starts.append(_first_token(sides[-1].steps, offsets, branch, spans[branch][0]))
    pair = _Pair(*sides)
    if branch is not None:
        check_branch(branch, *texts)
        pair = _from_branch(pair, branch, min(starts))
        if pair.chosen.at(branch) == pair.rejected.at(branch) != []:
            one, other = (text[branch] for text in texts)
            how = "is the same" if one == other else "has the same tokens"
            what = "" if one == other else f", {one!r} and {other!r}"
            raise ValueError(f"branch: step {branch} {how} in chosen and rejected{what}")
    return prompt.ids, pair


def _surely_scored(edges: Sequence[int], branch: int | None, options: _Options) -> int:
    """The characters before which every pair of the row is surely not over."""
    if options.token_weights != "uniform":  # a pair ends with its one token
        return 0
    if options.pair_by == "sequence":
        return edges[-1]
    return edges[min(branch or 0, len(edges) - 2) + 1]


def _first_token(steps: Sequence[int], offsets: Sequence[tuple[int, int]], branch: int, at: int) -> int:
    """The first token with text of the step `branch`, which begins at the character `at`."""
    found = (i for i, (step, (_, end)) in enumerate(zip(steps, offsets, strict=True)) if step >= branch or end > at)
    return next(found, len(steps))


def _from_branch(sides: _Pair, branch: int, start: int) -> _Pair:
    """Both responses, with the step `branch` from `start` on, or from where the tokens part if that is before.

    A token over the border of the shared steps would else stand in the context of one response alone, and be scored in
    none.
    """
    parted = divergence_index(*(side.ids for side in sides))
    start = start if parted is None else min(start, parted)
    return _Pair(
        *(_Response.of(s.ids, [*s.steps[:start], *(max(step, branch) for step in s.steps[start:])]) for s in sides)
    )


def _fitting(
    sides: _Pair, pairs: list[tuple[int, int]], prompt_length: int, options: _Options
) -> list[tuple[int, int]]:
    """The pairs whose steps end within `max_length`."""
    if options.max_length is None:
        return pairs
    ends = [{step: prompt_length + i + 1 for i, step in enumerate(side.dense)} for side in sides]
    lengths = [max(ends[0][c], ends[1][r]) for c, r in pairs]
    fits = [pair for pair, length in zip(pairs, lengths, strict=True) if length <= options.max_length]
    if len(fits) < len(pairs) and (options.overflow != "cut" or not fits):
        if options.overflow == "error":
            raise ValueError(f"max_length: {max(lengths)} tokens are more than {options.max_length}")
        raise TooLong(options.max_length)
    return fits


def _features(name: str, prompt_ids: list[int], side: _Response, kept: Sequence[int]) -> dict[str, list[int]]:
    """Ids, labels and step ids of one response, up to the end of its last kept step."""
    number = {step: n for n, step in enumerate(kept)}
    steps = [number.get(step, -1) for step in side.dense]
    steps = steps[: max(i for i, step in enumerate(steps) if step >= 0) + 1]
    ids = side.ids[: len(steps)]
    labels = [i if s >= 0 else -100 for i, s in zip(ids, steps, strict=True)]
    return {
        f"{name}_input_ids": prompt_ids + ids,
        f"{name}_labels": [-100] * len(prompt_ids) + labels,
        f"{name}_step_ids": [-1] * len(prompt_ids) + steps,
    }


def _pairs(sides: _Pair, options: _Options, branch: int | None) -> list[tuple[int, int]]:
    """The steps to compare, numbered as in `dense`."""
    if options.pair_by == "sequence":
        return [(0, 0)]
    chosen, rejected = sides
    if branch is not None:
        if branch not in chosen.steps or branch not in rejected.steps:
            raise UnusableRow("with a step at the branch that has no token of its own")
        return [(chosen.dense[chosen.steps.index(branch)], rejected.dense[rejected.steps.index(branch)])]
    both = list(zip(_by_step(chosen), _by_step(rejected), strict=False))
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
    if shared == len(both):
        raise UnusableRow("where one response is the beginning of the other")
    if options.pair_by == "branch":
        return [(shared, shared)]
    return [(k, k) for k in range(shared if options.skip_shared else 0, len(both))]


def _only_divergence(sides: _Pair, pair: tuple[int, int]) -> _Pair:
    """Both responses, with the pair's steps reduced to the first token in which they differ."""
    chosen, rejected = sides
    places = [[i for i, s in enumerate(side.dense) if s == k] for side, k in zip(sides, pair, strict=True)]
    at = divergence_index([chosen.ids[i] for i in places[0]], [rejected.ids[i] for i in places[1]])
    if at is None:
        raise UnusableRow("where one step is the beginning of the other")
    if chosen.ids[: places[0][0]] != rejected.ids[: places[1][0]]:
        raise UnusableRow("whose steps part earlier")

    def reduced(side: _Response, some: list[int], k: int) -> _Response:
        return side._replace(dense=[-2 if s == k and i != some[at] else s for i, s in enumerate(side.dense)])

    return _Pair(*(reduced(*each) for each in zip(sides, places, pair, strict=True)))


def _by_step(side: _Response) -> list[list[int]]:
    steps: list[list[int]] = [[] for _ in range(side.dense[-1] + 1)]
    for i, step in zip(side.ids, side.dense, strict=True):
        steps[step].append(i)
    return steps
