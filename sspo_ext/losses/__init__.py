# SPDX-License-Identifier: Apache-2.0
"""The public losses: `step_pref_loss` and its kin, and every loss that is a function of step log-probs."""

from ..routes.linear.plan import LinearPlan, policy_plan, pref_plan
from .catalogue import Entry, catalogue
from .common import LOSS_FUNCTIONS, LossFunction, StepLossOutput
from .criterion import StepPrefLoss
from .from_logps import policy_loss
from .lists import level_pairs, listwise_loss, plackett_luce_loss, tpo_l_loss, tpo_loss, trpa_loss
from .logps import linear_step_logps, step_logps
from .parts import gather_logps
from .policy import StepPolicyOutput, linear_step_policy_loss, step_policy_loss
from .pref import StepPrefOutput, linear_step_pref_loss, pref_loss, step_pref_loss
from .state import RewardMean
from .targets import direct_advantage_loss, implicit_prm_loss, oreo_loss, oreo_value_loss
from .token_weights import full_step_weights, ld_dpo_weights, spo_weights, tgdpo_weights
from .tokens import full_step_dpo_loss, tdpo1_loss, tdpo2_loss, wpo_weights
from .transport import aot_loss, aot_unpaired_loss
from .unpaired import apo_zero_unpaired_loss, kto_loss, kto_reference_point

__all__ = [
    "LOSS_FUNCTIONS",
    "Entry",
    "LinearPlan",
    "LossFunction",
    "RewardMean",
    "StepLossOutput",
    "StepPolicyOutput",
    "StepPrefLoss",
    "StepPrefOutput",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_zero_unpaired_loss",
    "catalogue",
    "direct_advantage_loss",
    "full_step_dpo_loss",
    "full_step_weights",
    "gather_logps",
    "implicit_prm_loss",
    "kto_loss",
    "kto_reference_point",
    "ld_dpo_weights",
    "level_pairs",
    "linear_step_logps",
    "linear_step_policy_loss",
    "linear_step_pref_loss",
    "listwise_loss",
    "oreo_loss",
    "oreo_value_loss",
    "plackett_luce_loss",
    "policy_loss",
    "policy_plan",
    "pref_loss",
    "pref_plan",
    "spo_weights",
    "step_logps",
    "step_policy_loss",
    "step_pref_loss",
    "tdpo1_loss",
    "tdpo2_loss",
    "tgdpo_weights",
    "tpo_l_loss",
    "tpo_loss",
    "trpa_loss",
    "wpo_weights",
]
