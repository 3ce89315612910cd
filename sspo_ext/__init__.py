# SPDX-License-Identifier: Apache-2.0
"""Step-wise preference optimisation for language models, made fast.

`step_pref_loss` turns logits into a step-wise preference loss and its gradient. `step_policy_loss` does so for policy
gradients with an advantage for each step, and `step_logps` gives the log-probs of steps. Their `linear_` twins take
hidden states and the LM head, and never store the logits.

Example:
    >>> layout = StepLayout.from_step_ids(labels, step_ids)
    >>> out = step_pref_loss(logits, layout, layout.pair_by_index(), reference_free=True)
    >>> out.loss.backward()
"""

from ._source_tree import prefer_installed

prefer_installed(__path__)

from .layout.pairs import StepPairs  # noqa: E402
from .layout.part import LayoutPart  # noqa: E402
from .layout.steps import StepLayout  # noqa: E402
from .losses.criterion import StepPrefLoss  # noqa: E402
from .losses.from_logps import policy_loss  # noqa: E402
from .losses.logps import linear_step_logps, step_logps  # noqa: E402
from .losses.parts import gather_logps  # noqa: E402
from .losses.policy import StepPolicyOutput, linear_step_policy_loss, step_policy_loss  # noqa: E402
from .losses.pref import StepPrefOutput, linear_step_pref_loss, pref_loss, step_pref_loss  # noqa: E402
from .objective.sums import StepLogps  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "LayoutPart",
    "StepLayout",
    "StepLogps",
    "StepPairs",
    "StepPolicyOutput",
    "StepPrefLoss",
    "StepPrefOutput",
    "gather_logps",
    "linear_step_logps",
    "linear_step_policy_loss",
    "linear_step_pref_loss",
    "policy_loss",
    "pref_loss",
    "step_logps",
    "step_policy_loss",
    "step_pref_loss",
]
