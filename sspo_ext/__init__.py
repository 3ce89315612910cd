"""Step-wise preference optimisation for language models, made fast.

`step_pref_loss` turns logits, or hidden states in its `linear_` twin, into a step-wise preference loss and its
gradient.
"""

from .layout import StepLayout
from .linear import linear_step_logps, linear_step_pref_loss
from .linear_policy import linear_step_policy_loss
from .logps import StepLogps, step_logps
from .losses import StepPrefLoss, StepPrefOutput, pref_loss, step_pref_loss
from .pairs import StepPairs
from .policy_losses import StepPolicyOutput, step_policy_loss

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
