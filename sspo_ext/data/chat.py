# SPDX-License-Identifier: Apache-2.0
"""The renderer of chats: from messages to the text that a model reads, the same for training, rollouts and traces."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .._checks import describe
from ..signals.probing.texts import Probe

COLUMNS = ("tools", "chat_template_kwargs")

# What the renderer itself decides.
_OURS = (
    "conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors",
    "return_assistant_tokens_mask", "padding", "truncation", "max_length",
)  # fmt: skip

_MARK = "@@response@@"


def chat_options(row: Mapping, given: Mapping | None = None) -> dict[str, Any]:
    """Collect the chat template's options for one row.

    Args:
        row: its columns "chat_template_kwargs", an object, and "tools", a list, are read. Either may be written in
            JSON. A null option is as good as none: data sets that mix rows fill missing options with nulls.
        given: options for all rows. A row's own come first.

    Returns:
        The arguments of `apply_chat_template`.

    Raises:
        ValueError: a column has another form, or an option is one that the renderer decides itself.
    """
    options = dict(given or {})
    for name, kind, expected in (("chat_template_kwargs", Mapping, "an object"), ("tools", Sequence, "a list")):
        value = row.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name}: expected {expected}, or one in JSON: {error}") from None
        if value is None:
            continue
        if isinstance(value, str) or not isinstance(value, kind):
            raise ValueError(f"{name}: expected {expected}, got {describe(value)}")
        if name == "chat_template_kwargs":
            mine = dict(value)
        else:
            mine = {"tools": list(value)} if value else {}
        options |= {key: one for key, one in mine.items() if one is not None}
    for name in _OURS:
        if name in options:
            raise ValueError(f"chat_template_kwargs: {name!r} is no option, since the prompt decides it")
    return options


def chat_columns(options: Mapping) -> dict[str, Any]:
    """The columns of a row from which `chat_options` makes these options."""
    others = {name: value for name, value in options.items() if name != "tools"}
    columns = {"tools": options.get("tools"), "chat_template_kwargs": others}
    return {name: value for name, value in columns.items() if value}


def row_probe(probe: Probe, row: Mapping) -> Probe:
    """The probe as it asks after this row's prompt: a turn of the user has the options of the prompt."""
    if not probe.turn:
        return probe
    return replace(probe, chat_template_kwargs=chat_options(row, probe.chat_template_kwargs) or None)


def goes_on(prompt: str | Sequence[Mapping]) -> bool:
    """Whether a prompt ends in words of the assistant, which the response continues."""
    return not isinstance(prompt, str) and len(prompt) > 0 and prompt[-1].get("role") == "assistant"


def with_words(messages: Sequence[Mapping], words: str) -> list[Mapping]:
    """The messages with these words of the assistant at their end: in a message of their own, or in the last one."""
    if not goes_on(messages):
        return [*messages, {"role": "assistant", "content": words}]
    *before, last = messages
    content = last.get("content") or ""  # beside calls of tools it may be missing, or null
    content = content + words if isinstance(content, str) else [*content, {"type": "text", "text": words}]
    return [*before, {**last, "content": content}]


def render(messages: Sequence[Mapping], tokenizer, options: Mapping, **how: bool) -> str:
    """What the chat template writes.

    Raises:
        ValueError: the template refuses the messages.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template([*messages], tokenize=False, **how, **options)
    except (TemplateError, TypeError, RecursionError) as error:
        raise ValueError(f"prompt: the chat template refuses it: {error}") from error


def render_prompt(messages: Sequence[Mapping], tokenizer, options: Mapping) -> str:
    """The text of a prompt. After words of the assistant it is open; after others a turn of the assistant is opened."""
    how = {"continue_final_message": True} if goes_on(messages) else {"add_generation_prompt": True}
    return render(messages, tokenizer, options, **how)


def render_response(
    messages: Sequence[Mapping], prompt: str, response: str, tokenizer, options: Mapping
) -> tuple[str, int]:
    """Let the chat template write a response.

    Args:
        messages: the prompt.
        prompt: its text, of `render_prompt`.
        response: the response's text.
        tokenizer: of transformers.
        options: of `chat_options`.

    Returns:
        What the template writes behind the prompt; where in it the response begins, without white space around it.

    Raises:
        ValueError: the template does not continue the prompt with the response.
    """
    content = response.strip()  # as many templates do
    full = render(with_words(messages, response), tokenizer, options)
    before, _, after = render(with_words(messages, _MARK), tokenizer, options).rpartition(_MARK)
    between = full[len(before) : len(full) - len(after)]
    if full.startswith(before) and full.endswith(after) and between.strip() == content:
        at = len(before) + between.index(content)
    else:  # the template writes something else around it, by what it finds in it, such as thoughts
        at = full.find(content, len(prompt))
    if not full.startswith(prompt) or at < len(prompt):
        raise ValueError("prompt: the chat template does not continue it with the response; give both as texts")
    return full[len(prompt) :], at - len(prompt)
