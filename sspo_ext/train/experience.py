# SPDX-License-Identifier: Apache-2.0
"""From completions to advantages: what an update of SSPO learns from, in plain lists, easy to print and send."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..data.chat import COLUMNS, chat_options
from ..data.graders import Grader, answer_grader, answer_texts
from ..data.prompts import prompt_tokens
from ..data.rewards import RewardFunctions
from ..data.sharing import PrefixSharing
from ..layout.steps import StepLayout
from ..signals.credit.baselines import combine_advantages, outcome_advantages
from ..signals.credit.gae import spread, step_gae
from ..signals.credit.objectives import rewards_advantages
from ..signals.split import split_steps
from ..signals.values import StepValues
from .options import dictionary
from .sampling import Completions

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
        reward: What the grader gave; of several functions the weighted sum.
        rewards: What each function gave. NaN: it does not apply. The first one says whether the answer is right.
        values: V_0 .. V_K for K steps. V_K is 0 by definition, since nothing follows the last step. Empty if nothing
            was probed.
        advantages: One for each step.
        sampling_logps: The log-prob that each token was drawn with; None: not known.
        kept: For each token the ids of the tokens that top-p and top-k kept; None: all, or not known.
        masked: Whether it is left out of the loss.
    """

    row: Any
    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    ended: bool
    steps: list[list[int]] = field(default_factory=list)
    reward: float = 0.0
    rewards: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    sampling_logps: list[float] | None = None
    kept: Sequence[Sequence[int] | Tensor] | None = None
    masked: bool = False


