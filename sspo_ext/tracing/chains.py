"""Chains of reasoning from JSONL: a prompt, a response in steps, the answer that is known to be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..data.graders import Grader, answer_texts, grade
from ..data.rows import Source, raise_bad_rows, read_rows
from ..data.tokenize import UnusableRow, encode_response, prompt_text, response_text
from ..signals.split import SplitBy, token_step_ids
from ..signals.values import StepBatch


@dataclass(frozen=True)
class Chain:
    """One response, in text and in tokens. The steps' texts concatenate to the response."""

    source: str  # the row's "id", or file:line
    prompt: str | list[dict]
    answer: str | list[str]
    reward: float  # of the whole response
    steps: list[str]
    prompt_ids: list[int]
    step_ids: list[list[int]]


def load_chains(
    source: Source,
    tokenizer,
    *,
    split_by: SplitBy = "newline",
    max_length: int | None = None,
    grader: Grader | None = None,
    chat_template_kwargs: Mapping | None = None,
) -> tuple[list[Chain], list[str]]:
    """(chains, sources of rows over `max_length` tokens) of JSONL files or mappings.

    A row is {"prompt": text or chat messages, "response": text or list of steps, "answer": text, number or several
    accepted ones}, with optional "id", and "reward" (a number in [0, 1], the scale of values) or "is_correct" (a bool),
    else (both absent or null) the `grader` gives the reward. A text is split by `split_by` (see `split_text`), a list
    is taken as it is. A response of null or "" has no steps.
    Tokens are those of `tokenize_row`, without an end of sequence. A step that owns no token belongs to the one before.

    Raises one ValueError that names all rows that are wrong.
    """
    chains, long, bad = [], [], []
    total = 0
    for where, row, reason in read_rows(source):
        total += 1
        try:
            if reason:
                raise ValueError(reason)
            chain = _chain(row, where, tokenizer, split_by, grader, chat_template_kwargs)
        except (TypeError, ValueError) as error:
            bad.append((where, str(error)))
            continue
        if max_length is not None and len(chain.prompt_ids) + sum(map(len, chain.step_ids)) > max_length:
            long.append(chain.source)
        else:
            chains.append(chain)
    raise_bad_rows(bad, total)
    return chains, long


def step_batch(chains: Sequence[Chain]) -> StepBatch:
    return StepBatch([c.prompt_ids for c in chains], [c.step_ids for c in chains])


def _chain(
    row: Mapping, where: str, tokenizer, split_by: SplitBy, grader: Grader | None, template: Mapping | None
) -> Chain:
    prompt, response, answer = row.get("prompt"), row.get("response"), row.get("answer")
    if not prompt or not isinstance(prompt, (str, list)):
        raise ValueError(f"prompt: expected a text or chat messages, got {prompt!r}")
    if isinstance(answer, Mapping):
        raise ValueError(f"answer: expected a text, a number or several, got {answer!r}")
    texts = answer_texts(answer)
    response = response or ""
    if isinstance(response, list) and not all(isinstance(step, str) and step for step in response):
        raise ValueError("response: expected a text, or a list of steps with text in each")
    if isinstance(response, list):
        response = [s if s[-1].isspace() else s + "\n" for s in response[:-1]] + response[-1:]
    elif not isinstance(response, str):
        raise ValueError(f"response: expected a text or a list of steps, got {type(response).__name__}")
    text, first = prompt_text(prompt, tokenizer, template)
    head = tokenizer(text, add_special_tokens=False)["input_ids"]
    steps, ids = [], []
    if "".join(response).strip():
        body, edges, _ = response_text(prompt, text, response, tokenizer, split_by, False, template)
        try:
            tokens, offsets = encode_response(tokenizer, text, head, body)
        except UnusableRow as error:
            raise ValueError(f"response: {error}") from error
        steps, ids = _by_step(body, list(pairwise(edges)), tokens, offsets)
    head = head if head[: len(first)] == first else first + head
    source = where if row.get("id") is None else str(row["id"])
    answer = texts if isinstance(answer, (list, tuple)) else texts[0]
    return Chain(source, prompt, answer, _reward(row, "".join(steps), texts, grader), steps, head, ids)


def _by_step(
    text: str, spans: list[tuple[int, int]], tokens: list[int], offsets: Sequence[tuple[int, int]]
) -> tuple[list[str], list[list[int]]]:
    owners = token_step_ids(text, offsets, spans, dense=False)
    starts = sorted(set(owners))
    edges = [0, *(spans[s][0] for s in starts[1:]), len(text)]
    steps = [text[a:b] for a, b in pairwise(edges)]
    return steps, [[t for t, owner in zip(tokens, owners, strict=True) if owner == s] for s in starts]


def _reward(row: Mapping, response: str, answers: list[str], grader: Grader | None) -> float:
    # where rows of both kinds are mixed, data sets fill the other's column with nulls
    given = row.get("is_correct") if row.get("reward") is None else row["reward"]
    if given is None and grader is not None:
        columns = {name: value for name, value in row.items() if name not in ("prompt", "response", "answer")}
        given = max(grade(grader, row["prompt"], response, answer, **columns) for answer in answers)
    if not isinstance(given, (bool, int, float)) or not 0 <= given <= 1:
        raise ValueError(
            f"reward: expected a number in [0, 1], or is_correct, or a grader, got {given!r}; -1 and +1 are rescaled "
            "by (reward + 1) / 2"
        )
    return float(given)
