"""From completions to advantages: what an update of SSPO learns from, in plain lists, easy to print and send."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..layout.steps import StepLayout
from ..signals.split import step_ids_from_tokens


@dataclass
class Rollout:
    """One completion. `values` are V_0 .. V_K for its K steps, V_K = 0 by definition (nothing follows the last step);
    empty where nothing was probed."""

    row: Any  # the dataset's: prompt, answer, ...
    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    ended: bool  # by an end of sequence; a completion that was cut off earns nothing
    steps: list[list[int]] = field(default_factory=list)
    reward: float = 0.0
    values: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)


class Summary(NamedTuple):
    """What all processes hear of a rollout. They sort by `place`, which is the row's in the whole update."""

    place: int
    reward: float
    steps: int
    values: list[float]
    tokens: int
    ended: bool

    @classmethod
    def of(cls, place: int, rollout: Rollout) -> Summary:
        r = rollout
        return cls(place, r.reward, len(r.steps), r.values, len(r.completion_ids), r.ended)


class PromptSampler(Sampler[int]):
    """Row numbers in the order in which updates use them: each update's prompts, every prompt `num_generations` times
    in a row, all of it `num_iterations` times. Every epoch is another permutation; prompts that do not fill an update
    are left out of it. Which epoch it is follows from the number of updates done, so a resumed run draws the same."""

    def __init__(
        self,
        size: int,
        prompts_per_update: int,
        num_generations: int,
        num_iterations: int,
        seed: int,
        updates_done: Callable[[], int],
    ):
        if size < prompts_per_update:
            raise ValueError(
                f"train_dataset: expected at least the {prompts_per_update} prompts of one update, got {size}"
            )
        self.size, self.prompts = size, prompts_per_update
        self.num_generations, self.num_iterations, self.seed = num_generations, num_iterations, seed
        self.updates_done = updates_done

    def __iter__(self) -> Iterator[int]:
        epoch = self.updates_done() // (self.size // self.prompts * self.num_iterations)
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed * 100_003 + epoch)).tolist()
        for first in range(0, self.size - self.prompts + 1, self.prompts):
            for _ in range(self.num_iterations):
                for row in order[first : first + self.prompts]:
                    yield from [row] * self.num_generations

    def __len__(self) -> int:
        return self.size // self.prompts * self.prompts * self.num_generations * self.num_iterations


def split_steps(completions: Sequence[Sequence[int]], delimiters: Tensor) -> list[list[list[int]]]:
    """The token ids of every step of every completion. Steps tile the completion: the last has the end of sequence, a
    completion without a delimiter is one step, an empty one has none."""
    longest = max(map(len, completions), default=0)
    if not longest:
        return [[] for _ in completions]
    ids, mask = torch.zeros(2, len(completions), longest, dtype=torch.int64)
    for row, tokens in enumerate(completions):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        mask[row, : len(tokens)] = 1
    found = []
    for tokens, steps in zip(completions, step_ids_from_tokens(ids, mask, delimiters).tolist(), strict=True):
        parts: list[list[int]] = [[] for _ in range(steps[len(tokens) - 1] + 1 if tokens else 0)]
        for token, step in zip(tokens, steps, strict=False):
            parts[step].append(token)
        found.append(parts)
    return found


def graded_rollouts(
    rows: Sequence[Mapping],
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    tokenizer,
    eos_token_ids: Collection[int],
    delimiters: Tensor,
    grader: Callable[..., list[float]],  # grade_rows with all that it needs beside rows, texts and token ids
) -> list[Rollout]:
    """Completions with their texts, steps and rewards. Only what has ended is graded; the rest has 0."""
    ended = [bool(ids) and ids[-1] in eos_token_ids for ids in completions]
    texts = [  # an end of sequence need not be among the special tokens
        tokenizer.decode(ids[:-1] if whole else ids, skip_special_tokens=True)
        for ids, whole in zip(completions, ended, strict=True)
    ]
    whole = [i for i, ends in enumerate(ended) if ends]
    names = dict.fromkeys(name for row in rows for name in row)  # the same columns whichever rows have ended
    graded = [{name: rows[i].get(name) for name in names} for i in whole]
    found = grader(graded, [texts[i] for i in whole], completion_ids=[completions[i] for i in whole])
    rewards = dict(zip(whole, found, strict=True))
    steps = split_steps(completions, delimiters)
    return [
        Rollout(row, prompts[i], completions[i], texts[i], ended[i], steps[i], rewards.get(i, 0.0))
        for i, row in enumerate(rows)
    ]


