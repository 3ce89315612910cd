"""Signals that need no gradient: where the steps of a response are, and what each is worth."""

from .baselines import BASELINES, combine_advantages, outcome_advantages
from .gae import step_gae
from .split import delimiter_mask, split_text, step_ids_from_tokens, token_step_ids
from .values import StepValues

__all__ = [
    "BASELINES",
    "StepValues",
    "combine_advantages",
    "delimiter_mask",
    "outcome_advantages",
    "split_text",
    "step_gae",
    "step_ids_from_tokens",
    "token_step_ids",
]
