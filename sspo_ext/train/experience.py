# SPDX-License-Identifier: Apache-2.0
"""From completions to advantages: what an update of SSPO learns from, in plain lists, easy to print and send."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..data.chat import COLUMNS, chat_options
from ..data.graders import Grader, answer_grader, answer_texts
from ..data.prompts import prompt_tokens
from ..layout.steps import StepLayout
from ..signals.credit.baselines import combine_advantages, outcome_advantages
from ..signals.credit.gae import spread, step_gae
from ..signals.split import step_ids_from_tokens
from ..signals.values import StepValues
from .options import dictionary

if TYPE_CHECKING:
    from .means import Sums
    from .sspo_config import SSPOConfig


@dataclass
class Rollout:
    """One completion.

    Attributes:
        row: The row of the dataset: prompt, answer, ...
        prompt_ids: The token ids of the prompt.
        completion_ids: The token ids of the completion, up to and with the end of sequence.
        text: The completion as a text.
        ended: Whether it has an end of sequence. A completion that was cut off is not graded.
        steps: The token ids of each step.
        reward: What the grader gave.
        values: V_0 .. V_K for K steps. V_K is 0 by definition, since nothing follows the last step. Empty if nothing
            was probed.
        advantages: One for each step.
    """

    row: Any
    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    ended: bool
    steps: list[list[int]] = field(default_factory=list)
    reward: float = 0.0
    values: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)


class Summary(NamedTuple):
    """What a process tells the others of a rollout. `place` is the row's place in the whole update."""

    place: int
    reward: float
    steps: int
    values: list[float]
    tokens: int
    ended: bool

    @classmethod
    def of(cls, place: int, rollout: Rollout) -> Summary:
        """The summary of a rollout."""
        r = rollout
        return cls(place, r.reward, len(r.steps), r.values, len(r.completion_ids), r.ended)


class PromptSampler(Sampler[int]):
    """Row numbers in the order in which the updates use them.

    Each update takes `prompts_per_update` prompts, every prompt `num_generations` times in a row, and all of it
    `num_iterations` times. Every epoch is another permutation; prompts that do not fill an update are left out of it.
    The epoch follows from the number of updates done, so that a resumed run draws the same rows.
    """

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


def rollout_number(updates_done: int, num_iterations: int) -> int:
    """The number of the next batch of rollouts.

    Raises:
        ValueError: In the middle of a batch of rollouts, as after a checkpoint there: they were not saved.
    """
    if updates_done % num_iterations:
        raise ValueError(
            f"resume_from_checkpoint: expected a checkpoint after a multiple of num_iterations={num_iterations} "
            f"updates, since rollouts are not saved, got one after {updates_done}; name or keep an earlier one"
        )
    return updates_done // num_iterations


def split_steps(completions: Sequence[Sequence[int]], delimiters: Tensor) -> list[list[list[int]]]:
    """The token ids of every step of every completion.

    The steps cover the completion, and the last one has the end of sequence. A completion without a delimiter is one
    step; an empty one has none.
    """
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


def prompt_ids(rows: Sequence[Mapping], tokenizer, chat_template_kwargs: dict) -> list[list[int]]:
    """The token ids of the rows' prompts. Equal prompts, which a group has, are tokenized once."""
    keys = [(isinstance(row["prompt"], str), str([row.get(name) for name in ("prompt", *COLUMNS)])) for row in rows]
    known = dict(zip(keys, rows, strict=True))
    ids = {
        key: prompt_tokens(row["prompt"], tokenizer, chat_options(row, chat_template_kwargs))
        for key, row in known.items()
    }
    return [ids[key] for key in keys]


def graded_rollouts(
    rows: Sequence[Mapping],
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    tokenizer,
    eos_token_ids: Collection[int],
    delimiters: Tensor,
    grader: Callable[..., list[float]],
) -> list[Rollout]:
    """Completions with their texts, steps and rewards.

    `grader(rows, texts, completion_ids=...)` grades the completions that have ended; the others get 0.
    """
    ended = [bool(ids) and ids[-1] in eos_token_ids for ids in completions]
    texts = [  # the end of sequence is cut off here, since it need not be a special token
        tokenizer.decode(ids[:-1] if whole else ids, skip_special_tokens=True)
        for ids, whole in zip(completions, ended, strict=True)
    ]
    whole = [i for i, ends in enumerate(ended) if ends]
    names = dict.fromkeys(name for row in rows for name in row)  # the columns do not depend on which rows have ended
    graded = [{name: rows[i].get(name) for name in names} for i in whole]
    found = grader(graded, [texts[i] for i in whole], completion_ids=[completions[i] for i in whole])
    rewards = dict(zip(whole, found, strict=True))
    steps = split_steps(completions, delimiters)
    return [
        Rollout(row, prompts[i], completions[i], texts[i], ended[i], steps[i], rewards.get(i, 0.0))
        for i, row in enumerate(rows)
    ]


def policy_batch(rollouts: Sequence[Rollout], pad_token_id: int) -> dict:
    """A micro-batch of rollouts, right-padded.

    Returns:
        "input_ids" and "attention_mask" (n, T) int64; "layout", in which every token of a completion is scored, in its
        step; "advantages" (S,) float32, one for each step.
    """
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
    """Means over all rollouts: rewards, lengths, steps."""
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