def policy_batch(rollouts: Sequence[Rollout], pad_token_id: int) -> dict:
    """input_ids and attention_mask (n, T) int64, right-padded; "layout" (every token of a completion is scored, in its
    step) and "advantages" (S,) float32, one a step."""
    length = max(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)
    ids = torch.full((len(rollouts), length), pad_token_id)
    mask = torch.zeros_like(ids)
    labels, steps = torch.full_like(ids, -100), torch.full_like(ids, -1)
    for b, r in enumerate(rollouts):
        start = len(r.prompt_ids)
        end = start + len(r.completion_ids)
        ids[b, :end] = torch.tensor(r.prompt_ids + r.completion_ids)
        mask[b, :end] = 1
        labels[b, start:end] = ids[b, start:end]
        numbers = [k for k, step in enumerate(r.steps) for _ in step]
        steps[b, start:end] = torch.tensor(numbers, dtype=torch.int64)
    layout = StepLayout.from_step_ids(labels, steps)
    advantages = torch.tensor([a for r in rollouts for a in r.advantages], dtype=torch.float32)
    return {"input_ids": ids, "attention_mask": mask, "layout": layout, "advantages": advantages}


def rollout_metrics(rows: Iterable[Summary]) -> dict[str, float]:
    """Means over rollouts."""
    rows = list(rows)
    n = max(len(rows), 1)
    rewards = torch.tensor([row.reward for row in rows], dtype=torch.float64)
    return {
        "accuracy": sum(row.reward >= 1 for row in rows) / n,
        "reward": sum(row.reward for row in rows) / n,
        "reward_std": rewards.std(correction=0).item() if len(rows) else 0.0,
        "completions/mean_length": sum(row.tokens for row in rows) / n,
        "completions/clipped_ratio": sum(not row.ended for row in rows) / n,
        "steps/mean": sum(row.steps for row in rows) / n,
    }


def advantage_metrics(
    rows: Iterable[Summary], advantages: Sequence[Sequence[float]]
) -> dict[str, tuple[float, int]]:  # name: (sum, count)
    """Values before and after all steps but the last, and advantages over steps."""
    found: dict[str, tuple[float, int]] = {}
    probed = [row.values for row in rows if len(row.values) > 1]
    if probed:
        found["values/first"] = sum(v[0] for v in probed), len(probed)
        found["values/last"] = sum(v[-2] for v in probed), len(probed)
    flat = torch.tensor([a for row in advantages for a in row])
    if len(flat):
        found["advantages/mean"] = flat.mean().item(), 1
        found["advantages/std"] = flat.std(correction=0).item(), 1
    return found


def over_std(values: Tensor) -> Tensor:
    """Scaled, not centred; all equal stays as it is (a batch of zeros stays zeros)."""
    std = values.std() if len(values) > 1 else values.new_zeros(())
    return torch.where(std > 1e-6, values / std.clamp(min=1e-6), values)


def num_items(aggregation: str, everyone: Sequence[Summary], longest: int) -> float:
    """What the aggregation averages over, in the whole update; a constant for "sum" (Dr. GRPO)."""
    count = {
        "token": sum(row.tokens for row in everyone),
        "step": sum(row.steps for row in everyone),
        "sequence": sum(row.tokens > 0 for row in everyone),
        "sum": len(everyone) * longest,
    }[aggregation]
    return float(max(count, 1))


def counted_items(aggregation: str, batches: Iterable[dict], prob_threshold: float) -> int:
    """Tokens, steps or sequences of these batches in which a token counts: its probability at sampling, exp(old), was
    below the threshold."""
    total = 0
    for batch in batches:
        layout = batch["layout"]
        rows = torch.nonzero(batch["old"].cpu().exp() < prob_threshold)[:, 0]
        if aggregation != "token":
            rows = layout.step_of_row[rows].unique()
        if aggregation == "sequence":
            rows = layout.step_sequence[rows].unique()
        total += len(rows)
    return total
