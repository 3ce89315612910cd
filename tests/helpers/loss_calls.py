# SPDX-License-Identifier: Apache-2.0
"""A call of every loss on step log-probs."""

import torch

from sspo_ext.losses.lists import listwise_loss, plackett_luce_loss, tpo_l_loss, tpo_loss, trpa_loss
from sspo_ext.losses.targets import direct_advantage_loss, implicit_prm_loss, oreo_loss, oreo_value_loss
from sspo_ext.losses.tokens import full_step_dpo_loss, tdpo1_loss, tdpo2_loss
from sspo_ext.losses.transport import aot_loss, aot_unpaired_loss
from sspo_ext.losses.unpaired import apo_zero_unpaired_loss, kto_loss

F64 = torch.float64


def calls(layout, g):
    """name -> loss of (logps): every registered function on any layout with a few steps."""
    S, B = layout.num_steps, layout.num_sequences
    ref = torch.randn(S, generator=g, dtype=F64)
    pairs = torch.stack([torch.arange(S - 1), torch.arange(1, S)], 1)
    lists = torch.randint(-1, S, (3, 4), generator=g)
    up, gold, solutions = torch.rand(S, generator=g) < 0.5, torch.tensor([S - 1, 0]), torch.tensor([[0, 1], [1, 0]])
    per_step, per_sequence = torch.rand(S, generator=g), torch.rand(B, generator=g)
    rows = torch.randn(layout.shape, generator=g, dtype=F64)
    return {
        "direct_advantage": lambda x: direct_advantage_loss(x, layout, per_step, ref=ref),
        "oreo": lambda x: oreo_loss(x, layout, per_step, per_sequence, ref=ref, kl_coef=0.1),
        "oreo_value": lambda x: oreo_value_loss(x, layout, x.sums.float(), per_sequence, ref=ref),
        "implicit_prm": lambda x: implicit_prm_loss(x, layout, per_sequence, ref=ref),
        "kto": lambda x: kto_loss(x, layout, up, ref=ref, reference_point=0.3),
        "apo_zero_unpaired": lambda x: apo_zero_unpaired_loss(x, layout, up, ref=ref),
        "aot": lambda x: aot_loss(x, layout, pairs, ref=ref),
        "aot_unpaired": lambda x: aot_unpaired_loss(x, layout, pairs, ref=ref),
        "plackett_luce": lambda x: plackett_luce_loss(x, layout, lists, ref=ref),
        "listwise": lambda x: listwise_loss(x, layout, lists, lists.float(), ref=ref),
        "tpo": lambda x: tpo_loss(x, layout, pairs, gold),
        "tpo_l": lambda x: tpo_l_loss(x, layout, pairs, gold),
        "trpa": lambda x: trpa_loss(x, layout, pairs, up[1:], ref=ref),
        "tdpo1": lambda x: tdpo1_loss(x, layout, pairs, ref=ref),
        "tdpo2": lambda x: tdpo2_loss(x, layout, pairs, ref=ref),
        "full_step_dpo": lambda x: full_step_dpo_loss(x, layout, solutions, per_step, ref=rows),
    }
