# SPDX-License-Identifier: Apache-2.0
"""Chains of reasoning from JSONL: a prompt, a response in steps, and the right answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from .._checks import check_count, describe
from ..data.chat import COLUMNS, chat_columns, chat_options
from ..data.encode import TooLong, UnusableRow, check_bound, encode_prompt, encode_response, response_text
from ..data.graders import Grader, answer_texts, grade
from ..data.length import LengthBound
from ..data.reading import Source, parse_rows, raise_bad_rows
from ..data.rows import separate_steps
from ..data.special import SpecialTokens, check_unicode
from ..signals.split import SplitBy, token_step_ids
from ..signals.values import StepBatch


@dataclass(frozen=True)
class Chain:
    """A response, in text and in tokens. The texts of the steps concatenate to the response."""

    source: str  # the row's "id", or file:line
    prompt: str | list[dict]
    answer: str | list[str]
    reward: float  # of the whole response
    steps: list[str]
    prompt_ids: list[int]
    step_ids: list[list[int]]
    template: dict[str, Any] = field(default_factory=dict)  # columns of a row: what its chat template was given

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + sum(map(len, self.step_ids))


def load_chains(
    source: Source,
    tokenizer,
    *,
    split_by: SplitBy = "newline",
    max_length: int | None = None,
    grader: Grader | None = None,
    chat_template_kwargs: Mapping | None = None,
    special_tokens: str = "error",
) -> tuple[list[Chain], list[str]]:
    """Read, check and tokenize chains.

    A row is {"prompt": text or chat messages, "response": text or list of steps, "answer": a text, a number or a list
    of accepted ones}. Optional keys: "id"; "reward", a number in [0, 1], the scale of values, or "is_correct", a bool;
    "tools" and "chat_template_kwargs", the row's options of the chat template. Without a reward the `grader` gives it.
    A response of null or "" has no steps.

    Tokens are those of `tokenize_row`, without an end of sequence. A step that owns no token is joined to the step
    before it, and the text of a token that spans two steps belongs to the first.

    Args:
        source: a path of a JSONL file, several paths, or mappings in memory.
        tokenizer: a fast tokenizer of transformers.
        split_by: how a text becomes steps, see `split_text`. A list of steps is taken as it is.
        max_length: most tokens of prompt and response; None: no limit.
        grader: of `load_grader`, for rows without a reward.
        chat_template_kwargs: options of the chat template for all rows.
        special_tokens: as for `tokenize_row`; an answer may spell no special token either.

    Returns:
        The chains; the ids of the rows over `max_length`, which are left out.

    Raises:
        ValueError: some rows cannot be used. The message names file, line and reason of each.
        OSError: a file cannot be read.
    """
    if max_length is not None:
        check_count("max_length", max_length)
    special, bound = SpecialTokens(tokenizer, special_tokens), LengthBound(tokenizer, max_length)

    def parse(where: str, row: Mapping) -> Chain | str:
        try:
            chain = _chain(row, where, tokenizer, split_by, grader, chat_template_kwargs, special, bound)
        except TooLong:
            return _source(row, where)
        return chain if max_length is None or chain.num_tokens <= max_length else chain.source

    parsed, bad = parse_rows(source, parse)
    raise_bad_rows(bad, len(parsed) + len(bad))
    return [one for one in parsed if isinstance(one, Chain)], [one for one in parsed if isinstance(one, str)]


def step_batch(chains: Sequence[Chain]) -> StepBatch:
    """The tokens of chains, for probing and sampling."""
    return StepBatch([c.prompt_ids for c in chains], [c.step_ids for c in chains])


def _chain(
    row: Mapping,
    where: str,
    tokenizer,
    split_by: SplitBy,
    grader: Grader | None,
    template: Mapping | None,
    special: SpecialTokens,
    bound: LengthBound,
) -> Chain:
    prompt, answer = row.get("prompt"), row.get("answer")
    if not prompt or not isinstance(prompt, str | list):
        raise ValueError(f"prompt: expected a text or chat messages, got {describe(prompt)}")
    if isinstance(answer, Mapping):
        raise ValueError(f"answer: expected a text, a number or a list of them, got {describe(answer)}")
    texts = answer_texts(answer)
    if "response" not in row:
        raise ValueError("expected prompt, response and answer, got no response; null stands for one without steps")
    response = _response(row["response"])
    special.check_prompt(prompt, **{name: row.get(name) for name in COLUMNS})
    special.check_answers(texts)
    special.check_response("response", response, chat=not isinstance(prompt, str))
    options = chat_options(row, template)
    source = _source(row, where)
    encoded = encode_prompt(prompt, tokenizer, options, bound)
    steps, ids = [], []
    if "".join(response).strip():
        body, edges, _ = response_text(prompt, encoded.text, response, tokenizer, split_by, False, options)
        check_bound(bound, body)
        try:
            tokens, offsets = encode_response(tokenizer, encoded, body)
        except UnusableRow as error:
            raise ValueError(f"response: {error}") from error
        steps, ids = _by_step(body, list(pairwise(edges)), tokens, offsets)
    answer = texts if isinstance(answer, list | tuple) else texts[0]
    reward = _reward(row, "".join(steps), texts, grader)
    columns = {} if isinstance(prompt, str) else chat_columns(options)
    return Chain(source, prompt, answer, reward, steps, encoded.ids, ids, columns)


def _source(row: Mapping, where: str) -> str:
    source = where if row.get("id") is None else str(row["id"])
    check_unicode("id", source)
    return source


def _response(response: Any) -> str | list[str]:
    if not response:
        return ""
    if isinstance(response, list):
        if not all(isinstance(step, str) and step for step in response):
            raise ValueError("response: expected a text, or a list of steps with text in each")
        return separate_steps(response)
    if not isinstance(response, str):
        raise ValueError(f"response: expected a text or a list of steps, got {type(response).__name__}")
    return response


def _by_step(
    text: str, spans: list[tuple[int, int]], tokens: list[int], offsets: Sequence[tuple[int, int]]
) -> tuple[list[str], list[list[int]]]:
    """The text and the tokens of each step that owns a token."""
    owners = token_step_ids(text, offsets, spans, dense=False)
    starts = sorted(set(owners))
    reached = [0, *accumulate((end for _, end in offsets), max)]
    # a token over the border belongs to the step before, and so does its text
    edges = [0, *(max(spans[s][0], reached[owners.index(s)]) for s in starts[1:]), len(text)]
    steps = [text[a:b] for a, b in pairwise(edges)]
    return steps, [[t for t, owner in zip(tokens, owners, strict=True) if owner == s] for s in starts]


def _reward(row: Mapping, response: str, answers: list[str], grader: Grader | None) -> float:
    # data sets that mix both kinds of rows fill the missing column with nulls
    given = row.get("is_correct") if row.get("reward") is None else row["reward"]
    if given is None and grader is not None:
        columns = {name: value for name, value in row.items() if name not in ("prompt", "response", "answer")}
        given = max(grade(grader, row["prompt"], response, answer, **columns) for answer in answers)
    if not isinstance(given, (bool, int, float)) or not 0 <= given <= 1:
        raise ValueError(
            f"reward: expected a number in [0, 1], or is_correct, or a grader, got {describe(given)}; rescale rewards "
            "in [-1, 1] by (reward + 1) / 2"
        )
    return float(given)
