# SPDX-License-Identifier: Apache-2.0
"""What SSPOTrainer is given: checked, and prepared for use."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..data.graders import answer_texts
from ..data.prompts import check_rows
from ..signals.split import delimiter_mask
from .limits import check_fits, model_limits
from .options import dictionary
from .sharded import is_shared_out, whole
from .sspo_config import SSPOConfig


def check_given(
    args: SSPOConfig, tokenizer: Any, reward_func: Any, engine: Any, trainer_kwargs: Mapping[str, Any]
) -> None:
    """Checks everything that is given except the rows."""
    if tokenizer is None:
        raise ValueError("processing_class: expected the model's tokenizer, got None")
    if not callable(reward_func):
        raise TypeError(f"reward_func: expected one function, see sspo_ext.data.graders, got {reward_func!r}")
    for name in ("compute_metrics", "compute_loss_func"):
        if trainer_kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None, since the trainer has its own, got {trainer_kwargs[name]!r}")
    if engine is not None and args.rollout_options:
        raise ValueError("rollout_options: expected None beside an engine of your own, which has its options")
    if args.combine != "outcome" and args.asked.turn and not has_chat(tokenizer):
        raise ValueError("probe_turn: expected a tokenizer with a chat template, which writes the user's turn")


def check_datasets(
    args: SSPOConfig, model: Any, tokenizer: Any, train_dataset, eval_dataset, *, own_values: bool
) -> None:
    """Checks every row. With `own_values` a subclass estimates the values, and needs no answer as a text."""
    chat, probed = has_chat(tokenizer), args.combine != "outcome"
    by_text = probed and not own_values and dictionary(args.probe_options).get("mode", "likelihood") == "likelihood"
    rendering, limits = rendering_of(args, tokenizer), model_limits(model)
    for name, dataset, needs in (
        ("train_dataset", train_dataset, {"answers": probed, "texts": by_text}),
        ("eval_dataset", eval_dataset, {}),
    ):
        prompts = check_rows(name, dataset, chat=chat, **needs, **rendering)
        more = args.max_completion_length + (_probe_tokens(args, tokenizer, dataset) if by_text and needs else 0)
        check_fits(name, ((f"row {i}", [ids]) for i, ids in enumerate(prompts)), limits, more=more)


def _probe_tokens(args: SSPOConfig, tokenizer: Any, rows) -> int:
    """The most tokens that the probe and an answer add to a completion."""
    asked = args.asked
    answers = dict.fromkeys(text for row in rows or () for text in answer_texts(row["answer"]))
    longest = max(answers, key=len, default="")
    return len(tokenizer(asked.text + asked.separator + longest, add_special_tokens=False)["input_ids"])


def rendering_of(args: SSPOConfig, tokenizer: Any) -> dict[str, Any]:
    """How `check_rows` looks at the texts of rows."""
    template = dictionary(args.chat_template_kwargs)
    return {"tokenizer": tokenizer, "chat_template_kwargs": template, "special_tokens": args.special_tokens}


def check_batch(args: SSPOConfig, rows_per_update: int) -> None:
    """Checks that an update has whole groups."""
    if rows_per_update % args.num_generations:
        raise ValueError(
            "per_device_train_batch_size: expected per_device_train_batch_size x gradient_accumulation_steps x "
            f"processes, here {rows_per_update}, to be a multiple of num_generations={args.num_generations}"
        )


def has_chat(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return getattr(tokenizer, "chat_template", None) is not None


def frozen_copy(model: Any) -> Any:
    """The reference: a copy in evaluation mode. Frozen parameters are shared, so an adapter's costs only an adapter.

    Weights that ZeRO-3 has shared out in loading are gathered, one after the other, onto the host.
    """
    known = {}
    for p in model.parameters():
        if not p.requires_grad:
            known[id(p)] = p
        elif is_shared_out(p):
            known[id(p)] = nn.Parameter(whole(p).cpu())
    return copy.deepcopy(model, known).eval().requires_grad_(False)


def step_delimiters(model: Any, tokenizer: Any, split_by: str, eos_token_ids: Sequence[int]) -> Tensor:
    """(V,) bool: the tokens that end a step."""
    # The text config of a model of several parts (text and images) has the vocabulary.
    vocabulary = model.config.get_text_config().vocab_size
    padding = [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id]
    size = max(vocabulary, len(tokenizer))
    return delimiter_mask(tokenizer, split_by, vocab_size=size, eos_token_ids=[*eos_token_ids, *padding])
