# SPDX-License-Identifier: Apache-2.0
r"""Where the steps of a response begin and end, found in two ways with the same answer.

From text, when data is prepared: `split_text` cuts the response into spans, and `token_step_ids` maps them to tokens by
the offsets of a fast tokenizer. From token ids alone, inside a trainer: `delimiter_mask` once for each tokenizer, then
`step_ids_from_tokens` for each batch.

`split_text` says what a step is.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

SplitBy = str | re.Pattern

_BLANK = " \t\r\n\v\f"

_BLANK_RUN = re.compile(f"[{_BLANK}]+")

_NUMBERED = re.compile(
    r"[ \t#>*_]*(?:step[ \t]*\d{1,3}[ \t]*(?:[:.)*_\-：]|(?=\s|$))|\(?\d{1,3}(?:[.)](?=[\s*_]|$)|、))", re.IGNORECASE
)

_NEWLINES_NEEDED = {"newline": 1, "blank_line": 2, "numbered": 1}

# The class of a token is one byte. Two fields of two bits count the newlines in its leading and in its trailing white
# space, scaled so that 2 is a delimiter.
_LEAD, _TRAIL = 0, 2  # positions of these fields

_INNER = 1 << 4  # the token has a delimiter inside, with text on both sides

_SOLID = 1 << 5  # the token has something other than white space

_MATCH = 1 << 6  # a match of the regular expression ends inside the token or at its end

_TEXT = 1 << 7  # the token is part of the response's text: all but end of sequence and padding


def _check_by(by: SplitBy) -> str | re.Pattern:
    if isinstance(by, re.Pattern):
        if not isinstance(by.pattern, str):
            raise TypeError("by: expected a pattern over str, got one over bytes")
        return by
    if not isinstance(by, str):
        raise TypeError(
            f"by: expected one of {list(_NEWLINES_NEEDED)} or a regular expression, got {type(by).__name__}"
        )
    if by in _NEWLINES_NEEDED:
        return by
    # A misspelt name is a valid expression that never matches: every response would silently be one step.
    if re.fullmatch(r"[\w \-]*", by):
        raise ValueError(
            f"by: {by!r} is none of {list(_NEWLINES_NEEDED)}; to split at this very text, pass re.compile({by!r})"
        )
    try:
        return re.compile(by)
    except re.error as error:
        raise ValueError(f"by: {by!r} is not a valid regular expression: {error}") from error


def split_text(text: str, by: SplitBy = "newline") -> list[tuple[int, int]]:
    r"""Cut a text into its steps.

    What a step is depends on `by`:

        "newline"      a step starts at every line that is not blank
        "blank_line"   a step starts at every line that is not blank and follows a blank one (a paragraph)
        "numbered"     a step starts at every line that begins with its number: `1.`, `2)`, `(3)`, `**Step 4:**`, `5、`
        regex          a step ends where a match ends, r"(?<=[.!?])\s+"; with a lookahead it starts there, r"(?=<step>)"

    A delimiter belongs to the step that it ends. A line's indentation belongs to the step that it starts. With the
    three named ways no step is only white space: leading blank lines belong to the first step, trailing ones to the
    last.

    A line ends with "\n"; "\r\n" works too, as "\r" is white space. White space means ASCII white space. So a byte of a
    longer character is never taken for a delimiter, and tokens that hold a part of a character are safe.

    Args:
        text: the response.
        by: "newline", "blank_line", "numbered", or a regular expression (`str` or compiled).

    Returns:
        The (start, end) characters of each step, in order. The spans tile the text and none is empty. An empty text has
        no steps.

    Raises:
        ValueError: if `by` is a misspelt name or an invalid regular expression.
        TypeError: if `by` is neither a `str` nor a pattern over `str`.

    Examples:
        >>> text = "2 + 3 = 5\n\n5 * 4 = 20\nA: 20"
        >>> [text[a:b] for a, b in split_text(text)]
        ['2 + 3 = 5\n\n', '5 * 4 = 20\n', 'A: 20']
    """
    by = _check_by(by)
    if not text:
        return []
    if isinstance(by, re.Pattern):
        starts = sorted({m.end() for m in by.finditer(text)} - {0, len(text)})
    else:
        starts = []
        for run in _BLANK_RUN.finditer(text):
            outer = run.start() == 0 or run.end() == len(text)
            if outer or run.group().count("\n") < _NEWLINES_NEEDED[by]:
                continue
            start = text.rindex("\n", run.start(), run.end()) + 1
            if by != "numbered" or _NUMBERED.match(text, start):
                starts.append(start)
    edges = [0, *starts, len(text)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def token_step_ids(
    text: str,
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    *,
    dense: bool = True,
) -> list[int]:
    r"""Give every token of a response the number of its step.

    A token belongs to the step in which it starts. Tokens that share a character (byte-level pieces of a Chinese
    character or an emoji) share its start, so they stay together. A token without characters (end of sequence, another
    special token, a space whose offset was trimmed) starts where the token before it ended; at the end of the text this
    is the last step.

    Args:
        text: the response.
        offsets: the (start, end) characters of each response token in `text`, as a fast tokenizer gives them with
            `return_offsets_mapping=True`.
        spans: the steps, from `split_text` or elsewhere; they must tile `text`.
        dense: whether to number the steps that own a token 0, 1, 2, ..., as `StepLayout` needs it. With False a step's
            number is its index in `spans`; a step that lies inside one token of the step before owns no token, so its
            number is missing.

    Returns:
        One step number for each entry of `offsets`; they never decrease.

    Raises:
        ValueError: if the spans do not tile the text.

    Examples:
        >>> text = "a = 1\nb = 2"
        >>> token_step_ids(text, [(0, 5), (5, 7), (7, 11)], split_text(text))
        [0, 0, 1]
    """
    edge = 0
    for start, end in spans:
        if start != edge or end <= start:
            raise ValueError(
                f"spans: expected non-empty spans that tile the text, got {(start, end)} where {edge} was due"
            )
        edge = end
    if edge != len(text):
        raise ValueError(f"spans: expected to end at {len(text)}, the length of the text, got {edge}")
    starts = [start for start, _ in spans]
    last = max(len(starts) - 1, 0)
    steps: list[int] = []
    step = reached = 0
    for start, end in offsets:
        at = start if end > start else reached
        step = max(step, min(bisect_right(starts, at) - 1, last))
        steps.append(step)
        reached = max(reached, end)
    if not dense:
        return steps
    number = {step: n for n, step in enumerate(dict.fromkeys(steps))}
    return [number[step] for step in steps]


def delimiter_mask(
    tokenizer,
    by: SplitBy = "newline",
    *,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] | None = None,
) -> Tensor:
    r"""Tell for every token of the vocabulary what it does to a step, for `step_ids_from_tokens`.

    Make it once for each tokenizer. It is more than a mask because lines depend on neighbours: "\n" "\n" is one
    delimiter in two tokens, "\n" " " "\n" one in three, and a "\n" at the end of the response is none. A byte of the
    result says where the token has newlines (leading, trailing, inside), whether it has anything else, and whether it
    is text at all. For every tokenizer whose tokens' texts join to the whole text, this gives exactly the steps of
    `split_text` and `token_step_ids`.

    A regular expression is searched in each token alone. Both ways agree where every match lies inside one token and
    does not look outside it. A match over several tokens is not seen, and a repetition such as r"\n+" on the tokens
    "\n" "\n" ends a step in each.

    Args:
        tokenizer: any Hugging Face tokenizer, fast or slow.
        by: "newline", "blank_line", or a regular expression (`str` or compiled), as for `split_text`.
        vocab_size: V, if it is larger than `len(tokenizer)`: models pad their embeddings. The added entries count as
            padding.
        eos_token_ids: tokens that are no part of the response's text, so they start no step. None means the tokenizer's
            end of sequence and padding. If the end of turn is another token, name it here.

    Returns:
        (V,) uint8 on the CPU.

    Raises:
        ValueError: if `by` is "numbered", which needs the text of a line, or invalid; if `vocab_size` is below
            `len(tokenizer)`; or if no token has a newline (BERT's tokenizer drops them): then split the text.
        TypeError: if `by` is neither a `str` nor a pattern over `str`.

    Examples:
        >>> delimiters = delimiter_mask(tokenizer, "newline")
        >>> step_ids = step_ids_from_tokens(input_ids, attention_mask, delimiters)
    """
    by = _check_by(by)
    if by == "numbered":
        raise ValueError(
            "by: 'numbered' needs the text of a line, which no single token shows; use split_text, or by='newline'"
        )
    size = len(tokenizer)
    if vocab_size is not None and vocab_size < size:
        raise ValueError(f"vocab_size: expected at least len(tokenizer) = {size}, got {vocab_size}")
    if eos_token_ids is None:
        eos_token_ids = [i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None]
    texts = _token_texts(tokenizer, size)
    if not isinstance(by, re.Pattern) and not any("\n" in text for text in texts):
        raise ValueError("tokenizer: no token of its vocabulary holds a newline; split the text instead (split_text)")
    classes = bytearray(vocab_size or size)
    for i, text in enumerate(texts):
        classes[i] = _token_class(text, by)
    for i in eos_token_ids:
        classes[i] = 0
    return torch.tensor(classes, dtype=torch.uint8)


def _token_texts(tokenizer, size: int) -> list[str]:
    """Return each token's text as it reads inside a text: after an anchor, as decoders change a text's first space."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    anchor = (tokenizer.encode("a", add_special_tokens=False) or [0])[-1:]
    start = len(decode(anchor))
    return [decode([*anchor, i])[start:] for i in range(size)]


def _token_class(text: str, by: str | re.Pattern) -> int:
    """Return the class of a token with this text, without the token's neighbours."""
    if not text:
        return 0
    if isinstance(by, re.Pattern):
        return _TEXT | (_MATCH if any(m.end() > 0 for m in by.finditer(text)) else 0)
    scale = 2 // _NEWLINES_NEEDED[by]

    def newlines(run: str) -> int:
        return min(run.count("\n") * scale, 2)

    solid = text.strip(_BLANK)
    if not solid:
        return _TEXT | newlines(text) << _LEAD | newlines(text) << _TRAIL
    at = text.index(solid)
    inner = any(newlines(run) == 2 for run in _BLANK_RUN.findall(solid))
    lead, trail = newlines(text[:at]), newlines(text[at + len(solid) :])
    return _TEXT | _SOLID | lead << _LEAD | trail << _TRAIL | (_INNER if inner else 0)


def step_ids_from_tokens(input_ids: Tensor, response_mask: Tensor, delimiters: Tensor) -> Tensor:
    """Number the steps of each sequence from its token ids alone.

    This runs a few elementwise operations and scans along T on the tensors' device, without text, synchronisation or a
    Python loop, and it is one graph under `torch.compile(fullgraph=True)`.

    Tokens outside the mask (prompt, padding, a tool's output) are ignored: a masked span inside a step does not split
    it, and newlines there end nothing. A token that has a delimiter ends its step, whatever else it has. The
    end-of-sequence token belongs to the last step. Pass whole responses: whether white space ends a step depends on
    what follows.

    Args:
        input_ids: (B, T) or (T,) int64.
        response_mask: bool or int of the same shape: nonzero where the model wrote the token.
        delimiters: (V,) uint8 from `delimiter_mask`. Or (V,) bool: every True token ends its step, and the end of
            sequence is a token like any other.

    Returns:
        int64 of the same shape: step numbers 0, 1, 2, ... in each sequence, and -1 outside the mask.

    Raises:
        ValueError: if the shapes differ, or `delimiters` is not (V,) uint8 or bool.

    Examples:
        >>> delimiters = torch.tensor([False, False, True])
        >>> step_ids_from_tokens(torch.tensor([1, 0, 2, 1]), torch.tensor([0, 1, 1, 1]), delimiters)
        tensor([-1,  0,  0,  1])
    """
    if input_ids.shape != response_mask.shape:
        raise ValueError(
            f"response_mask: expected shape {tuple(input_ids.shape)} of input_ids, got {tuple(response_mask.shape)}"
        )
    if delimiters.dim() != 1 or delimiters.dtype not in (torch.uint8, torch.bool):
        raise ValueError(f"delimiters: expected (V,) uint8 or bool, got {tuple(delimiters.shape)} {delimiters.dtype}")
    mask = response_mask != 0
    token = torch.where(mask, delimiters[torch.where(mask, input_ids, 0)].to(torch.int64), 0)
    if delimiters.dtype == torch.bool:
        token = token * _MATCH + mask * _TEXT
    lead, trail = token >> _LEAD & 3, token >> _TRAIL & 3
    solid, text = (token & _SOLID) != 0, (token & _TEXT) != 0

    # For each token, the newlines in the white space at the end of the text so far: a cumulative sum that starts anew
    # at every solid token.
    total = trail.cumsum(-1)
    run = total - torch.where(solid, total - trail, 0).cummax(-1).values
    open_before = torch.nn.functional.pad(run[..., :-1], (1, 0))
    seen = (solid.cumsum(-1) - solid.to(torch.int64)) > 0

    # For each token, whether the next one that is not just spaces starts with text (1) or with more newlines (0):
    # scanned from the right.
    place = torch.arange(token.shape[-1], device=token.device) * 2
    never = 2 * token.shape[-1]
    decides = torch.where(solid | (lead > 0), place + (solid & (lead == 0)), never)
    follows = torch.nn.functional.pad(decides, (0, 1), value=never)[..., 1:].flip(-1).cummin(-1).values.flip(-1) & 1

    ends = (token & _INNER) != 0
    ends |= solid & (lead > 0) & (lead + open_before >= 2) & seen
    ends |= (trail > 0) & (run >= 2) & (follows == 1) & (solid | seen)
    ends |= ((token & _MATCH) != 0) & (text.sum(-1, keepdim=True) > text.cumsum(-1))
    return torch.where(mask, ends.cumsum(-1) - ends.to(torch.int64), -1)


def split_steps(completions: Sequence[Sequence[int]], delimiters: Tensor) -> list[list[list[int]]]:
    """Return the token ids of every step of every completion.

    The steps cover the completion, and the last one has the end of sequence. A completion without a delimiter is one
    step; an empty one has none.
    """
    longest = max(map(len, completions), default=0)
    if not longest:
        return [[] for _ in completions]
    ids, mask = torch.zeros(2, len(completions), longest, dtype=torch.int64)
    for row, tokens in enumerate(completions):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        mask[row, : len(tokens)] = 1
    found = []
    for tokens, steps in zip(completions, step_ids_from_tokens(ids, mask, delimiters).tolist(), strict=True):
        parts: list[list[int]] = [[] for _ in range(steps[len(tokens) - 1] + 1 if tokens else 0)]
        for token, step in zip(tokens, steps, strict=False):
            parts[step].append(token)
        found.append(parts)
    return found