def update_metrics(
    rows: Iterable[Summary], advantages: Sequence[Sequence[float]]
) -> dict[str, tuple[float, int]]:  # name: (sum, count)
    """`rollout_metrics`, the values of the prompt and before the last step, and the advantages of all steps."""
    rows = list(rows)
    found: dict[str, tuple[float, int]] = {name: (value, 1) for name, value in rollout_metrics(rows).items()}
    probed = [row.values for row in rows if len(row.values) > 1]
    if probed:
        found["values/first"] = sum(v[0] for v in probed), len(probed)
        found["values/last"] = sum(v[-2] for v in probed), len(probed)
    flat = torch.tensor([a for row in advantages for a in row])
    if len(flat):
        found["advantages/mean"] = flat.mean().item(), 1
        found["advantages/std"] = flat.std(correction=0).item(), 1
        silent = not flat.any()
        found["advantages/silent"] = float(silent), 1
        if silent:
            warnings.warn(_silence(rows), stacklevel=2)
    return found


def _silence(rows: Sequence[Summary]) -> str:
    low, high = min(row.reward for row in rows), max(row.reward for row in rows)
    rewards = f"all rewards are {low:g}" if low == high else f"rewards are from {low:g} to {high:g}"
    values = [v for row in rows for v in row.values[:-1]]
    told = f" and the values from {min(values):.2g} to {max(values):.2g}" if values else ""
    return (
        f"all {len(rows)} completions of an update have advantage 0 ({rewards}{told}), so it changes nothing; easier "
        "prompts, more completions or another probe may help, and advantages/silent is the share of such updates"
    )


def probe_answers(
    rollouts: Sequence[Rollout], args: SSPOConfig, reward_func: Grader
) -> tuple[list[Any], dict[str, Any]]:
    """The answers for `probe_step_values`, and with mode "graded" the grader of what the model answers."""
    if dictionary(args.probe_options).get("mode") != "graded":
        return [answer_texts(r.row["answer"]) for r in rollouts], {}
    judge = answer_grader(reward_func, args.asked)

    def grader(text: str, row: Mapping) -> float:
        return judge(text, [row["answer"]], **{name: value for name, value in row.items() if name != "answer"})

    return [r.row for r in rollouts], {"grader": grader}


def lowest_reward(rows: Iterable[Summary]) -> float:
    """The reward of completions that were cut off: 0, or the lowest of the update if that is below 0."""
    return min([0.0, *(row.reward for row in rows)])


def step_advantages(
    args: SSPOConfig,
    rewards: Tensor,
    num_steps: Sequence[int],
    values: Sequence[list[float]],
    groups: Tensor,
    sums: Sums,
) -> list[list[float]]:
    """See `SSPOTrainer.advantages`. `sums` gets the metrics of the signal.

    The model's values are never exactly equal. Where they and the rewards differ by less than `min_signal`, scaling
    would turn rounding and noise into an update of full size. So such steps have advantage 0.
    """
    outcome = outcome_advantages(rewards, args.baseline, groups=groups)
    if args.scale_advantages:
        outcome = over_std(outcome)
    step_sequence = torch.repeat_interleave(torch.arange(len(rewards)), torch.tensor(num_steps))
    if args.combine == "outcome":
        found = outcome[step_sequence]
    else:
        traced = StepValues.from_lists(values)
        plain = step_gae(traced, rewards, gamma=args.gamma, lam=args.lam)
        signal = spread(plain).item() if len(plain) else 0.0
        normalize = "batch" if args.scale_advantages else "none"
        steps = step_gae(traced, rewards, gamma=args.gamma, lam=args.lam, normalize=normalize)
        if signal < args.min_signal:
            steps = torch.zeros_like(steps)
        sums.add("advantages/signal", signal, 1)
        found = combine_advantages(steps, outcome, step_sequence, how=args.combine, step_scale=args.step_scale)
    return [part.tolist() for part in found.split(list(num_steps))]


def over_std(values: Tensor) -> Tensor:
    """The values over their standard deviation. No mean is subtracted, and equal values stay as they are."""
    std = values.std() if len(values) > 1 else values.new_zeros(())
    return torch.where(std > 1e-6, values / std.clamp(min=1e-6), values)


def num_items(args: SSPOConfig, everyone: Sequence[Summary], batches: Iterable[dict], accelerator) -> float:
    """The number of tokens, steps or sequences in the whole update; for "sum" a constant (Dr. GRPO).

    With a `prob_threshold` those count that hold a token below it, in the micro-batches of all processes.
    """
    threshold = dictionary(args.loss_options).get("prob_threshold")
    if threshold is not None and args.aggregation != "sum":
        counted = torch.tensor(counted_items(args.aggregation, batches, threshold), device=args.device)
        count = accelerator.reduce(counted, "sum").item()
    else:
        count = {
            "token": sum(row.tokens for row in everyone),
            "step": sum(row.steps for row in everyone),
            "sequence": sum(row.tokens > 0 for row in everyone),
            "sum": len(everyone) * args.max_completion_length,
        }[args.aggregation]
    return float(max(count, 1))


def counted_items(aggregation: str, batches: Iterable[dict], prob_threshold: float) -> int:
    """The number of tokens, steps or sequences in which a token counts.

    A token counts if its probability at sampling, exp(old), was below the threshold.
    """
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
