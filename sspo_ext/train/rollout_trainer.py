# SPDX-License-Identifier: Apache-2.0
"""A trainer that completes prompts with its model and grades the completions, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..data.graders import Grader
from ..data.prompts import check_rows
from ..data.rewards import RewardFunctions
from ..hf.wrappers import eval_mode
from .base import StepTrainer
from .experience import Rollout, Summary, graded_rollouts, prompt_ids
from .means import Sums
from .options import dictionary
from .rollout import OWN_BATCHES, rest
from .rollout_metrics import rollout_metrics
from .sampling import RolloutEngine, Sampling
from .sspo_inputs import checked_completions, has_chat, rendering_of


class RolloutTrainer(StepTrainer):
    """A StepTrainer with an engine that completes prompts and a function that grades."""

    engine: RolloutEngine
    reward_func: Grader | Sequence[Grader]
    rewards: RewardFunctions
    delimiters: Tensor  # (V,) bool: the tokens that end a step
    eos_token_ids: Any
    _sums: Sums
    _unit_rewards: bool  # rewards of the first function have to be in [0, 1], the scale of the values
    _corrects: bool  # completions may be drawn with other probabilities than the loss's

    def roll_out(
        self, rows: Sequence[Mapping], seeds: Sequence[Sequence[int]], *, temperature: float | None = None
    ) -> list[Rollout]:
        """Completes the rows' prompts, grades the completions and splits them into steps.

        Args:
            rows: Rows of the dataset.
            seeds: For each row a few non-negative integers. They decide what is drawn.
            temperature: In place of `args.temperature`; 0 is greedy. Then nothing but tokens is asked of the engine.

        Returns:
            One rollout for each row, without values and advantages.
        """
        args, tokenizer, trains = self.args, self.processing_class, temperature is None
        sampling = Sampling(
            args.max_completion_length, self.eos_token_ids, args.temperature if temperature is None else temperature,
            args.top_p, args.top_k, logps=trains and self._corrects, kept=trains and (args.top_p < 1 or args.top_k > 0),
        )  # fmt: skip
        with self._sums.phase("rollout"), torch.no_grad(), self.accelerator.autocast():
            prompts = prompt_ids(rows, tokenizer, dictionary(args.chat_template_kwargs))
            made = self.engine.complete(self.model, prompts, sampling, seeds)
            made = checked_completions(made, sampling, args.vllm_importance_sampling_correction)
        with self._sums.phase("grade"):
            return graded_rollouts(
                rows, prompts, made, tokenizer, self.eos_token_ids, self.delimiters, self.rewards,
                unit=self._unit_rewards, trainer_state=self.state,
            )  # fmt: skip

    def evaluate(self, eval_dataset: Any = None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Completes a dataset greedily and grades it.

        Args:
            eval_dataset: Rows as in training; None means the trainer's own. `per_device_eval_batch_size` of them (or
                `rollout_batch_size`) are completed at once.
            ignore_keys: Has no effect; Trainer passes it.
            metric_key_prefix: Put before the names of the metrics.

        Returns:
            eval_accuracy (the share of the first function's rewards of at least 1), eval_reward, eval_reward_std,
            eval_completions/mean_length (tokens), eval_completions/clipped_ratio and eval_steps/mean.
        """
        args = self.args
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        tokenizer = self.processing_class
        check_rows("eval_dataset", dataset, chat=has_chat(tokenizer), required=True, **rendering_of(args, tokenizer))
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        # Every process completes as many rows, and those beyond the last one are not counted.
        mine, each = len(range(rank, len(dataset), world)), -(-len(dataset) // world)
        rows = [dataset[min(rank + i * world, len(dataset) - 1)] for i in range(each)]
        # vLLM makes its own batches, and is handed the weights in every call.
        size = args.rollout_batch_size or args.per_device_eval_batch_size
        size = len(rows) if args.rollout_engine in OWN_BATCHES else size
        rollouts: list[Rollout] = []
        with eval_mode(self.model), self.in_step():
            for i in range(0, len(rows), max(size, 1)):
                some = rows[i : i + size]
                rollouts += self.roll_out(some, [(i + j,) for j in range(len(some))], temperature=0.0)
            rest(self.engine)
        shared = [Summary.of(0, rollout) for rollout in rollouts[:mine]]
        everyone = gather_object(shared) if world > 1 else shared
        self._sums.forget("time/rollout", "time/grade")
        found = rollout_metrics(everyone, self.rewards.names)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args, **kwargs) -> NoReturn:
        """Not there: `evaluate(dataset)` completes and grades a dataset."""
        raise NotImplementedError("predict: expected evaluate(dataset), which completes its prompts and grades them")
