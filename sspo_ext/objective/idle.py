# SPDX-License-Identifier: Apache-2.0
"""Rows of a policy loss that no gradient reaches: those whose advantage is 0, as far as the host knows.

With an advantage of 0 every formula is 0 whatever the log-prob. A row that shares the ratio of its step or sequence
moves the others, so such a unit is idle only as a whole. KL and an entropy bonus move every row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..layout.steps import StepLayout


def units_on_host(layout: StepLayout, level: str) -> np.ndarray | None:
    """(U + 1,): the rows of each unit that shares a ratio, one after the other; None: each row is one."""
    if level == "token":
        return None
    return (layout.host_step_offsets if level == "step" else layout.host_sequence_offsets).numpy()


def idle_rows(advantages: Tensor, layout: StepLayout, units: np.ndarray | None) -> np.ndarray | None:
    """(N,) bool of the layout's rows; None where none is idle, or where the host would have to wait to know.

    `advantages` are checked already, in any of their forms. (B, T) ones are read beside a layout on the host alone.
    """
    if advantages.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    zero = (advantages == 0).numpy()
    if zero.shape == (layout.num_steps,):
        zero = np.repeat(zero, np.diff(layout.host_step_offsets.numpy()))
    elif zero.shape != (layout.num_rows,):
        if layout.device.type != "cpu":
            return None
        zero = zero.reshape(-1)[layout.places.numpy()]
    if units is not None:
        busy = np.concatenate([[0], np.cumsum(~zero)])[units]
        zero = np.repeat(np.diff(busy) == 0, np.diff(units))
    return zero if zero.any() else None


def offsets_among(offsets: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """CSR offsets over rows, as they are when only the `kept` rows, ascending, are left."""
    return np.searchsorted(kept, offsets)
