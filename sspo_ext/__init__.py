"""Step-wise preference optimisation for language models, made fast.

`step_pref_loss` turns logits, or hidden states in its `linear_` twin, into a step-wise preference loss and its
gradient.
"""

from ._source_tree import prefer_installed

prefer_installed(__path__)

from .layout.pairs import StepPairs  # noqa: E402
from .layout.steps import StepLayout  # noqa: E402
from .losses.logps import linear_step_logps, step_logps  # noqa: E402
from .losses.policy import StepPolicyOutput, linear_step_policy_loss, step_policy_loss  # noqa: E402
from .losses.pref import StepPrefLoss, StepPrefOutput, linear_step_pref_loss, pref_loss, step_pref_loss  # noqa: E402
from .objective.sums import StepLogps  # noqa: E402

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
