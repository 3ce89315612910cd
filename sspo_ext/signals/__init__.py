# SPDX-License-Identifier: Apache-2.0
"""Signals without gradient: where the steps of a response are, and what each of them is worth.

steps        split_text, token_step_ids; inside a trainer delimiter_mask, step_ids_from_tokens
values       probe_step_values (SSPO's verbal value probing), with StepBatch, StepValues, Probe, PROBES, as_probe;
             unit_values of log-probabilities; choose_probe finds the text, compare_probes on completions of yours;
             through an inference engine probe_requests, values_from_logprobs
budgets      budget_curve (accuracy if the answer is demanded early), efficiency_gaps
advantages   step_gae, outcome_advantages (BASELINES), combine_advantages; on padded tensors step_gae_tokens,
             steps_to_tokens, combine_advantages_tokens; of several rewards rewards_advantages, summed_rewards
preferences  trace_candidates, nodes_from_rollouts, pair_candidates, pair_rows, divergence_weights
log-probs    branch_logps of many continuations of few sequences; why_not tells which engine a model supports
"""

from .branches.branch import Branch, BranchLogps
from .branches.score import branch_logps
from .branches.support import why_not
from .credit.baselines import BASELINES, combine_advantages, outcome_advantages
from .credit.gae import step_gae
from .credit.objectives import rewards_advantages, summed_rewards
from .credit.tokens import combine_advantages_tokens, step_gae_tokens, steps_to_tokens
from .pairing.candidates import trace_candidates
from .pairing.node import Candidate, Node
from .pairing.pairs import TracedPair, divergence_index, divergence_weights, pair_candidates, pair_rows
from .pairing.rollouts import nodes_from_rollouts
from .probing.budget import BudgetCurve, budget_curve, efficiency_gaps
from .probing.choose import choose_probe, named_probes
from .probing.compare import ProbeChoice, ProbeTrial, compare_probes
from .probing.likelihood import unit_values
from .probing.probe import probe_step_values
from .probing.requests import ProbeRequests, probe_requests, values_from_logprobs
from .probing.texts import PROBES, Probe, as_probe
from .split import delimiter_mask, split_text, step_ids_from_tokens, token_step_ids
from .values import StepBatch, StepValues

__all__ = [
    "BASELINES",
    "PROBES",
    "Branch",
    "BudgetCurve",
    "BranchLogps",
    "Candidate",
    "Node",
    "Probe",
    "ProbeChoice",
    "ProbeTrial",
    "ProbeRequests",
    "StepBatch",
    "StepValues",
    "TracedPair",
    "as_probe",
    "branch_logps",
    "budget_curve",
    "choose_probe",
    "combine_advantages",
    "compare_probes",
    "combine_advantages_tokens",
    "delimiter_mask",
    "divergence_index",
    "divergence_weights",
    "efficiency_gaps",
    "named_probes",
    "nodes_from_rollouts",
    "outcome_advantages",
    "pair_candidates",
    "pair_rows",
    "probe_requests",
    "rewards_advantages",
    "probe_step_values",
    "split_text",
    "step_gae",
    "step_gae_tokens",
    "step_ids_from_tokens",
    "steps_to_tokens",
    "summed_rewards",
    "token_step_ids",
    "trace_candidates",
    "unit_values",
    "values_from_logprobs",
    "why_not",
]
