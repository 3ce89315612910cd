# SPDX-License-Identifier: Apache-2.0
"""Which tokens are scored, which step each belongs to, and which step should win."""

from .pairs import StepPairs
from .steps import StepLayout

__all__ = ["StepLayout", "StepPairs"]
