# SPDX-License-Identifier: Apache-2.0
"""`step_pref_loss` as a module, for code that holds its loss as one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor, nn

from ..layout.pairs import StepPairs
from ..layout.steps import StepLayout
from ..objective.pair_arguments import checked_options, chosen_formulas
from .pref import StepPrefOutput, step_pref_loss


class StepPrefLoss(nn.Module):
    """`step_pref_loss` with its options bound, as a module.

    Args:
        loss_type: as in `step_pref_loss`.
        beta: as in `step_pref_loss`.
        **options: further keyword arguments of `step_pref_loss`; checked at once.

    Examples:
        >>> criterion = StepPrefLoss(loss_type="ipo", beta=0.2, reference_free=True)
        >>> criterion(logits, layout, pairs).loss.backward()
    """

    def __init__(self, loss_type: str | Sequence[str] = "sigmoid", beta: float | None = None, **options):
        super().__init__()
        common = inspect.signature(step_pref_loss).parameters
        formulas = chosen_formulas(loss_type, options.get("loss_weights"))
        checked_options(formulas, beta, {k: v for k, v in options.items() if k not in common})
        self.options = {"loss_type": loss_type, "beta": beta, **options}

    def forward(
        self,
        logits: Tensor,
        layout: StepLayout | Tensor | None = None,
        steps_or_pairs: StepPairs | Tensor | None = None,
        **kwargs,
    ) -> StepPrefOutput:
        """`step_pref_loss` of these logits; keyword arguments replace bound options.

        Args:
            logits: as in `step_pref_loss`.
            layout: as in `step_pref_loss`.
            steps_or_pairs: as in `step_pref_loss`.
            **kwargs: further arguments of `step_pref_loss`.

        Returns:
            StepPrefOutput.
        """
        return step_pref_loss(logits, layout, steps_or_pairs, **{**self.options, **kwargs})

    def extra_repr(self) -> str:
        """The bound options."""
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items() if v is not None)
