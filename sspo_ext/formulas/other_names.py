# SPDX-License-Identifier: Apache-2.0
"""Names of methods that are no loss types here, and what to ask for instead."""

from __future__ import annotations

from collections.abc import Collection

_DPO = "DPO's loss is called 'sigmoid'; with pair_by='sequence' it compares whole responses"
_STEP_DPO = "it is 'sigmoid' on rows with a branch, or with pair_by='branch'"
_POLICY = "is a policy loss: call step_policy_loss, or sspo-ext rl"
_PAIR = "is a preference loss: call step_pref_loss, or sspo-ext train"

POLICY_NAMES = ("reinforce", "ppo", "cispo")

_PAIR_NAMES = ("sigmoid", "hinge", "ipo", "simpo", "cpo", "orpo", "kto")

_FOR_PAIRS = {
    "dpo": _DPO,
    "step_dpo": _STEP_DPO,
    "rso": "RSO's loss is called 'hinge'",
    "cdpo": "it is 'sigmoid' with label_smoothing",
    "rpo": "it is a mixture: loss_type ['sigmoid', 'sft']",
    "apo": "it is called 'apo_zero' or 'apo_down'",
}

_FOR_POLICIES = {
    "grpo": "GRPO's loss is called 'ppo', with aggregation='sequence'; its advantages are baseline='grpo'",
    "dr_grpo": "Dr. GRPO's loss is called 'ppo', with aggregation='sum'; its advantages are baseline='dr_grpo'",
    "dapo": "DAPO's loss is called 'ppo', with aggregation='token' and epsilon_high=0.28",
    "bnpo": "it is called 'ppo', with aggregation='token'",
    "gspo": "GSPO's loss is called 'ppo', with importance_sampling_level='sequence'",
    "rloo": "it is called 'reinforce'; RLOO's advantages are baseline='rloo'",
    "reinforce++": "it is called 'ppo'; its advantages are baseline='reinforce++'",
    "pg": "it is called 'reinforce'",
    "sspo": "it is called 'reinforce', on the advantages of steps; sspo-ext rl makes them",
}


def check_loss_name(name: object, known: Collection[str], *, policy: bool) -> None:
    """ValueError for the name of a method that is called otherwise here, or of a loss of the other kind.

    Args:
        name: what was asked for.
        known: the names of this kind of loss.
        policy: whether this kind is the policy losses.
    """
    if not isinstance(name, str) or name in known:
        return
    plain = name.lower().replace("-", "_")
    mine, theirs = (_FOR_POLICIES, _FOR_PAIRS) if policy else (_FOR_PAIRS, _FOR_POLICIES)
    if plain in mine:
        raise ValueError(f"loss_type: expected the name of a loss, got {name!r}; {mine[plain]}")
    if plain in theirs or plain in (_PAIR_NAMES if policy else POLICY_NAMES):
        raise ValueError(f"loss_type: {name!r} {_PAIR if policy else _POLICY}")
    if plain in known:
        raise ValueError(f"loss_type: expected {plain!r}, got {name!r}")
