"""Where the steps of a response are, two ways with the same answer.

At data time from text: `split_text` cuts the response into spans that tile it, `token_step_ids` carries them to
tokens through a fast tokenizer's offsets. Inside a trainer from token ids alone: `delimiter_mask` once per tokenizer,
`step_ids_from_tokens` per batch.

What a step is, by `by`:

    "newline"      a step starts at every line that is not blank
    "blank_line"   a step starts at every line that is not blank and follows a blank one (a paragraph)
    "numbered"     a step starts at every line that begins with its number: `1.`, `2)`, `(3)`, `**Step 4:**`, `5、`
    regex          a step ends where a match ends: r"(?<=[.!?])\\s+", or start it with a lookahead: r"(?=<step>)"

A delimiter belongs to the step it ends, a line's indentation to the step it starts, and with the three named ways no
step is only white space: leading blank lines go to the first step, trailing ones to the last. A line ends with "\\n"
("\\r\\n" works, as its "\\r" is white space) and white space is ASCII's: a byte of a longer character is never taken
for either, so tokens that hold part of a character need no care.
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

# A token's class, one byte. `lead`, `trail`: newlines in its leading and trailing white space, scaled so that 2 is a
# delimiter.
_LEAD, _TRAIL = 0, 2  # bit positions of two-bit fields

_INNER = 1 << 4  # a delimiter with text on both sides, inside the token

_SOLID = 1 << 5  # holds something other than white space

_MATCH = 1 << 6  # a match of the regular expression ends inside the token or with it

_TEXT = 1 << 7  # is part of the response's text: all but end-of-sequence and padding


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
    # A misspelt name would be a valid expression that never matches: one step, and nobody notices.
    if re.fullmatch(r"[\w \-]*", by):
        raise ValueError(
            f"by: {by!r} is none of {list(_NEWLINES_NEEDED)}; to split at this very text, pass re.compile({by!r})"
        )
    try:
        return re.compile(by)
    except re.error as error:
        raise ValueError(f"by: {by!r} is not a valid regular expression: {error}") from error


def split_text(text: str, by: SplitBy = "newline") -> list[tuple[int, int]]:
    """Character spans of the steps of `text`, in order: they tile it, and none is empty. An empty text has no steps.

    `by` is "newline", "blank_line", "numbered", or a regular expression (`str` or compiled); the module's docstring
    defines them. ValueError for a misspelt name or an invalid expression, TypeError for anything else.

    Example::

        >>> text = "2 + 3 = 5\\n\\n5 * 4 = 20\\nA: 20"
        >>> [text[a:b] for a, b in split_text(text)]
        ['2 + 3 = 5\\n\\n', '5 * 4 = 20\\n', 'A: 20']
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
    """The step of every token: one int per entry of `offsets`, never decreasing.

    text     the response
    offsets  (start, end) characters of each response token in `text`: a fast tokenizer's `return_offsets_mapping`
    spans    from `split_text`, or any spans that tile `text`
    dense    number the steps that own a token 0, 1, 2.. (what StepLayout wants). False: the index into `spans`; a step
             so short that one token holds all of it and the end of the step before owns no token and is left out

    A token belongs to the step in which it starts, wherever it ends. Tokens that share a character (byte-level pieces
    of a Chinese character or an emoji) share its start, so they stay together. A token without characters (end of
    sequence, other specials, a space whose offset was trimmed away) counts as starting where the token before it
    ended; at the end of the text that is the last step. ValueError if the spans do not tile the text.
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
    """What every token of the vocabulary does to a step: (V,) uint8, for `step_ids_from_tokens`. One per tokenizer.

    tokenizer      any Hugging Face tokenizer, fast or slow
    by             "newline", "blank_line" or a regular expression; "numbered" shows in no single token: ValueError
    vocab_size     V, if larger than len(tokenizer) (models pad their embeddings); the rest is like padding
    eos_token_ids  tokens that are no part of the response's text and so start no step. None: the tokenizer's end of
                   sequence and padding. Name the end of turn here if it is another token

    It is more than a mask because lines depend on neighbours: "\\n" "\\n" is one delimiter in two tokens, "\\n" " "
    "\\n" in three, and "\\n" before the end none. Each byte says where the token has newlines (leading, trailing,
    inside), whether it has anything else, and whether it is text at all; enough for exactly the answer of `split_text`
    and `token_step_ids`, for every tokenizer whose tokens' texts concatenate to the text. ValueError for one without a
    newline in any token (BERT's drops them): split the text instead.

    A regular expression is searched in each token alone. The two ways agree where every match lies inside one token
    and does not look outside it; a match that spans tokens is not seen, and one greedy over tokens (r"\\n+"
    on "\\n" "\\n") ends a step in each.
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
    """Every token's text as it reads inside a text: decoders change a text's first space, so each follows an anchor."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    anchor = (tokenizer.encode("a", add_special_tokens=False) or [0])[-1:]
    head = len(decode(anchor))
    return [decode([*anchor, i])[head:] for i in range(size)]


def _token_class(text: str, by: str | re.Pattern) -> int:
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


def step_ids_from_tokens(
    input_ids: Tensor,  # (B, T) or (T,) int64
    response_mask: Tensor,  # the same shape, bool or int: 1 where the model wrote the token
    delimiters: Tensor,  # (V,) uint8 from delimiter_mask; or any (V,) bool: a True token ends its step
) -> Tensor:  # the same shape, int64
    """Step ids 0, 1, 2.. per sequence, -1 where `response_mask` is 0, from token ids alone.

    A few elementwise operations and scans along T, on the device: no text, no synchronisation, no Python loop, one
    graph under `torch.compile(fullgraph=True)`. Tokens out of the mask (prompt, padding, a tool's output) are looked
    through: a masked span inside a step leaves it one step, and newlines there end nothing. A token that holds a
    delimiter ends its step, whatever else it holds. The end-of-sequence token joins the last step (with a bool mask it
    is a token like any other). Whether white space ends a step depends on what follows, so pass whole responses.
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

    # Newlines in the white space open at the end of each token: a cumulative sum that every solid token starts anew.
    total = trail.cumsum(-1)
    run = total - torch.where(solid, total - trail, 0).cummax(-1).values
    open_before = torch.nn.functional.pad(run[..., :-1], (1, 0))
    seen = (solid.cumsum(-1) - solid.to(torch.int64)) > 0

    # Whether the next token that decides anything starts with text and not with more newlines: scanned from the right.
    place = torch.arange(token.shape[-1], device=token.device) * 2
    never = 2 * token.shape[-1]
    decides = torch.where(solid | (lead > 0), place + (solid & (lead == 0)), never)
    follows = torch.nn.functional.pad(decides, (0, 1), value=never)[..., 1:].flip(-1).cummin(-1).values.flip(-1) & 1

    ends = (token & _INNER) != 0
    ends |= solid & (lead > 0) & (lead + open_before >= 2) & seen
    ends |= (trail > 0) & (run >= 2) & (follows == 1) & (solid | seen)
    ends |= ((token & _MATCH) != 0) & (text.sum(-1, keepdim=True) > text.cumsum(-1))
    return torch.where(mask, ends.cumsum(-1) - ends.to(torch.int64), -1)
