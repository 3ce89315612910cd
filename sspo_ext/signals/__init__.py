"""Signals that need no gradient: where the steps of a response are, and what each is worth."""

from .baselines import BASELINES, combine_advantages, outcome_advantages
from .branches import Branch, BranchLogps, branch_logps
from .gae import step_gae
from .probe import PROBES, Probe, probe_step_values
from .split import delimiter_mask, split_text, step_ids_from_tokens, token_step_ids
from .support import why_not
from .values import StepBatch, StepValues

__all__ = [
    "BASELINES",
    "PROBES",
    "Branch",
    "BranchLogps",
    "Probe",
    "StepBatch",
    "StepValues",
    "branch_logps",
    "combine_advantages",
    "delimiter_mask",
    "outcome_advantages",
    "probe_step_values",
    "split_text",
    "step_gae",
    "step_ids_from_tokens",
    "token_step_ids",
    "why_not",
]
