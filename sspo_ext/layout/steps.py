"""Which rows of the logits are scored, and which step each belongs to: built once, on the host.

Everything that would need a device sync later (validation, compaction, step boundaries) happens here, so that a loss is
only kernels. Build layouts in the collator: labels and step ids are then already on the host, and `.to(device)` is a
handful of small async copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .._checks import check_float, check_integer, check_shape, check_tensor, describe
from .bundle import Steps, constant
from .pairs import StepPairs


@dataclass(frozen=True, eq=False, repr=False)
class StepLayout(Steps):
    """Rows and steps of a batch of B sequences of padded length T. Build it with a `from_...` classmethod.

    `labels` are unshifted, like Hugging Face's: the logits at position t - 1 predict the label at t, in the same
    sequence. A sequence's first token has no row. Rows are ascending, and the rows of a step are contiguous.
    """

    rows: Tensor  # (N,) int64: position b*T + t of the logits that predict the scored token
    labels: Tensor  # (N,) int64 in [0, V)
    weights: Tensor | None  # (N,) float32, none of them 0; None when all are 1
    step_offsets: Tensor  # (S + 1,) int32, CSR over rows; an empty step has equal neighbours
    step_of_row: Tensor  # (N,) int64
    step_sequence: Tensor  # (S,) int32: the sequence each step is in
    row_of: Tensor  # (B*T,) int32: the row a position is, -1 where it is none
    shape: tuple[int, int]  # (B, T); (1, total) for a packed batch
    num_sequences: int
    host_step_offsets: Tensor  # (S + 1,) int64
    host_step_sequence: Tensor  # (S,) int64
    max_label: tuple[int, int, int] | None  # (value, sequence, position) of the largest label, for the check against V
    one_row_per_step: bool

    @property
    def num_rows(self) -> int:
        return self.rows.shape[0]

    @property
    def num_steps(self) -> int:
        return self.step_sequence.shape[0]

    @property
    def counts(self) -> Tensor:
        """(S,) int32: scored tokens of each step."""
        return self.step_offsets[1:] - self.step_offsets[:-1]

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def __repr__(self) -> str:
        packed = "packed, " if self.shape[0] == 1 and self.num_sequences != 1 else ""
        return (
            f"StepLayout({packed}sequences={self.num_sequences}, shape={self.shape}, rows={self.num_rows}, "
            f"steps={self.num_steps}, device={self.device})"
        )

    @classmethod
    def from_step_ids(
        cls,
        labels: Tensor,  # (B, T) int: unshifted; ignore_index where nothing is scored
        step_ids: Tensor,  # (B, T) int: 0, 1, 2, ... along each sequence, -1 where nothing is scored
        *,
        token_weights: Tensor | None = None,  # (B, T) float: constant weight of each token; a zero leaves it unscored
        ignore_index: int = -100,
        vocab_size: int | None = None,  # checks labels here and not first at the loss
    ) -> StepLayout:
        """Layout of a padded batch. Tensors on a device are copied to the host once (a sync); the result lives where
        `labels` does.

        A step is the tokens of one sequence with the same id. Unscored tokens inside it (a tool's output) leave it one
        step; an id that is left out, or whose tokens are all unscored, is an empty step. Raises ValueError, naming
        sequence and position, for a label outside [0, vocab_size), step ids that go backwards and shapes that do not
        agree.

        Example::

            >>> labels = torch.tensor([[5, 6, 7, 8]]); step_ids = torch.tensor([[-1, 0, 0, 1]])
            >>> StepLayout.from_step_ids(labels, step_ids).rows
            tensor([0, 1, 2])
        """
        check_integer("labels", labels, ndim=2)
        check_integer("step_ids", step_ids)
        check_shape("step_ids", step_ids, tuple(labels.shape))
        batch, length = labels.shape
        device = labels.device
        ids = step_ids.cpu().numpy().astype(np.int64)
        running = np.maximum.accumulate(ids, axis=1)
        _refuse(ids < -1, ids, "step_ids", "0, 1, 2, ... or -1 (not scored)")
        _refuse((ids >= 0) & (ids < running), ids, "step_ids", "ids that never go back along a sequence")
        _refuse(ids >= length, ids, "step_ids", f"ids below the sequence length {length}")
        steps = running[:, -1] + 1 if length else np.zeros(batch, np.int64)
        base = np.cumsum(steps) - steps
        step = np.where(ids >= 0, ids + base[:, None], -1)
        position = np.broadcast_to(np.arange(length), ids.shape)
        sequence = np.broadcast_to(np.arange(batch)[:, None], ids.shape)
        return cls._build(
            labels, step, sequence, position, np.repeat(np.arange(batch), steps), (batch, length), batch, token_weights,
            ignore_index, vocab_size, device,
        )  # fmt: skip

    @classmethod
    def from_offsets(
        cls,
        labels: Tensor,  # (total,) int: unshifted labels of all sequences, one after the other
        cu_seqlens: Tensor,  # (B + 1,) int: where each sequence starts; the last entry is total
        step_offsets: Tensor,  # (S + 1,) int: step k is tokens [step_offsets[k], step_offsets[k + 1]); or (S, 2) spans
        *,
        token_weights: Tensor | None = None,  # (total,) float
        ignore_index: int = -100,
        vocab_size: int | None = None,
    ) -> StepLayout:
        """Layout of a packed (padding-free) batch, whose logits are (total, V) or (1, total, V).

        With S + 1 offsets steps follow each other from 0 to total without gaps (prompt tokens in them carry
        ignore_index), so every sequence starts a step; with (S, 2) spans, tokens between spans are not scored. A step
        that crosses a sequence boundary raises
        ValueError: no label is ever predicted from another sequence. An empty step belongs to the sequence in which it
        starts.
        """
        check_integer("labels", labels, ndim=1)
        check_integer("cu_seqlens", cu_seqlens, ndim=1)
        check_integer("step_offsets", step_offsets, ndim=(1, 2))
        total, device = labels.shape[0], labels.device
        cu = cu_seqlens.cpu().numpy().astype(np.int64)
        if len(cu) < 1 or cu[0] != 0 or cu[-1] != total or (np.diff(cu) < 0).any():
            raise ValueError(
                f"cu_seqlens: expected 0 <= ... <= {total} (the length of labels), never falling, got {cu.tolist()}"
            )
        spans = step_offsets.cpu().numpy().astype(np.int64)
        if spans.ndim == 1:
            if len(spans) == 0:
                raise ValueError("step_offsets: expected S + 1 offsets or (S, 2) spans, got an empty tensor")
            if spans[0] != 0 or spans[-1] != total:
                raise ValueError(
                    f"step_offsets: expected S + 1 offsets from 0 to {total} (the length of labels), got {spans[0]} to "
                    f"{spans[-1]}; pass (S, 2) spans to leave tokens out"
                )
            spans = np.stack([spans[:-1], spans[1:]], axis=1)
        if spans.shape[1:] != (2,):
            raise ValueError(f"step_offsets: expected shape (S + 1,) or (S, 2), got {tuple(step_offsets.shape)}")
        start, end = spans[:, 0], spans[:, 1]
        bad = (start < 0) | (end < start) | (end > total)
        bad[1:] |= start[1:] < end[:-1]
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"step_offsets: expected ascending spans within [0, {total}], got {spans[k].tolist()} for step {k}"
            )
        # side="right" - 1 skips zero-length sequences; an empty step at the very end belongs to the last sequence
        owner = np.minimum(np.searchsorted(cu, start, side="right") - 1, max(len(cu) - 2, 0))
        if len(spans) and len(cu) < 2:
            raise ValueError("step_offsets: expected no steps, since cu_seqlens names no sequence")
        crossing = (end > start) & (end > cu[np.minimum(owner + 1, len(cu) - 1)])
        if crossing.any():
            k = int(np.flatnonzero(crossing)[0])
            raise ValueError(
                f"step_offsets: expected every step inside one sequence, got step {k} = {spans[k].tolist()}, "
                f"which crosses the boundary at {int(cu[owner[k] + 1])}"
            )
        step = np.full(total, -1, np.int64)
        lengths = end - start
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        step[np.repeat(start, lengths) + within] = np.repeat(np.arange(len(spans)), lengths)
        seq_lengths = np.diff(cu)
        sequence = np.repeat(np.arange(len(seq_lengths)), seq_lengths)
        position = np.arange(total) - np.repeat(cu[:-1], seq_lengths)
        return cls._build(
            labels[None], step[None], sequence[None], position[None], owner, (1, total), len(cu) - 1,
            None if token_weights is None else _packed_weights(token_weights, total), ignore_index, vocab_size, device,
        )  # fmt: skip

    @classmethod
    def _build(
        cls,
        labels: Tensor,
        step: np.ndarray,  # (B, T): step of each token in the batch's numbering, -1 for none
        sequence: np.ndarray,  # (B, T)
        position: np.ndarray,  # (B, T): position within the sequence
        step_sequence: np.ndarray,  # (S,)
        shape: tuple[int, int],
        num_sequences: int,
        token_weights: Tensor | None,
        ignore_index: int,
        vocab_size: int | None,
        device: torch.device,
    ) -> StepLayout:
        label = labels.cpu().numpy().astype(np.int64)
        real = label != ignore_index
        scored = (step >= 0) & real & (position > 0)
        weight = None
        if token_weights is not None:
            check_float("token_weights", token_weights)
            check_shape("token_weights", token_weights, tuple(labels.shape))
            weight = constant(token_weights).cpu().numpy()
            if not np.isfinite(weight).all():
                raise ValueError("token_weights: expected finite weights, got inf or nan")
            scored &= weight != 0
        bad = real & (label < 0)
        if vocab_size is not None:
            bad |= real & (label >= vocab_size)
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            where = (int(label[at]), int(sequence[at]), int(position[at]))
            raise ValueError(_label_message(where, vocab_size, ignore_index))

        flat = np.flatnonzero(scored)
        num_steps = len(step_sequence)
        of_row = step.reshape(-1)[flat]
        offsets = np.zeros(num_steps + 1, np.int64)
        np.cumsum(np.bincount(of_row, minlength=num_steps), out=offsets[1:])
        row_of = np.full(step.size, -1, np.int32)
        row_of[flat - 1] = np.arange(len(flat))
        row_labels = label.reshape(-1)[flat]
        max_label = None
        if real.any():
            at = np.unravel_index(np.where(real, label, -1).argmax(), label.shape)
            max_label = (int(label[at]), int(sequence[at]), int(position[at]))

        def tensor(array, dtype):
            return torch.from_numpy(np.ascontiguousarray(array)).to(dtype=dtype).to(device, non_blocking=True)

        return cls(
            rows=tensor(flat - 1, torch.int64),
            labels=tensor(row_labels, torch.int64),
            weights=None if weight is None else tensor(weight.reshape(-1)[flat], None),
            step_offsets=tensor(offsets, torch.int32),
            step_of_row=tensor(of_row, torch.int64),
            step_sequence=tensor(step_sequence, torch.int32),
            row_of=tensor(row_of, torch.int32),
            shape=shape,
            num_sequences=num_sequences,
            host_step_offsets=torch.from_numpy(offsets),
            host_step_sequence=torch.from_numpy(np.array(step_sequence, np.int64)),
            max_label=max_label,
            one_row_per_step=bool((np.diff(offsets) == 1).all()),
        )

    def with_row_weights(self, weights: Tensor) -> StepLayout:
        """The same layout with constant weights (N,) on its rows, or (B, T) on the tokens, replacing any it had.

        Nothing is compacted away, so a weight of 0 would still count as a scored token: ValueError on the host,
        unchecked on a device. Weights with zeros belong to `from_step_ids(..., token_weights=)`.
        """
        check_float("token_weights", weights)
        if weights.ndim == 2:
            check_shape("token_weights", weights, self.shape)
            weights = weights.reshape(-1)[self.rows + 1]
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
        """Pairs step k of sequence i (chosen) with step k of sequence i + B/2 (rejected); steps without a partner are
        left out."""
        half, odd = divmod(self.num_sequences, 2)
        if odd:
            raise ValueError(
                "pairs: expected an even number of sequences [chosen_0.., rejected_0..] to pair by index, "
                f"got {self.num_sequences}; pass pairs explicitly"
            )
        counts = np.bincount(self.host_step_sequence.numpy(), minlength=self.num_sequences)
        first = np.cumsum(counts) - counts
        common = np.minimum(counts[:half], counts[half:])
        k = np.arange(common.sum()) - np.repeat(np.cumsum(common) - common, common)
        chosen, rejected = np.repeat(first[:half], common) + k, np.repeat(first[half:], common) + k
        return StepPairs.from_index(self, torch.from_numpy(np.stack([chosen, rejected], axis=1)))

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
        """Raises if a label is not below `vocab`. Skipped while compiling (a guard on a label's value would recompile
        for every batch): the kernels then give NaN for such a label and never read out of bounds."""
        if not torch.compiler.is_compiling() and self.max_label is not None and self.max_label[0] >= vocab:
            raise ValueError(_label_message(self.max_label, vocab, None))


def _packed_weights(weights: Tensor, total: int) -> Tensor:
    check_shape("token_weights", weights, (total,))
    return weights[None]


def _refuse(bad: np.ndarray, ids: np.ndarray, name: str, expected: str) -> None:
    if bad.any():
        b, t = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name}: expected {expected}, got {int(ids[b, t])} in sequence {b} at position {t}")


def _label_message(where: tuple[int, int, int], vocab_size: int | None, ignore_index: int | None) -> str:
    value, sequence, position = where
    upper = "V" if vocab_size is None else str(vocab_size)
    other = "" if ignore_index is None else f" or {ignore_index} (ignore_index)"
    return f"labels: expected values in [0, {upper}){other}, got {value} in sequence {sequence} at position {position}"
