"""Step-wise preference optimisation for language models, made fast.

`step_pref_loss` turns logits, or hidden states in its `linear_` twin, into a step-wise preference loss and its
gradient.
"""

from .layout.pairs import StepPairs
from .layout.steps import StepLayout
from .losses.logps import linear_step_logps, step_logps
from .losses.policy import StepPolicyOutput, linear_step_policy_loss, step_policy_loss
from .losses.pref import StepPrefLoss, StepPrefOutput, linear_step_pref_loss, pref_loss, step_pref_loss
from .objective.sums import StepLogps

__version__ = "0.1.0"
__all__ = [
    "StepLayout",
    "StepLogps",
    "StepPairs",
    "StepPolicyOutput",
    "StepPrefLoss",
    "StepPrefOutput",
    "linear_step_logps",
    "linear_step_policy_loss",
    "linear_step_pref_loss",
    "pref_loss",
    "step_logps",
    "step_policy_loss",
    "step_pref_loss",
]
