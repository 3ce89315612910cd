# SPDX-License-Identifier: Apache-2.0
"""Whether and how the sequences of a batch share their prefixes: by a count of what the model computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..layout.tree import TokenTree

PREFIX_SHARING = ("auto", True, False)

_WORTH = 0.95  # of the unshared cost, at most: below it the count is surer than its own errors


@dataclass(frozen=True)
class PrefixSharing:
    """How a collator makes trees of its sequences.

    A shared prefix saves the layers' products. But where attention computes all pairs of a row, a token's queries also
    meet the keys of other branches. So the trees are cut where the sum of both is smallest, as `cost` counts it.

    Args:
        always: whether sequences are shared even where it costs more than it saves. Then it is the cheapest tree.
        token_cost: what a token costs in a model's layers without its attention, in units of one query and one key.
        attention: the model's for trees. "flex_attention" and "sspo_tree" skip pairs that do not see each other, others
            compute them.
        one_row: whether all trees are put into one row, without padding.
    """

    always: bool = False
    token_cost: float = 4096.0
    attention: str = "sdpa"
    one_row: bool = False

    @property
    def skips(self) -> bool:
        """Whether attention skips pairs that do not see each other."""
        return self.attention in ("flex_attention", "sspo_tree")

    def tree(self, sequences: Sequence[Tensor], groups: Sequence[int], pad_token_id: int = 0) -> TokenTree | None:
        """The cheapest tree of a batch, or None where the batch is cheaper without one.

        Args:
            sequences: B sequences of token ids.
            groups: (B,) int: sequences that are known to share much, such as those of one prompt, have one number.
            pad_token_id: the token id at padding.

        Returns:
            A TokenTree on the host, or None.
        """
        lengths = np.array([len(ids) for ids in sequences])
        longest, total = int(lengths.max(initial=1)), int(lengths.sum())

        def made(groups: Sequence[int] | None, max_tokens: int | None) -> TokenTree:
            return TokenTree.from_sequences(sequences, groups=groups, max_tokens=max_tokens, pad_token_id=pad_token_id)

        if self.one_row:
            found = [made(groups, max(total, 1)), made(None, max(total, 1))]
            unshared = total * self.token_cost + (longest * total if self.skips else total * total)
        else:
            found = [made(groups, None)]
            if not self.skips:  # long rows cost what nobody sees
                sizes = {-(-found[0].shape[1] // n) for n in (1, 2, 4)}
                found += [made(None, size) for size in sizes if size >= longest]
            found.append(made(None, None))
            unshared = len(lengths) * longest * (self.token_cost + longest)
        best = min(found, key=self.cost)
        return best if self.always or self.cost(best) < _WORTH * unshared else None

    def cost(self, tree: TokenTree) -> float:
        """What a forward of the tree costs, in units of one query and one key."""
        rows, length = tree.shape
        if self.skips:
            return rows * length * self.token_cost + float(tree.position_ids.sum()) + tree.num_tokens
        return rows * length * (self.token_cost + length)
