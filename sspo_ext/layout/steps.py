# SPDX-License-Identifier: Apache-2.0
"""Which rows of the logits are scored, and which step each belongs to: built once, on the host.

Everything that would need a device sync later (validation, compaction, step boundaries) happens here, so that a loss
consists of kernels alone. Build layouts in the collator: labels and step ids are then already on the host, and
`.to(device)` is a handful of small async copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .._checks import check_count, check_float, check_integer, check_shape, check_tensor, check_whole, describe
from .bundle import Steps, constant
from .kept import KeptTokens, kept_tokens
from .pairs import StepPairs, index_pairs
from .response import refuse_logits, response_fields
from .spans import packed_tokens
from .tokens import Tokens, label_message, refuse_ids
from .tree import TokenTree
from .tree_rows import TreeRows, padded_sequences, rows_of_tree


@dataclass(frozen=True, eq=False, repr=False)
class StepLayout(Steps):
    """Rows and steps of a batch of B sequences of padded length T. Build it with a `from_...` classmethod.

    A row is the logits of one position, and a scored row has a label. `labels` are unshifted, like Hugging Face's: the
    logits at position t - 1 predict the label at t, in the same sequence. A sequence's first token has no row. Rows are
    ascending, and the rows of a step are contiguous. In a tree of sequences U rows serve N scored tokens, and what is
    said below of N rows is said of the tokens, in the order of the sequences.

    Examples:
        >>> layout = StepLayout.from_step_ids(labels, step_ids)
        >>> layout = layout.to("cpu")  # all its tensors at once
    """

    rows: Tensor  # (N,) int64, (U,) of a tree: position b*T + t of the logits that predict the scored token
    labels: Tensor  # (N,) int64 in [0, V), (U,) of a tree
    weights: Tensor | None  # (N,) float32, none of them 0; None when all are 1
    step_offsets: Tensor  # (S + 1,) int32, CSR over rows; an empty step has equal neighbours
    step_of_row: Tensor  # (N,) int64
    step_sequence: Tensor  # (S,) int32: the sequence each step is in
    sequence_offsets: Tensor  # (B + 1,) int32, CSR over rows: those of each sequence
    row_of: Tensor  # (B*T,) int32: the row of a position, -1 where nothing is scored
    shape: tuple[int, int]  # (B, T); (1, total) for a packed batch
    num_sequences: int
    host_step_offsets: Tensor  # (S + 1,) int64
    host_step_sequence: Tensor  # (S,) int64
    host_sequence_offsets: Tensor  # (B + 1,) int64
    max_label: tuple[int, int, int] | None  # (value, sequence, position) of the largest label, for the check against V
    one_row_per_step: bool
    tree_rows: TreeRows | None = None  # of a tree
    kept: KeptTokens | None = None

    @property
    def num_rows(self) -> int:
        """N, the number of scored rows; in a tree of scored tokens, one for each sequence that scores it."""
        return self.step_of_row.shape[0]

    @property
    def places(self) -> Tensor:
        """(N,) int64: position b*T + t of each scored token itself."""
        return self.rows + 1 if self.tree_rows is None else self.tree_rows.places

    @property
    def num_steps(self) -> int:
        """S, the number of steps, empty ones included."""
        return self.step_sequence.shape[0]

    @property
    def counts(self) -> Tensor:
        """(S,) int32: scored tokens of each step."""
        return self.step_offsets[1:] - self.step_offsets[:-1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.rows.device

    def __repr__(self) -> str:
        kind = "packed, " if self.shape[0] == 1 and self.num_sequences != 1 else ""
        if self.tree_rows is not None:
            kind = f"tree of {self.rows.shape[0]} rows, "
        return (
            f"StepLayout({kind}sequences={self.num_sequences}, shape={self.shape}, rows={self.num_rows}, "
            f"steps={self.num_steps}, device={self.device})"
        )

    @classmethod
    def from_step_ids(
        cls,
        labels: Tensor,
        step_ids: Tensor,
        *,
        token_weights: Tensor | None = None,
        ignore_index: int = -100,
        vocab_size: int | None = None,
    ) -> StepLayout:
        """Layout of a padded batch.

        A step is the tokens of one sequence with the same id. Unscored tokens inside it (a tool's output) do not split
        it. An id that is left out, or whose tokens are all unscored, is an empty step. Tensors on a device are copied
        to the host once (a sync).

        Args:
            labels: (B, T) int, unshifted; `ignore_index` where nothing is scored.
            step_ids: (B, T) int: 0, 1, 2, ... along each sequence, -1 where nothing is scored.
            token_weights: (B, T) float, the constant weight of each token; a weight of 0 leaves the token unscored.
            ignore_index: the label that is not scored.
            vocab_size: V, to check the labels here and not first at the loss.

        Returns:
            A StepLayout on the device of `labels`.

        Raises:
            TypeError: An argument is no tensor, or of a wrong dtype.
            ValueError: A label is outside [0, vocab_size), step ids go backwards, or shapes do not agree. The message
                names sequence and position.

        Examples:
            >>> StepLayout.from_step_ids(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[-1, 0, 0, 1]])).rows
            tensor([0, 1, 2])
        """
        check_integer("labels", labels, ndim=2)
        check_integer("step_ids", step_ids)
        check_shape("step_ids", step_ids, tuple(labels.shape))
        batch, length = labels.shape
        ids = step_ids.cpu().numpy().astype(np.int64)
        running = np.maximum.accumulate(ids, axis=1)
        refuse_ids(ids < -1, ids, "step_ids", "0, 1, 2, ... or -1 (not scored)")
        refuse_ids((ids >= 0) & (ids < running), ids, "step_ids", "ids that never go back along a sequence")
        refuse_ids(ids >= length, ids, "step_ids", f"ids below the sequence length {length}")
        steps = running[:, -1] + 1 if length else np.zeros(batch, np.int64)
        base = np.cumsum(steps) - steps
        tokens = Tokens(
            step=np.where(ids >= 0, ids + base[:, None], -1),
            sequence=np.broadcast_to(np.arange(batch)[:, None], ids.shape),
            position=np.broadcast_to(np.arange(length), ids.shape),
        )
        step_sequence = np.repeat(np.arange(batch), steps)
        return cls._build(labels, tokens, step_sequence, batch, token_weights, ignore_index, vocab_size)

    @classmethod
    def from_offsets(
        cls,
        labels: Tensor,
        cu_seqlens: Tensor,
        step_offsets: Tensor,
        *,
        token_weights: Tensor | None = None,
        ignore_index: int = -100,
        vocab_size: int | None = None,
    ) -> StepLayout:
        """Layout of a packed (padding-free) batch, whose logits are (total, V) or (1, total, V).

        With S + 1 offsets, steps follow each other from 0 to total without gaps, so every sequence starts a step, and
        prompt tokens carry `ignore_index`. With (S, 2) spans, tokens between spans are not scored. No label is ever
        predicted from another sequence. An empty step belongs to the sequence in which it starts.

        Args:
            labels: (total,) int, unshifted: the labels of all sequences, one after the other.
            cu_seqlens: (B + 1,) int: where each sequence starts; the last entry is total.
            step_offsets: (S + 1,) int: step k is tokens [step_offsets[k], step_offsets[k + 1]); or (S, 2) spans.
            token_weights: (total,) float, the constant weight of each token; a weight of 0 leaves the token unscored.
            ignore_index: the label that is not scored.
            vocab_size: V, to check the labels here and not first at the loss.

        Returns:
            A StepLayout of shape (1, total) on the device of `labels`.

        Raises:
            TypeError: An argument is no tensor, or of a wrong dtype.
            ValueError: A step crosses a sequence boundary, offsets are not ascending, or a label is out of range.

        Examples:
            >>> packed = torch.tensor([-100, 6, 7, -100, 9])
            >>> StepLayout.from_offsets(packed, torch.tensor([0, 3, 5]), torch.tensor([[1, 3], [4, 5]])).rows
            tensor([0, 1, 3])
        """
        check_integer("labels", labels, ndim=1)
        check_integer("cu_seqlens", cu_seqlens, ndim=1)
        check_integer("step_offsets", step_offsets, ndim=(1, 2))
        total = labels.shape[0]
        tokens, step_sequence, count = packed_tokens(cu_seqlens, step_offsets, total)
        if token_weights is not None:
            check_shape("token_weights", token_weights, (total,))
            token_weights = token_weights[None]
        return cls._build(labels[None], tokens, step_sequence, count, token_weights, ignore_index, vocab_size)

    @classmethod
    def from_tree(
        cls,
        tree: TokenTree,
        labels: Sequence[Tensor],
        step_ids: Sequence[Tensor],
        *,
        token_weights: Sequence[Tensor] | None = None,
        ignore_index: int = -100,
        vocab_size: int | None = None,
    ) -> StepLayout:
        """Layout of B sequences whose common beginnings the model reads once; logits are those of the tree's grid.

        Losses, steps, pairs and everything of length N are those of the same B sequences in a padded batch. A token
        that several sequences score is read once, and its gradient is the sum of theirs. Values (B, T) aligned with
        labels are here values (R, L) aligned with the grid.

        Args:
            tree: TokenTree of the sequences, a grid of (R, L) positions.
            labels: for each sequence (its length,) int, unshifted, as in `from_step_ids`.
            step_ids: for each sequence (its length,) int, as in `from_step_ids`.
            token_weights: for each sequence (its length,) float.
            ignore_index: the label that is not scored.
            vocab_size: V, to check the labels here and not first at the loss.

        Returns:
            A StepLayout of shape (R, L) on the device of the tree.

        Raises:
            TypeError: An argument is no list of tensors, or of a wrong dtype.
            ValueError: As `from_step_ids`; or a tensor is not as long as its sequence.

        Examples:
            >>> ids = [torch.tensor([5, 6, 7]), torch.tensor([5, 6, 8])]
            >>> tree = TokenTree.from_sequences(ids)
            >>> StepLayout.from_tree(tree, ids, [torch.tensor([-1, -1, 0])] * 2).rows
            tensor([1, 1])
        """
        label, ids, weights = padded_sequences(tree, labels, step_ids, token_weights, ignore_index)
        built = cls.from_step_ids(label, ids, token_weights=weights, ignore_index=ignore_index, vocab_size=vocab_size)
        rows = rows_of_tree(tree, built.rows.numpy(), built.labels.numpy(), label.shape[1])
        return replace(built, **rows).to(tree.input_ids.device)

    @classmethod
    def from_response(
        cls, mask: Tensor, step_ids: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> StepLayout:
        """Layout of tokens whose log-probs an engine has computed already, for `policy_loss` and `pref_loss`.

        It has no labels, so losses of logits and hidden states refuse it. The first column counts too: engines hand
        over the log-probs of a response's tokens, and its first token is predicted from the prompt. Values (B, T) that
        a loss takes beside it are aligned with the mask. Tensors on a device are copied to the host once (a sync).

        Args:
            mask: (B, T) bool or number, nonzero where the model wrote the token; (total,) with `cu_seqlens`.
            step_ids: int of the same shape: 0, 1, 2, ... along each sequence, -1 where nothing is scored. A token is
                scored where both say so. None: each sequence is one step.
            cu_seqlens: (B + 1,) int, for sequences laid end to end: where each one starts, and total.

        Returns:
            A StepLayout on the device of `mask`.

        Raises:
            TypeError: An argument is no tensor, or of a wrong dtype.
            ValueError: Step ids go backwards, or shapes do not agree. The message names sequence and position.

        Examples:
            >>> layout = StepLayout.from_response(torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 0, 1, 1]]))
            >>> layout.counts
            tensor([2, 1], dtype=torch.int32)
        """
        return cls(**response_fields(mask, step_ids, cu_seqlens))

    @classmethod
    def _build(
        cls,
        labels: Tensor,  # (B, T)
        tokens: Tokens,
        step_sequence: np.ndarray,  # (S,)
        num_sequences: int,
        token_weights: Tensor | None,  # (B, T)
        ignore_index: int,
        vocab_size: int | None,
    ) -> StepLayout:
        check_whole("ignore_index", ignore_index)
        if vocab_size is not None:
            check_count("vocab_size", vocab_size)
        step, (batch, length), device = tokens.step, labels.shape, labels.device
        label = labels.cpu().numpy().astype(np.int64)
        real = label != ignore_index
        scored = (step >= 0) & real & (tokens.position > 0)
        weight = None
        if token_weights is not None:
            check_float("token_weights", token_weights)
            check_shape("token_weights", token_weights, (batch, length))
            weight = constant(token_weights).cpu().numpy()
            if not np.isfinite(weight).all():
                raise ValueError("token_weights: expected finite weights, got inf or nan")
            scored &= weight != 0
        bad = real & (label < 0)
        if vocab_size is not None:
            bad |= real & (label >= vocab_size)
        if bad.any():
            where = tokens.described(label, np.argwhere(bad)[0])
            raise ValueError(label_message(where, vocab_size, ignore_index))

        flat = np.flatnonzero(scored)
        num_steps = len(step_sequence)
        of_row = step.reshape(-1)[flat]
        offsets = np.zeros(num_steps + 1, np.int64)
        np.cumsum(np.bincount(of_row, minlength=num_steps), out=offsets[1:])
        sequence_offsets = offsets[np.searchsorted(step_sequence, np.arange(num_sequences + 1))]
        row_of = np.full(step.size, -1, np.int32)
        row_of[flat - 1] = np.arange(len(flat))
        largest = np.unravel_index(np.where(real, label, -1).argmax(), label.shape) if real.any() else None

        def tensor(array, dtype):
            return torch.from_numpy(np.ascontiguousarray(array)).to(dtype=dtype).to(device, non_blocking=True)

        return cls(
            rows=tensor(flat - 1, torch.int64),
            labels=tensor(label.reshape(-1)[flat], torch.int64),
            weights=None if weight is None else tensor(weight.reshape(-1)[flat], None),
            step_offsets=tensor(offsets, torch.int32),
            step_of_row=tensor(of_row, torch.int64),
            step_sequence=tensor(step_sequence, torch.int32),
            sequence_offsets=tensor(sequence_offsets, torch.int32),
            row_of=tensor(row_of, torch.int32),
            shape=(batch, length),
            num_sequences=num_sequences,
            host_step_offsets=torch.from_numpy(offsets),
            host_step_sequence=torch.from_numpy(np.array(step_sequence, np.int64)),
            host_sequence_offsets=torch.from_numpy(sequence_offsets),
            max_label=None if largest is None else tokens.described(label, largest),
            one_row_per_step=bool((np.diff(offsets) == 1).all()),
        )

    def with_row_weights(self, weights: Tensor) -> StepLayout:
        """The same layout with other constant weights on its rows.

        Args:
            weights: (N,) float on the rows, or (B, T) on the tokens. Every row stays scored, so a weight must not be 0:
                weights with zeros belong to `from_step_ids(..., token_weights=)`.

        Returns:
            A StepLayout with these weights instead of any it had.

        Raises:
            TypeError: The weights are no float tensor.
            ValueError: The shape does not fit, or a weight on the host is 0 or not finite. On a device the values are
                not checked.

        Examples:
            >>> halved = layout.with_row_weights(torch.full((layout.num_rows,), 0.5))
        """
        check_float("token_weights", weights)
        if weights.ndim == 2:
            check_shape("token_weights", weights, self.shape)
            weights = weights.reshape(-1)[self.places]
        check_shape("token_weights", weights, (self.num_rows,))
        if (
            weights.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not (weights.isfinite() & (weights != 0)).all()
        ):
            raise ValueError(
                "token_weights: expected finite weights other than 0 beside a StepLayout; zeros belong to "
                "StepLayout.from_...(token_weights=)"
            )
        return replace(self, weights=constant(weights).to(self.device))

    def pair_by_index(self) -> StepPairs:
        """Pairs step k of sequence i (chosen) with step k of sequence i + B/2 (rejected).

        Steps without a partner are left out.

        Returns:
            StepPairs, on the layout's device.

        Raises:
            ValueError: The number of sequences is odd.

        Examples:
            >>> out = step_pref_loss(logits, layout, layout.pair_by_index(), reference_free=True)
        """
        return StepPairs.from_index(self, torch.from_numpy(index_pairs(self.host_step_sequence, self.num_sequences)))

    def with_kept_tokens(self, kept: Sequence) -> StepLayout:
        """The same layout, with log-probs over the tokens that top-p or top-k sampling has kept, normalised again.

        Args:
            kept: for each scored token, in row order, the ids of the tokens that were kept, its own among them, as a
                list or 1-D tensor; None: the whole vocabulary. At one position of a tree tokens share their union.

        Returns:
            A StepLayout with these sets instead of any it had. Tensors on a device are copied to the host once.

        Raises:
            ValueError: The number of sets does not fit, a set is empty or without its token, or there are no labels.

        Examples:
            >>> layout = StepLayout.from_step_ids(torch.tensor([[5, 6, 7]]), torch.tensor([[-1, 0, 0]]))
            >>> narrow = layout.with_kept_tokens([[6, 9], None])
        """
        refuse_logits(self.rows.shape[0], self.labels.shape[0])
        return replace(self, kept=kept_tokens(kept, self.labels, self.rows, self.tree_rows))

    def check_logits(self, logits: Tensor, name: str = "logits") -> Tensor:
        """(B, T, V) view of `logits` whose last dimension is contiguous; raises if they do not fit this layout."""
        check_tensor(name, logits, ndim=(2, 3))
        batch, length = self.shape
        vocab = logits.shape[-1]
        expected = (length, vocab) if logits.ndim == 2 and batch == 1 else (batch, length, vocab)
        if tuple(logits.shape) != expected:
            raise ValueError(
                f"{name}: expected shape {expected} (labels are unshifted: pass the logits of every position), "
                f"got {describe(logits)}"
            )
        self.check_vocab(vocab)
        logits = logits if logits.ndim == 3 else logits[None]
        return logits if logits.stride(-1) == 1 or vocab <= 1 else logits.contiguous()

    def check_vocab(self, vocab: int) -> None:
        """Raises if a label is not below `vocab`.

        Skipped while compiling, where a guard on a label's value would recompile for every batch. The kernels then give
        NaN for such a label and never read out of bounds.
        """
        refuse_logits(self.rows.shape[0], self.labels.shape[0])
        if torch.compiler.is_compiling():
            return
        if self.max_label is not None and self.max_label[0] >= vocab:
            raise ValueError(label_message(self.max_label, vocab, None))
        if self.kept is not None:
            self.kept.check_vocab(vocab)
