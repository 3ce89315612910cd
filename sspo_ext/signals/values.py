"""Values of the states between steps: what a probe measures and an advantage is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._checks import check_float, check_integer, check_shape
from ..layout.bundle import TensorBundle


@dataclass(frozen=True, eq=False, repr=False)
class StepValues(TensorBundle):
    """V_0..V_K of B sequences: V_k estimates the outcome after the first k of a sequence's K steps.

    `V_0` is the value of the question alone. Build it with `from_lists` or `from_tensor`; constants, never in a graph.
    """

    values: Tensor  # (S + B,) float32 (float64 if it came so): V_0..V_K of sequence 0, then of sequence 1, ...
    offsets: Tensor  # (B + 1,) int64: sequence b's values are [offsets[b], offsets[b + 1]), K_b + 1 of them
    host_offsets: Tensor  # (B + 1,) int64 on the host

    @classmethod
    def from_lists(cls, values: Sequence[Sequence[float]], *, device: torch.device | str = "cpu") -> StepValues:
        """From one list [V_0, ..., V_K] a sequence; at least V_0 in each.

        Example::

            >>> StepValues.from_lists([[0.2, 0.5, 0.9], [0.1]]).steps_per_sequence
            tensor([2, 0])
        """
        lists = [np.asarray(v, np.float32) for v in values]
        for b, v in enumerate(lists):
            if v.ndim != 1:
                raise ValueError(
                    f"values: expected a flat list for each sequence, got shape {v.shape} for sequence {b}"
                )
        offsets = np.concatenate([[0], np.cumsum([len(v) for v in lists], dtype=np.int64)])
        flat = np.concatenate([np.zeros(0, np.float32), *lists])
        return cls.from_tensor(torch.from_numpy(flat).to(device), torch.from_numpy(offsets.astype(np.int64)))

    @classmethod
    def from_tensor(
        cls,
        values: Tensor,  # (S + B,) float
        offsets: Tensor,  # (B + 1,) int, on the host; on a device it is copied once (a sync)
    ) -> StepValues:
        """From values that lie one sequence after the other; the result is where `values` is.

        Raises ValueError for offsets that do not run from 0 to the number of values with at least V_0 for every
        sequence, and, for values on the host, if one is not finite.
        """
        check_float("values", values, ndim=1)
        check_integer("offsets", offsets, ndim=1)
        host = offsets.cpu().to(torch.int64)
        if len(host) < 1 or host[0] != 0 or host[-1] != len(values) or (host.diff() < 1).any():
            raise ValueError(
                f"offsets: expected to run from 0 to {len(values)} (the number of values) with at least V_0 "
                f"for each sequence, got {host.tolist()}"
            )
        if values.device.type == "cpu" and not values.isfinite().all():
            at = int((~values.isfinite()).nonzero()[0])
            b = int(torch.searchsorted(host, at, right=True)) - 1
            raise ValueError(f"values: expected finite values, got {values[at]:g} for V_{at - host[b]} of sequence {b}")
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        return cls(values.detach().to(dtype), host.to(values.device, non_blocking=True), host)

    @property
    def num_sequences(self) -> int:
        return len(self.host_offsets) - 1

    @property
    def num_steps(self) -> int:
        return int(self.host_offsets[-1]) - self.num_sequences

    @property
    def steps_per_sequence(self) -> Tensor:
        """(B,) int64 on the host: K_b."""
        return self.host_offsets.diff() - 1

    @property
    def step_sequence(self) -> Tensor:
        """(S,) int64, where the values are: the sequence each step is in."""
        return torch.repeat_interleave(self.steps_per_sequence).to(self.values.device, non_blocking=True)

    def with_values(self, values: Tensor) -> StepValues:
        """The same sequences with other values (S + B,): zeroed or shuffled ones, for a control."""
        check_shape("values", values, tuple(self.values.shape))
        return StepValues.from_tensor(values, self.host_offsets)

    def to_lists(self) -> list[list[float]]:
        """[V_0, ..., V_K] of each sequence, on the host."""
        return [v.tolist() for v in self.values.cpu().split(self.host_offsets.diff().tolist())]

    def __repr__(self) -> str:
        return f"StepValues(sequences={self.num_sequences}, steps={self.num_steps}, device={self.values.device})"


@dataclass(frozen=True)
class StepBatch:
    """B sequences of token ids: a prompt, and the steps of the response to it.

    Steps follow each other without a gap, so prompt + steps is what the model read and wrote. A response without steps
    is an empty list: its only state is the question. Empty steps and empty prompts raise ValueError: a model has
    nothing to go by before the first token (give it the beginning of sequence).
    """

    prompt_ids: Sequence[Sequence[int]]  # (B,) lists
    step_ids: Sequence[Sequence[Sequence[int]]]  # (B,) lists of K_b steps, each a list of token ids

    def __post_init__(self) -> None:
        if len(self.prompt_ids) != len(self.step_ids):
            raise ValueError(
                f"step_ids: expected one list for each of {len(self.prompt_ids)} prompts, got {len(self.step_ids)}"
            )
        for b, (prompt, steps) in enumerate(zip(self.prompt_ids, self.step_ids, strict=True)):
            if not len(prompt):
                raise ValueError(f"prompt_ids: expected at least one token, got none for sequence {b}")
            for k, step in enumerate(steps):
                if not len(step):
                    raise ValueError(f"step_ids: expected at least one token, got none for step {k} of sequence {b}")

    @classmethod
    def from_tensors(
        cls,
        input_ids: Tensor,  # (B, T) int
        step_ids: Tensor,  # (B, T) int: 0, 1, 2.. never decreasing within a sequence; -1 before the first step: prompt
        attention_mask: Tensor | None = None,  # (B, T): 0 is padding, on either side
    ) -> StepBatch:
        """From the tensors of a trainer. Tokens with step id -1 after the first step (a tool's output, padding) belong
        to the step before them unless `attention_mask` is 0 there. One copy to the host."""
        check_integer("input_ids", input_ids, ndim=2)
        check_shape("step_ids", step_ids, tuple(input_ids.shape))
        ids, steps = input_ids.cpu().numpy(), step_ids.cpu().numpy()
        if attention_mask is None:
            kept = np.ones(ids.shape, bool)
        else:
            check_shape("attention_mask", attention_mask, tuple(input_ids.shape))
            kept = attention_mask.cpu().numpy() != 0
        prompts, responses = [], []
        for b in range(len(ids)):
            row, numbers = ids[b][kept[b]], np.maximum.accumulate(steps[b][kept[b]])
            if not (steps[b][kept[b]] == numbers)[steps[b][kept[b]] >= 0].all():
                raise ValueError(f"step_ids: expected step ids that never decrease, sequence {b} has some that do")
            edges = np.flatnonzero(np.diff(numbers, prepend=-1))
            parts = np.split(row, edges)
            prompts.append(parts[0].tolist())
            responses.append([part.tolist() for part in parts[1:]])
        return cls(prompts, responses)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def sequence(self, b: int) -> list[int]:
        """Prompt and steps of sequence b, end to end."""
        return [*self.prompt_ids[b], *(token for step in self.step_ids[b] for token in step)]

    def boundaries(self, b: int) -> list[int]:
        """K_b + 1 lengths of prefixes: the prompt alone, prompt and first step, ..., the whole sequence."""
        lengths = [len(self.prompt_ids[b]), *(len(step) for step in self.step_ids[b])]
        return np.cumsum(lengths).tolist()
