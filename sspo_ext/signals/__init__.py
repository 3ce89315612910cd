"""Signals that need no gradient: where the steps of a response are, and what each is worth."""

from .branches.branch import Branch, BranchLogps
from .branches.score import branch_logps
from .branches.support import why_not
from .credit.baselines import BASELINES, combine_advantages, outcome_advantages
from .credit.gae import step_gae
from .pairing.candidates import Candidate, Node, nodes_from_rollouts, trace_candidates
from .pairing.pairs import TracedPair, divergence_index, divergence_weights, pair_candidates, pair_rows
from .probing.probe import probe_step_values
from .probing.texts import PROBES, Probe, as_probe
from .split import delimiter_mask, split_text, step_ids_from_tokens, token_step_ids
from .values import StepBatch, StepValues

__all__ = [
    "BASELINES",
    "PROBES",
    "Branch",
    "BranchLogps",
    "Candidate",
    "Node",
    "Probe",
    "StepBatch",
    "StepValues",
    "TracedPair",
    "as_probe",
    "branch_logps",
    "combine_advantages",
    "delimiter_mask",
    "divergence_index",
    "divergence_weights",
    "nodes_from_rollouts",
    "outcome_advantages",
    "pair_candidates",
    "pair_rows",
    "probe_step_values",
    "split_text",
    "step_gae",
    "step_ids_from_tokens",
    "token_step_ids",
    "trace_candidates",
    "why_not",
]