class Summary(NamedTuple):
    """What a process tells the others of a rollout. `place` is the row's place in the whole update."""

    place: int
    reward: float
    steps: int
    values: list[float]
    tokens: int
    ended: bool
    rewards: Sequence[float] = ()

    @property
    def answered(self) -> float:
        """The reward of the answer, which the first function gives."""
        return self.rewards[0] if self.rewards else self.reward

    @classmethod
    def of(cls, place: int, rollout: Rollout) -> Summary:
        """The summary of a rollout."""
        r = rollout
        return cls(place, r.reward, len(r.steps), r.values, len(r.completion_ids), r.ended, r.rewards or [r.reward])


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
    made: Completions,
    tokenizer,
    eos_token_ids: Collection[int],
    delimiters: Tensor,
    rewards: RewardFunctions,
    **more: Any,
) -> list[Rollout]:
    """Completions with their texts, steps and rewards, and with what is known of their sampling.

    `rewards` grades the completions that have ended, and is given `more`; the others get 0.
    """
    completions = made.token_ids
    ended = [bool(ids) and ids[-1] in eos_token_ids for ids in completions]
    texts = [  # the end of sequence is cut off here, since it need not be a special token
        tokenizer.decode(ids[:-1] if whole else ids, skip_special_tokens=True)
        for ids, whole in zip(completions, ended, strict=True)
    ]
    whole = [i for i, ends in enumerate(ended) if ends]
    names = dict.fromkeys(name for row in rows for name in row)  # the columns do not depend on which rows have ended
    graded = [{name: rows[i].get(name) for name in names} for i in whole]
    more["completion_ids"] = [completions[i] for i in whole]
    found = dict(zip(whole, rewards(graded, [texts[i] for i in whole], **more), strict=True))
    each = [found.get(i, [0.0] * len(rewards.functions)) for i in range(len(rows))]
    steps = split_steps(completions, delimiters)
    return [
        Rollout(
            row, prompts[i], completions[i], texts[i], ended[i], steps[i], rewards.total(each[i]), each[i],
            sampling_logps=None if made.logps is None else made.logps[i],
            kept=None if made.kept is None else made.kept[i],
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip


def prompt_groups(rollouts: Sequence[Rollout]) -> list[int]:
    """For each rollout the number of its prompt; equal prompts have one number."""
    numbers: dict[tuple[int, ...], int] = {}
    return [numbers.setdefault(tuple(r.prompt_ids), len(numbers)) for r in rollouts]


def micro_batches(
    rollouts: Sequence[Rollout], size: int, pad_token_id: int, sharing: PrefixSharing | None = None
) -> list[dict]:
    """Micro-batches of `size` rollouts; see `policy_batch`.

    Similar lengths share a micro-batch and need little padding; the loss is a sum over all of them anyway. Where
    prefixes are shared, so do the rollouts of a prompt.
    """
    groups = prompt_groups(rollouts) if sharing is not None else [0] * len(rollouts)
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in rollouts]
    longest: dict[int, int] = {}
    for group, length in zip(groups, lengths, strict=True):
        longest[group] = max(longest.get(group, 0), length)
    order = sorted(range(len(rollouts)), key=lambda i: (longest[groups[i]], groups[i], lengths[i]))
    return [
        policy_batch([rollouts[i] for i in order[start : start + size]], pad_token_id, sharing)
        for start in range(0, len(order), size)
    ]


def policy_batch(rollouts: Sequence[Rollout], pad_token_id: int, sharing: PrefixSharing | None = None) -> dict:
    """A micro-batch of rollouts, right-padded, or as trees where prefixes are shared and that pays.

    Returns:
        "input_ids" and "attention_mask" (n, T) int64; "layout", in which every token of a completion is scored, in its
        step, among the tokens that sampling kept; "advantages" (S,) float32, one for each step. "sampling_logps" (N,)
        float32, one for each scored token, if all rollouts have them. Instead of the mask a TokenTree as "tree".
    """
    rollouts = [_prompt_alone(r) if r.masked else r for r in rollouts]
    ids = [torch.tensor([*r.prompt_ids, *r.completion_ids], dtype=torch.int64) for r in rollouts]
    starts = [len(r.prompt_ids) for r in rollouts]
    labels, steps = [row.clone() for row in ids], [torch.full_like(row, -1) for row in ids]
    for r, start, label, step in zip(rollouts, starts, labels, steps, strict=True):
        label[:start] = -100
        step[start:] = torch.tensor([k for k, tokens in enumerate(r.steps) for _ in tokens], dtype=torch.int64)
    advantages = torch.tensor([a for r in rollouts for a in r.advantages], dtype=torch.float32)
    tree = None if sharing is None else sharing.tree(ids, prompt_groups(rollouts), pad_token_id)
    if tree is not None:
        layout, inputs = StepLayout.from_tree(tree, labels, steps), {"input_ids": tree.input_ids, "tree": tree}
    else:
        layout = StepLayout.from_step_ids(_padded(labels, -100), _padded(steps, -1))
        mask = _padded([torch.ones_like(row) for row in ids], 0)
        inputs = {"input_ids": _padded(ids, pad_token_id), "attention_mask": mask}
    if any(r.kept is not None for r in rollouts):
        whole = [[None] * len(r.completion_ids) if r.kept is None else r.kept for r in rollouts]
        layout = layout.with_kept_tokens(_of_scored(whole, rollouts))
    batch = {**inputs, "layout": layout, "advantages": advantages}
    drawn = [r.sampling_logps for r in rollouts if r.sampling_logps is not None]
    if rollouts and len(drawn) == len(rollouts):
        batch["sampling_logps"] = torch.tensor(_of_scored(drawn, rollouts), dtype=torch.float32)
    return batch


def _prompt_alone(rollout: Rollout) -> Rollout:
    """The rollout as if nothing had been completed: nothing of it is scored."""
    known: dict[str, Any] = {name: [] for name in ("sampling_logps", "kept") if getattr(rollout, name) is not None}
    return replace(rollout, completion_ids=[], steps=[], advantages=[], **known)


def _of_scored(values: Sequence[Sequence], rollouts: Sequence[Rollout]) -> list:
    """What the scored tokens have, in row order: all but a completion's first token that nothing predicts."""
    return [x for row, r in zip(values, rollouts, strict=True) for x in row[0 if r.prompt_ids else 1 :]]


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


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


def with_worst_rewards(rows: Sequence[Summary], rewards: RewardFunctions) -> list[Summary]:
    """The summaries, where completions that were cut off have the worst rewards.

    That is for each function 0, or the lowest of the update if that is below 0; for a function with a weight below 0
    the highest.
    """
    known = [[r for r in column if not math.isnan(r)] for column in zip(*(row.rewards for row in rows), strict=True)]
    worst = [
        min([0.0, *column]) if weight >= 0 else max([0.0, *column])
        for weight, column in zip(rewards.weights, known, strict=True)
    ]
    return [row if row.ended else row._replace(reward=rewards.total(worst), rewards=worst) for row in rows]


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
    if rewards.ndim == 2:
        how = args.multi_objective_aggregation
        outcome = rewards_advantages(rewards, args.baseline, groups=groups, weights=args.reward_weights, how=how)
        rewards = rewards[:, 0]
    else:
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
    counted_rows = [row for row in everyone if row.ended or not args.mask_truncated_completions]
    threshold = dictionary(args.loss_options).get("prob_threshold")
    if threshold is not None and args.aggregation != "sum":
        counted = torch.tensor(counted_items(args.aggregation, batches, threshold), device=args.device)
        count = accelerator.reduce(counted, "sum").item()
    else:
        count = {
            "token": sum(row.tokens for row in counted_rows),
            "step": sum(row.steps for row in counted_rows),
            "sequence": sum(row.tokens > 0 for row in counted_rows),
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
