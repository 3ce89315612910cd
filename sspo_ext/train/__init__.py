# SPDX-License-Identifier: Apache-2.0
"""Thin trainers on `transformers.Trainer`, and what they need.

Names are imported when they are first used, so that the command line's help does not wait for transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data.graders import load_grader
    from ..data.rows import load_preference_rows
    from ..data.tokenize import tokenize_rows
    from .models import load_model
    from .preference_config import StepPreferenceConfig
    from .preference_trainer import StepPreferenceTrainer
    from .sspo_config import SSPOConfig
    from .sspo_trainer import SSPOTrainer

_MODULES = {
    "SSPOConfig": ".sspo_config",
    "SSPOTrainer": ".sspo_trainer",
    "StepPreferenceConfig": ".preference_config",
    "StepPreferenceTrainer": ".preference_trainer",
    "load_grader": "..data.graders",
    "load_model": ".models",
    "load_preference_rows": "..data.rows",
    "tokenize_rows": "..data.tokenize",
}
__all__ = [
    "SSPOConfig",
    "SSPOTrainer",
    "StepPreferenceConfig",
    "StepPreferenceTrainer",
    "load_grader",
    "load_model",
    "load_preference_rows",
    "tokenize_rows",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
