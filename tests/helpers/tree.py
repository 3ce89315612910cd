# SPDX-License-Identifier: Apache-2.0
"""Random trees of sequences, and what they stand for: the same sequences in a padded batch, whose logits are gathered.

`logits_plain[b, t] = logits_tree[place of token t of sequence b]`, so autograd through this gather gives the loss and
the gradients that a tree must give, by code that knows nothing of trees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout
from sspo_ext.layout.tree import TokenTree
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.policy import step_policy_loss
from sspo_ext.losses.pref import step_pref_loss


def pad(sequences: list[Tensor], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=fill)


@dataclass
class TreeBatch:
    tree: TokenTree
    labels: list[Tensor]
    step_ids: list[Tensor]
    token_weights: list[Tensor] | None
    logits: Tensor  # (R, L, V)

    def __post_init__(self):
        self.layout = StepLayout.from_tree(self.tree, self.labels, self.step_ids, token_weights=self.token_weights)
        weights = None if self.token_weights is None else pad(self.token_weights, 1)
        self.plain = StepLayout.from_step_ids(pad(self.labels, -100), pad(self.step_ids, -1), token_weights=weights)
        lengths = self.tree.host_offsets.diff().tolist()
        self.place = pad(list(self.tree.host_place.split(lengths)), 0)  # (B, T)

    def unshared(self, grid: Tensor) -> Tensor:
        """(R, L, ...) of the tree -> (B, T, ...) of the padded batch."""
        return grid.flatten(0, 1)[self.place]


def random_tree(
    seed: int, B: int = 7, V: int = 11, T: int = 12, *, weighted: bool = False, dtype=torch.float32,
    max_tokens: int | None = None, groups: list[int] | None = None,
) -> TreeBatch:  # fmt: skip
    """Sequences that continue a beginning of another: at any token, by nothing, or as a duplicate; one may be empty.

    What a sequence scores of a shared token, in which step and with which weight, is its own affair.
    """
    g = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    sequences = [torch.randint(0, V, (T,), generator=g)]
    for _ in range(B - 1):
        source = sequences[integer(0, len(sequences))]
        keep, more = integer(0, len(source) + 1), integer(0, 4) and integer(0, max(T // 2, 1))
        sequences.append(torch.cat([source[:keep], torch.randint(0, V, (more,), generator=g)]))
    labels, step_ids, weights = [], [], []
    for sequence in sequences:
        length = len(sequence)
        label, ids = sequence.clone(), torch.full((length,), -1)
        step = integer(0, 2) if length > 3 else 0
        for t in range(integer(0, max(length // 3, 1)), length):
            ids[t] = step
            step += (integer(0, 3) == 0) * (1 + (integer(0, 5) == 0)) if step < length - 3 else 0
        if length > 4 and integer(0, 3) == 0:
            label[length // 2] = -100
        label[ids < 0] = -100
        weight = torch.rand(length, generator=g) * 2 + 0.1
        weight[torch.rand(length, generator=g) < 0.2] = 0
        labels.append(label)
        step_ids.append(ids)
        weights.append(weight)
    tree = TokenTree.from_sequences(sequences, max_tokens=max_tokens, groups=groups)
    logits = torch.randn(*tree.shape, V, generator=g, dtype=torch.float64) * 3
    return TreeBatch(tree, labels, step_ids, weights if weighted else None, logits.to(dtype))


def pairs_of(layout: StepLayout, seed: int = 0, count: int = 9) -> StepPairs:
    g = torch.Generator().manual_seed(seed)
    winner = torch.randint(0, layout.num_steps, (count,), generator=g)
    loser = (winner + 1 + torch.randint(0, layout.num_steps - 1, (count,), generator=g)) % layout.num_steps
    return StepPairs.from_index(layout, torch.stack([winner, loser], 1), weights=torch.rand(count, generator=g))


def losses(batch: TreeBatch):
    """name -> loss of (logits, layout, options): a pair loss, a policy loss with entropy, and step log-probs."""
    layout = batch.layout
    g = torch.Generator().manual_seed(3)
    pairs, advantages = pairs_of(layout), torch.randn(layout.num_steps, generator=g)
    tokens = step_logps(batch.logits.double(), layout, backend="reference").tokens.float()
    old, factors = tokens + torch.randn(tokens.shape, generator=g) * 0.2, torch.randn(tokens.shape, generator=g)

    def pair(logits, own, **more):
        return step_pref_loss(logits, own, pairs, reference_free=True, **more).loss

    def policy(logits, own, **more):
        return step_policy_loss(logits, own, advantages, old=old, loss_type="ppo", aggregation="step", **more).loss

    def entropy(logits, own, **more):
        options = {"old": old, "ref": old, "kl_coef": 0.1, "entropy_coef": 0.1, "loss_type": "ppo"}
        return step_policy_loss(logits, own, advantages, **options, **more).loss

    def logps(logits, own, **more):
        return (step_logps(logits, own, **more).tokens * factors.to(logits.device)).sum()

    return {"pair": pair, "policy": policy, "entropy": entropy, "logps": logps}
