# SPDX-License-Identifier: Apache-2.0
"""Values of the states between steps, and the sequences that they belong to.

A state is a question with the first k steps of an answer. A probe measures the value of each state
(`probe_step_values`), and `step_gae` makes advantages from them.
"""

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
    """V_0, ..., V_K of B sequences: V_k estimates the outcome after the first k of a sequence's K steps.

    V_0 is the value of the question alone. Build an object with `from_lists` or `from_tensor`. Values are constants:
    they are never part of an autograd graph.

    Attributes:
        values: (S + B,) float32, or float64 if they were given so: V_0, ..., V_K of sequence 0, then of sequence 1, ...
        offsets: (B + 1,) int64. The values of sequence b are `values[offsets[b]:offsets[b + 1]]`, K_b + 1 of them.
        host_offsets: (B + 1,) int64: the same on the host.
    """

    values: Tensor
    offsets: Tensor
    host_offsets: Tensor

    @classmethod
    def from_lists(cls, values: Sequence[Sequence[float]], *, device: torch.device | str = "cpu") -> StepValues:
        """Build values from lists.

        Args:
            values: B lists [V_0, ..., V_K], with at least V_0 in each.
            device: where the values are put.

        Returns:
            Values in float32.

        Raises:
            ValueError: if a list is not flat or is empty, or a value on the host is not finite.

        Examples:
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
    def from_tensor(cls, values: Tensor, offsets: Tensor) -> StepValues:
        """Build values from one flat tensor, one sequence after the other.

        Args:
            values: (S + B,) float. The result is on the same device.
            offsets: (B + 1,) int, where each sequence begins and ends. On a device they are copied to the host once,
                which is a synchronisation.

        Returns:
            Values in float32, or in float64 if `values` is float64.

        Raises:
            ValueError: if the offsets do not run from 0 to the number of values with at least V_0 for each sequence, or
                a value on the host is not finite.
            TypeError: if `values` is not float or `offsets` not int.

        Examples:
            >>> values = StepValues.from_tensor(torch.tensor([0.25, 0.5, 1.0]), torch.tensor([0, 3]))
            >>> values.to_lists()
            [[0.25, 0.5, 1.0]]
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
        """B, the number of sequences."""
        return len(self.host_offsets) - 1

    @property
    def num_steps(self) -> int:
        """S, the number of steps of all sequences."""
        return int(self.host_offsets[-1]) - self.num_sequences

    @property
    def steps_per_sequence(self) -> Tensor:
        """(B,) int64 on the host: K_b, the number of steps of each sequence."""
        return self.host_offsets.diff() - 1

    @property
    def step_sequence(self) -> Tensor:
        """(S,) int64 on the values' device: the sequence of each step."""
        return torch.repeat_interleave(self.steps_per_sequence).to(self.values.device, non_blocking=True)

    def with_values(self, values: Tensor) -> StepValues:
        """Return the same sequences with other values, such as zeroed or shuffled ones for a control experiment.

        Args:
            values: (S + B,) float.

        Returns:
            A new object.

        Raises:
            ValueError: if the shape differs, or a value on the host is not finite.
        """
        check_shape("values", values, tuple(self.values.shape))
        return StepValues.from_tensor(values, self.host_offsets)

    def to_lists(self) -> list[list[float]]:
        """Return [V_0, ..., V_K] of each sequence, on the host."""
        return [v.tolist() for v in self.values.cpu().split(self.host_offsets.diff().tolist())]

    def __repr__(self) -> str:
        return f"StepValues(sequences={self.num_sequences}, steps={self.num_steps}, device={self.values.device})"


@dataclass(frozen=True)
class StepBatch:
    """B sequences of token ids: each a prompt and the steps of the response to it.

    The steps follow each other without a gap, so a prompt with its steps is what the model read and wrote. A response
    without steps is an empty list; its only state is the question.

    Attributes:
        prompt_ids: B lists of token ids, none of them empty: a model predicts nothing before the first token. Where
            there is no prompt, give the beginning of sequence.
        step_ids: B lists of K_b steps, each a list of token ids that is not empty.

    Raises:
        ValueError: if the numbers of prompts and responses differ, or a prompt or a step is empty.

    Examples:
        >>> batch = StepBatch(prompt_ids=[[5, 6]], step_ids=[[[7], [8, 9]]])
        >>> batch.sequence(0), batch.boundaries(0)
        ([5, 6, 7, 8, 9], [2, 3, 5])
    """

    prompt_ids: Sequence[Sequence[int]]
    step_ids: Sequence[Sequence[Sequence[int]]]

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
    def from_tensors(cls, input_ids: Tensor, step_ids: Tensor, attention_mask: Tensor | None = None) -> StepBatch:
        """Build a batch from a trainer's tensors. They are copied to the host.

        Args:
            input_ids: (B, T) int.
            step_ids: (B, T) int: 0, 1, 2, ..., never decreasing in a sequence. -1 before the first step is the prompt.
                -1 after it (a tool's output) belongs to the step before, unless `attention_mask` is 0 there.
            attention_mask: (B, T); 0 is padding, on either side. None means no padding.

        Returns:
            The batch, without padding.

        Raises:
            ValueError: if shapes differ, step ids decrease, or a prompt is empty.
            TypeError: if `input_ids` is not int.

        Examples:
            >>> batch = StepBatch.from_tensors(torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[-1, -1, 0, 1, 1]]))
            >>> batch.prompt_ids, batch.step_ids
            ([[5, 6]], [[[7], [8, 9]]])
        """
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
        """Return the prompt and the steps of sequence b, one after the other."""
        return [*self.prompt_ids[b], *(token for step in self.step_ids[b] for token in step)]

    def boundaries(self, b: int) -> list[int]:
        """Return the K_b + 1 lengths of prefixes: the prompt, prompt and first step, ..., the whole sequence."""
        lengths = [len(self.prompt_ids[b]), *(len(step) for step in self.step_ids[b])]
        return np.cumsum(lengths).tolist()
