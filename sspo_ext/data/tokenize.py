"""From a preference row to token ids, labels, step ids and the pairs of steps to compare."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise, takewhile
from typing import NamedTuple

from ..signals.pairing.pairs import divergence_index
from ..signals.split import SplitBy, split_text, token_step_ids
from .rows import name_some, raise_bad_rows

logger = logging.getLogger(__name__)

PAIR_BY = ("index", "branch", "sequence")

OVERFLOW = ("drop", "cut", "error")

TOKEN_WEIGHTS = ("uniform", "divergence")


class UnusableRow(ValueError):
    """A well-formed row that leaves nothing to compare; the message says why, in words that many rows can share."""


class _Response(NamedTuple):
    ids: list[int]
    steps: list[int]  # of each token: the index of its step in the text
    dense: list[int]  # of each token: its step among those that own a token

    def at(self, step: int) -> list[int]:
        return [i for i, s in zip(self.ids, self.steps, strict=True) if s == step]


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
) -> dict:
    """Tokens, step ids and pairs of one row in the form of `load_preference_rows`, for `StepPreferenceCollator`.

    tokenizer    fast (offsets place the steps), with a chat template if the prompt is a list of messages
    split_by     how a response that is a text becomes steps, see `split_text`; lists of steps are taken as they are
    pair_by      "index": step k against step k, steps without a partner left out. "branch": only the first step that
                 differs. "sequence": the whole response is one step (DPO). A row's own `branch` means that step alone,
                 unless "sequence"
    max_length   of prompt + what is scored of the response, in tokens
    overflow     rows over max_length: "drop" raises UnusableRow, "cut" leaves out the pairs whose steps do not fit
                 whole (UnusableRow if none is left), "error" raises ValueError. Prompts and steps are never shortened
    add_eos      a response that is not `partial` ends with end of sequence, which belongs to its last step
    skip_shared  "index": leave out leading steps that are the same tokens in both. Their context is the same too, so
                 their difference is 0 whatever the model, and its gradient too: they would only water down the mean
    token_weights  "uniform": all tokens of a step count. "divergence": only the first where chosen and rejected step
                 differ, so a pair is about two logits of one position. It needs the same tokens before both steps:
                 `pair_by` "branch" or "sequence", or the row's own `branch`

    Returns {"chosen_input_ids", "chosen_labels", "chosen_step_ids", "rejected_input_ids", ... : lists of int of equal
    length, "pairs": [[chosen step, rejected step], ...], "weight", "margin", "source"}. Labels are unshifted. Only
    steps in a pair are scored and numbered, 0, 1, 2..; all else has label -100 and step id -1. What follows the last
    scored token cannot change a causal model's score of it and is not there.

    Prompt and response are tokenized as one text if that leaves the prompt's tokens as they are alone, which is what
    the model sees before it writes. Otherwise (the two merge in a token) each is tokenized by itself. Special tokens
    that the tokenizer puts first are put first (not with a chat template, which writes its own). With a chat template
    the response is all that the template adds, up to the end of turn; with `partial` or without `add_eos`, to the
    content's last character.
    """
    return _tokenize(row, tokenizer, split_by, pair_by, max_length, overflow, add_eos, skip_shared, token_weights)[0]


def tokenize_rows(rows: Iterable[Mapping], tokenizer, **options) -> list[dict]:
    """`tokenize_row` over all rows, with its options. Rows left out are counted in one warning, by reason and source.

    Raises one ValueError naming all rows that are wrong (not only unusable), or if no row is left.
    """
    options = {**tokenize_row.__kwdefaults__, **options}
    features, bad = [], []
    left_out: dict[str, list[str]] = defaultdict(list)
    cut: list[str] = []
    total = 0
    for total, row in enumerate(rows, 1):  # noqa: B007
        where = row.get("source", f"row {total - 1}")
        try:
            feature, num_cut = _tokenize(row, tokenizer, **options)
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


def _tokenize(
    row: Mapping,
    tokenizer,
    split_by: SplitBy,
    pair_by: str,
    max_length: int | None,
    overflow: str,
    add_eos: bool,
    skip_shared: bool,
    token_weights: str,
) -> tuple[dict, int]:
    """(the feature, pairs that were cut away)"""
    if pair_by not in PAIR_BY:
        raise ValueError(f"pair_by: expected one of {PAIR_BY}, got {pair_by!r}")
    if overflow not in OVERFLOW:
        raise ValueError(f"overflow: expected one of {OVERFLOW}, got {overflow!r}")
    if token_weights not in TOKEN_WEIGHTS:
        raise ValueError(f"token_weights: expected one of {TOKEN_WEIGHTS}, got {token_weights!r}")
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"tokenizer: expected a fast one, whose offsets place the steps, got {type(tokenizer).__name__}"
        )
    finish = add_eos and not row.get("partial", False)
    prompt, first = prompt_text(row["prompt"], tokenizer)
    head = _encode(tokenizer, prompt)[0]
    first = [] if head[: len(first)] == first else first
    sides, texts = [], []
    for name in ("chosen", "rejected"):
        text, edges, end = response_text(row["prompt"], prompt, row[name], tokenizer, split_by, finish)
        ids, offsets = encode_response(tokenizer, prompt, head, text)
        if end:
            if tokenizer.eos_token_id is None:
                raise ValueError("add_eos: the tokenizer has no end-of-sequence token; pass add_eos=False")
            if ids[-1] != tokenizer.eos_token_id:
                ids, offsets = [*ids, tokenizer.eos_token_id], [*offsets, (0, 0)]
        spans = list(pairwise(edges))
        steps, dense = (token_step_ids(text, offsets, spans, dense=dense) for dense in (False, True))
        sides.append(_Response(ids, steps, dense))
        texts.append([text[a:b] for a, b in spans])
    head = first + head
    branch = row.get("branch")
    if branch is not None:
        for name, steps in zip(("chosen", "rejected"), texts, strict=True):
            if branch >= len(steps):
                raise ValueError(f"branch: expected less than the {len(steps)} steps of {name}, got {branch}")
        if texts[0][:branch] != texts[1][:branch]:
            raise ValueError(f"branch: the first {branch} steps of chosen and rejected are not the same")
        if sides[0].at(branch) == sides[1].at(branch) != []:
            raise ValueError(f"branch: step {branch} is the same in chosen and rejected")
    if pair_by == "sequence":
        sides = [side._replace(dense=[0] * len(side.ids)) for side in sides]
    pairs = _pairs(*sides, pair_by, branch, skip_shared)

    if token_weights == "divergence":
        if pair_by == "index" and branch is None:
            raise ValueError(
                "token_weights: 'divergence' needs steps that follow the same tokens: pair_by='branch' or 'sequence', "
                "or rows with a branch"
            )
        sides = _only_divergence(*sides, pairs[0])

    fits = pairs
    if max_length is not None:
        ends = [{step: len(head) + i + 1 for i, step in enumerate(side.dense)} for side in sides]
        fits = [(c, r) for c, r in pairs if max(ends[0][c], ends[1][r]) <= max_length]
    if len(fits) < len(pairs) and (overflow != "cut" or not fits):
        longest = max(max(ends[0][c], ends[1][r]) for c, r in pairs)
        if overflow == "error":
            raise ValueError(f"max_length: {longest} tokens are more than {max_length}")
        raise UnusableRow(f"longer than max_length={max_length}")

    feature: dict = {}
    for name, side, kept in zip(("chosen", "rejected"), sides, zip(*fits, strict=True), strict=True):
        number = {step: n for n, step in enumerate(kept)}
        steps = [number.get(step, -1) for step in side.dense]
        steps = steps[: max(i for i, step in enumerate(steps) if step >= 0) + 1]
        ids = side.ids[: len(steps)]
        feature[f"{name}_input_ids"] = head + ids
        feature[f"{name}_labels"] = [-100] * len(head) + [
            i if s >= 0 else -100 for i, s in zip(ids, steps, strict=True)
        ]
        feature[f"{name}_step_ids"] = [-1] * len(head) + steps
    feature["pairs"] = [[k, k] for k in range(len(fits))]  # renumbered, and each step is in one pair
    feature |= {"weight": row.get("weight", 1.0), "margin": row.get("margin", 0.0), "source": row.get("source")}
    return feature, len(pairs) - len(fits)


def _pairs(
    chosen: _Response, rejected: _Response, pair_by: str, branch: int | None, skip_shared: bool
) -> list[tuple[int, int]]:
    if pair_by == "sequence":
        return [(0, 0)]
    if branch is not None:
        if branch not in chosen.steps or branch not in rejected.steps:
            raise UnusableRow("with a step at the branch that has no token of its own")
        return [(chosen.dense[chosen.steps.index(branch)], rejected.dense[rejected.steps.index(branch)])]
    tokens = [_by_step(side) for side in (chosen, rejected)]
    both = list(zip(*tokens, strict=False))
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
    if shared == len(both):
        raise UnusableRow("where one response is the beginning of the other")
    if pair_by == "branch":
        return [(shared, shared)]
    return [(k, k) for k in range(shared if skip_shared else 0, len(both))]


def _only_divergence(chosen: _Response, rejected: _Response, pair: tuple[int, int]) -> list[_Response]:
    """The two responses with the pair's steps cut down to the first token in which they differ."""
    places = [[i for i, s in enumerate(side.dense) if s == k] for side, k in zip((chosen, rejected), pair, strict=True)]
    at = divergence_index([chosen.ids[i] for i in places[0]], [rejected.ids[i] for i in places[1]])
    if at is None or chosen.ids[: places[0][0]] != rejected.ids[: places[1][0]]:
        raise UnusableRow("where one step is the beginning of the other" if at is None else "whose steps part earlier")
    return [
        side._replace(dense=[s if i == some[at] else s if s != k else -2 for i, s in enumerate(side.dense)])
        for side, some, k in zip((chosen, rejected), places, pair, strict=True)
    ]


