"""Signals that need no gradient: where the steps of a response are (later: what each is worth)."""

from .split import delimiter_mask, split_text, step_ids_from_tokens, token_step_ids

__all__ = ["delimiter_mask", "split_text", "step_ids_from_tokens", "token_step_ids"]
