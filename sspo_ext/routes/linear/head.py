# SPDX-License-Identifier: Apache-2.0
"""The LM head applied to a chunk of rows: logits, log-probs, gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import backends
from ...backends.addresses import accumulator
from .budget import whole_tiles
from .plan import LinearPlan
from .shards import VocabShard


@dataclass
class Head:
    """The LM head of one call, in the dtype of its GEMMs, and the row kernels for its logits."""

    weight: Tensor  # (V, H), or this rank's rows of it
    bias: Tensor | None  # (V,)
    a: float
    c: float
    backend: str
    shard: VocabShard | None
    batch_invariant: bool

    def __post_init__(self):
        self.kernels = backends.load(self.backend)
        self.vocab = self.weight.shape[0]
        self.acc_dtype = accumulator(self.weight.dtype)

    def allocate(self, plan: LinearPlan) -> None:
        """Allocates the logits buffer and its row numbers for the plan's chunks."""
        rows, device = whole_tiles(min(plan.chunk_rows, plan.num_rows), plan.tile), self.weight.device
        # a GPU's GEMMs are slow on rows that lie anywhere, as those of an odd vocabulary would
        aligned = self.batch_invariant or device.type != "cpu"
        self.buffer = self._rows(rows, self.vocab, 128 if aligned else self.weight.itemsize)
        if self.batch_invariant:
            self.tile = self._rows(plan.tile, self.weight.shape[1], 128).zero_()
        self.row_ids = torch.arange(rows, device=device)
        self.row_of = self.row_ids.to(torch.int32)
        self.ones = torch.ones(rows, dtype=self.acc_dtype, device=device)

    def _rows(self, count: int, columns: int, alignment: int) -> Tensor:
        """(count, columns), empty, in rows that lie alike in `alignment` bytes."""
        line = alignment // self.weight.itemsize
        return self.empty((count, -(-columns // line) * line), self.weight.dtype)[:, :columns]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """torch.empty on the weight's device."""
        if self.backend == "cpu":
            return self.kernels.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.weight.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) into the buffer.

        With batch_invariant by products of one shape on operands that lie alike in memory, since a library chooses its
        tiling by both. Whatever else is in a tile, and wherever the row is, its logits have the same bits.
        """
        n = hidden.shape[0]
        if not self.batch_invariant:
            return self._product(hidden, self.buffer[:n])
        for part in range(0, n, self.tile.shape[0]):
            some = hidden[part : part + self.tile.shape[0]]
            self.tile[: some.shape[0]] = some
            self._product(self.tile, self.buffer[part : part + self.tile.shape[0]])
        return self.buffer[:n]

    def _product(self, hidden: Tensor, out: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def logps(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) log-probs and log-sum-exps of a chunk, always over the whole vocabulary."""
        row_ids = self.row_ids[: logits.shape[0]]
        if self.shard is None:
            return self.kernels.token_logp_fwd(logits[None], row_ids, labels, self.a, self.c)
        local = self.shard.local_labels(labels)
        logps, lse = self.kernels.token_logp_fwd(logits[None], row_ids, local, self.a, self.c)
        return self.shard.combine(logps, lse, local)

    def to_gradient(self, logits: Tensor, labels: Tensor, lse: Tensor, coef: Tensor | None) -> Tensor:
        """Overwrites the chunk's logits with d/dlogits for d/dlogp `coef` (n,); without it, with d logp/dlogits."""
        n = logits.shape[0]
        labels = labels if self.shard is None else self.shard.local_labels(labels)
        coef = self.ones[:n] if coef is None else coef
        row_of, out = self.row_of[:n], logits[None]
        self.kernels.token_logp_bwd(out, row_of, labels, lse, coef, None, self.a, self.c, out)
        return logits

    def reductions(
        self, logits: Tensor, labels: Tensor, ref_logits: Tensor | None, sum_p2: bool = True
    ) -> tuple[Tensor, ...]:
        """`row_reductions_fwd` of a chunk, always over the whole vocabulary."""
        row_ids, a, c = self.row_ids[: logits.shape[0]], self.a, self.c
        labels = labels if self.shard is None else self.shard.local_labels(labels)
        ref = None if ref_logits is None else ref_logits[None]
        parts = self.kernels.row_reductions_fwd(logits[None], row_ids, labels, ref, a, c, True, sum_p2)
        if self.shard is None:
            return parts
        logps, lse, entropy, squares, kl, ref_lse = parts
        if ref is not None:  # the kernel does not read the reference where the policy has no probability in a shard
            ref_lse = self.kernels.token_logp_fwd(ref, row_ids, labels, a, c)[1]
        return self.shard.combine_reductions(logps, lse, entropy, squares, kl, ref_lse, labels)

    def reductions_to_gradient(
        self, logits: Tensor, labels: Tensor, lse: Tensor, ref_logits: Tensor | None, ref_lse: Tensor, coefs: Tensor
    ) -> None:
        """Overwrites the chunk's logits with d/dlogits for coefs (n, 5) of `shared.gradient_coefs`."""
        labels = labels if self.shard is None else self.shard.local_labels(labels)
        ref, out = None if ref_logits is None else ref_logits[None], logits[None]
        row_of = self.row_of[: logits.shape[0]]
        self.kernels.row_reductions_bwd(out, row_of, labels, lse, ref, ref_lse, coefs, self.a, self.c, out)
