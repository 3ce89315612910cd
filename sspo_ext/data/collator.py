# SPDX-License-Identifier: Apache-2.0
"""Batches of tokenized preference rows, padded or packed, with their step layout. Runs on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ..layout.pairs import StepPairs
from ..layout.steps import StepLayout
from .rows import LARGEST
from .sharing import PrefixSharing

SIDES = ("chosen", "rejected")


@dataclass
class StepPreferenceCollator:
    """Collate features of `tokenize_rows` into a batch.

    The sequences are the chosen responses of all rows, then the rejected ones. The batch holds no "labels": the layout
    has them, and Trainer would scale the loss by token counts if it saw labels.

    Args:
        pad_token_id: any id of the vocabulary. Padding is neither attended to nor scored.
        packed: put all sequences into one row without padding. Call the model with `use_cache=False`; otherwise a
            Hugging Face model sees one long sequence.
        pad_to_multiple_of: round the padded length T up to a multiple.
        vocab_size: check the token ids against it here, where an error can still name the row.
        flash_attention: with `packed`, also return the sequence boundaries under the names that FlashAttention models
            of transformers take. Without it these models compute them from `position_ids`, and each layer then waits
            for the device.
        sharing: compute the tokens that sequences have in common once, where that pays. None never does it.

    Returns:
        A callable: features of n rows -> batch, a dict with

            * "input_ids" and "attention_mask", (2n, T) int64; with `packed` instead "input_ids" and "position_ids",
              (1, total) int64;
            * where sequences share prefixes, "tree", a TokenTree, and its "input_ids" (R, L) int64; the model's other
              inputs are then those of `sspo_ext.tree.tree_inputs`;
            * with `flash_attention`, "cu_seq_lens_q" and "cu_seq_lens_k", (2n + 1,) int32, and "max_length_q" and
              "max_length_k", int;
            * "layout", a StepLayout, and "pairs", a StepPairs, with weights and margins where a row has any;
            * "ref", (S,) float32, the reference sums of the layout's steps, if the features hold "ref_chosen" and
              "ref_rejected".

    Raises:
        ValueError: there are no features, a token is outside the vocabulary, or reference sums do not match the steps.

    Examples:
        >>> from sspo_ext.data.collator import StepPreferenceCollator
        >>> from sspo_ext.data.tokenize import tokenize_rows
        >>> rows = [{"prompt": "6 + 13 = ", "chosen": "19", "rejected": "18"}]
        >>> batch = StepPreferenceCollator(pad_token_id=0)(tokenize_rows(rows, tokenizer, pair_by="sequence"))
        >>> batch["layout"].num_steps
        2
    """

    pad_token_id: int
    packed: bool = False
    pad_to_multiple_of: int | None = None
    vocab_size: int | None = None
    flash_attention: bool = False
    sharing: PrefixSharing | None = None

    def __call__(self, features: Sequence[dict]) -> dict:
        """Collate the features of one or more rows."""
        if not features:
            raise ValueError("features: expected at least one row, got none")
        ids, labels, steps = (
            [torch.tensor(f[f"{side}_{name}"], dtype=torch.int64) for side in SIDES for f in features]
            for name in ("input_ids", "labels", "step_ids")
        )
        names = [str(f.get("source") or "a row without a source") for f in features] * 2
        if self.vocab_size is not None:
            _check_ids(ids, names, self.vocab_size)
        groups = [*range(len(features))] * 2
        tree = None if self.sharing is None else self.sharing.tree(ids, groups, self.pad_token_id)
        if tree is not None:
            layout = StepLayout.from_tree(tree, labels, steps, vocab_size=self.vocab_size)
            batch: dict = {"input_ids": tree.input_ids, "tree": tree}
        else:
            batch, layout = (self._pack if self.packed else self._pad)(ids, labels, steps)
        counts = [_num_steps(row) for row in steps]
        base = [0, *accumulate(counts)]
        n = len(features)
        index = [(base[i] + c, base[n + i] + r) for i, f in enumerate(features) for c, r in f["pairs"]]

        def per_pair(name: str, default: float) -> torch.Tensor | None:
            values = [f.get(name, default) for f in features for _ in f["pairs"]]
            for feature, where in zip(features, names, strict=False):
                if not abs(value := feature.get(name, default)) <= LARGEST:
                    raise ValueError(f"{name}: expected a finite number of float32, got {value!r} in {where}")
            return torch.tensor(values, dtype=torch.float32) if any(v != default for v in values) else None

        index = torch.tensor(index, dtype=torch.int64).reshape(-1, 2)
        pairs = StepPairs.from_index(layout, index, weights=per_pair("weight", 1.0), margins=per_pair("margin", 0.0))
        batch |= {"layout": layout, "pairs": pairs}
        if any("ref_chosen" in f for f in features):
            ref = [torch.as_tensor(f[f"ref_{side}"], dtype=torch.float32) for side in SIDES for f in features]
            for got, count, where in zip(ref, counts, names, strict=True):
                if got.shape != (count,):
                    raise ValueError(f"ref: expected {count} step sums for {where}, got shape {tuple(got.shape)}")
            batch["ref"] = torch.cat(ref)
        return batch

    def _pad(self, ids: list, labels: list, steps: list) -> tuple[dict, StepLayout]:
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(map(len, ids)) // multiple) * multiple

        def stack(rows: list, value: int) -> torch.Tensor:
            return torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows])

        layout = StepLayout.from_step_ids(stack(labels, -100), stack(steps, -1), vocab_size=self.vocab_size)
        attention = stack([torch.ones_like(row) for row in ids], 0)
        return {"input_ids": stack(ids, self.pad_token_id), "attention_mask": attention}, layout

    def _pack(self, ids: list, labels: list, steps: list) -> tuple[dict, StepLayout]:
        starts = [0, *accumulate(map(len, ids))]
        spans = [
            (start + int(where[0]), start + int(where[-1]) + 1)
            for start, row in zip(starts[:-1], steps, strict=True)
            for k in range(_num_steps(row))
            for where in [(row == k).nonzero()[:, 0]]
        ]
        cu_seqlens = torch.tensor(starts)
        spans = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)
        layout = StepLayout.from_offsets(torch.cat(labels), cu_seqlens, spans, vocab_size=self.vocab_size)
        position_ids = torch.cat([torch.arange(len(row)) for row in ids])
        batch = {"input_ids": torch.cat(ids)[None], "position_ids": position_ids[None]}
        if self.flash_attention:
            longest, boundaries = max(map(len, ids)), cu_seqlens.to(torch.int32)
            batch |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
            batch |= {"max_length_q": longest, "max_length_k": longest}
        return batch, layout


def _check_ids(ids: Sequence[torch.Tensor], names: Sequence[str], vocab_size: int) -> None:
    """ValueError, naming the row, for a token that the model has no embedding of."""
    for row, name in zip(ids, names, strict=True):
        if len(row) and not 0 <= int(row.min()) <= int(row.max()) < vocab_size:
            wrong = int(row.min() if int(row.min()) < 0 else row.max())
            raise ValueError(f"input_ids: expected tokens in [0, {vocab_size}), got {wrong} in {name}")


def _num_steps(step_ids: torch.Tensor) -> int:
    return int(step_ids.max()) + 1 if len(step_ids) else 0