def _by_step(side: _Response) -> list[list[int]]:
    steps: list[list[int]] = [[] for _ in range(side.dense[-1] + 1)]
    for i, step in zip(side.ids, side.dense, strict=True):
        steps[step].append(i)
    return steps


def _encode(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def encode_response(tokenizer, prompt: str, head: Sequence[int], text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of the response, and their offsets in it."""
    ids, offsets = _encode(tokenizer, prompt + text)
    n, at = len(head), len(prompt)
    inside = all(start >= at for start, _ in offsets[n:]) and all(end <= at for _, end in offsets[:n])
    if ids[:n] == head and inside:
        ids, offsets = ids[n:], [(start - at, end - at) for start, end in offsets[n:]]
    else:
        ids, offsets = _encode(tokenizer, text)
    if not ids:
        raise UnusableRow("whose response has no tokens")
    return ids, offsets


def prompt_text(prompt: str | list, tokenizer, template_options: Mapping | None = None) -> tuple[str, list[int]]:
    """(its text, special tokens that the tokenizer puts before a text)"""
    if not isinstance(prompt, str):
        options = {"tokenize": False, "add_generation_prompt": True, **(template_options or {})}
        return tokenizer.apply_chat_template(prompt, **options), []
    plain, full = _encode(tokenizer, "a")[0], tokenizer("a")["input_ids"]
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return prompt, list(full[:at])


def response_text(
    messages: str | list,
    prompt: str,
    response: str | Sequence[str],
    tokenizer,
    split_by: SplitBy,
    finish: bool,
    template_options: Mapping | None = None,
) -> tuple[str, list[int], bool]:
    """(text of the response, edges of its steps with 0 and its length, whether end of sequence is to be added)"""
    if isinstance(response, str):
        text, edges = response, [0, *(end for _, end in split_text(response, split_by))]
    else:
        text, edges = "".join(response), [0, *accumulate(map(len, response))]
    if isinstance(messages, str):
        return text, edges, finish
    said = [*messages, {"role": "assistant", "content": text}]
    full = tokenizer.apply_chat_template(said, tokenize=False, **(template_options or {}))
    content = text.strip()  # as many templates do
    at = full.find(content, len(prompt))
    if not full.startswith(prompt) or at < 0:
        raise ValueError("prompt: the chat template does not continue it with the response; give both as texts")
    before = len(prompt)
    end = full.rstrip() if finish else full[: at + len(content)]
    edges = {edge - text.index(content) + at - before for edge in edges[1:-1]}
    edges = sorted(edge for edge in edges | {0, len(end) - before} if 0 <= edge <= len(end) - before)
    return end[before:], edges, finish and len(end) == at + len(content)
