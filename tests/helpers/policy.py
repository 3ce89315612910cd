"""Policy losses that every route is held to."""

from sspo_ext.formulas.policy import POLICY_FORMULAS

# name -> loss type, level, length_normalize, options
VARIANTS = {
    "reinforce": {"loss_type": "reinforce"},
    "ppo": {"loss_type": "ppo"},
    "clip-higher": {"loss_type": "ppo", "epsilon": 0.1, "epsilon_high": 0.3},
    "dual-clip": {"loss_type": "ppo", "epsilon": 0.1, "delta": 1.2},
    "step": {"loss_type": "ppo", "importance_sampling_level": "step", "epsilon": 0.05},
    "step-product": {"loss_type": "ppo", "importance_sampling_level": "step", "length_normalize": False},
    "gspo": {"loss_type": "ppo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    "rloo": {"loss_type": "ppo", "importance_sampling_level": "sequence", "length_normalize": False},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
}
AGGREGATIONS = ("token", "step", "sequence", "sum")


def with_old(options, old):
    # not `|`, which torch.compile of torch 2.6 does not take
    return {**options, **({"old": old} if POLICY_FORMULAS[options["loss_type"]].has_ratio else {})}
