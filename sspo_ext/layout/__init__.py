# SPDX-License-Identifier: Apache-2.0
"""Which tokens are scored, which step each belongs to, and which step should win; sequences as trees."""

from .pairs import StepPairs
from .steps import StepLayout
from .tree import TokenTree

__all__ = ["StepLayout", "StepPairs", "TokenTree"]
