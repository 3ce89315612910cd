"""Thin trainers on `transformers.Trainer`, and what they need.

Names are imported when they are first used, so that the command line's help does not wait for transformers.
"""

from importlib import import_module

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
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
