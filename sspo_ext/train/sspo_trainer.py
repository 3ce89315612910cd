# SPDX-License-Identifier: Apache-2.0
"""SSPOTrainer: self-traced step-wise policy optimisation on `transformers.Trainer`.

The methods stand in the order of one update: values (`step_values`), advantages (`advantages`), loss (`policy_loss`,
`compute_loss`); rollouts and grading come before (`RolloutTrainer.roll_out`). All but the loss happens where Trainer
collects the micro-batches of an update.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.chat import row_probe
from ..data.graders import Grader
from ..data.rewards import RewardFunctions
from ..hf.wrappers import eval_mode
from ..losses.correction import rollout_correction
from ..losses.policy import StepPolicyOutput, linear_step_policy_loss, step_policy_loss
from ..signals.probing.likelihood import unit_values
from ..signals.probing.options import FLOOR
from ..signals.probing.probe import probe_step_values
from ..signals.values import StepBatch, StepValues
from .dropout import disable_dropout
from .engine_values import check_engine, engine_values
from .experience import (
    PromptSampler,
    Rollout,
    Summary,
    micro_batches,
    num_items,
    probe_answers,
    rollout_number,
    step_advantages,
    with_worst_rewards,
)
from .means import Sums
from .model_call import call_model, check_processes, choose_route, choose_sharing, router_loss
from .models import check_trainable, model_and_tokenizer, with_adapter
from .options import check_optimizer, dictionary
from .rollout import OWN_BATCHES, end_tokens, make_engine, rest
from .rollout_metrics import update_metrics, warn_near_zero
from .rollout_trainer import RolloutTrainer
from .sampling import RolloutEngine
from .sharded import partition, shard
from .sspo_config import SSPOConfig
from .sspo_inputs import (
    check_batch,
    check_datasets,
    check_given,
    frozen_copy,
    step_delimiters,
)
from .vllm_requests import VLLMRequests


class SSPOTrainer(RolloutTrainer):
    r"""Trains a causal LM on prompts with answers, by self-traced step-wise policy optimisation (SSPO).

    One update completes prompts with the policy, grades the answers, asks the policy itself what every prefix is worth,
    turns these values into step advantages by GAE over steps, and takes one policy-gradient step. The rewards see no
    length, and there is neither a reward model nor a value network. How values become advantages is our reconstruction
    of SSPO (arXiv 2508.12604).

    Override `step_values` for another estimate of a prefix's value, and `on_rollouts` to look at the rollouts.

    Args:
        model: A causal LM, a PeftModel, or a name or path, which `load_model` loads together with its tokenizer. It
            has parameters that require a gradient, as an adapter has that is loaded by its path.
        args: The options.
        reward_func: `reward(prompt, completion, answer) -> float`, or TRL's form `reward(prompts, completions,
            **columns) -> list[float]`; see `sspo_ext.data.graders`. Rewards are in [0, 1], the scale of the values;
            with combine="outcome" they may have any scale. A completion that was cut off is not graded. Of several
            functions (a list) the first one says whether the answer is right: values and step advantages are about its
            rewards. The others, of any scale, count for the outcome's advantage, see `args.reward_weights`. None from
            one of several: it does not apply.
        train_dataset: Rows with "prompt" and "answer", with a length. The prompt is a text or chat messages. The
            answer is a text, a number, a list of accepted spellings, or a mapping for graders that need more. Every row
            is checked before training.
        eval_dataset: The same. `evaluate()` completes it greedily.
        processing_class: The tokenizer. It must have an end-of-sequence token.
        peft_config: Wraps the model in a new adapter, and only the adapter is trained. Then the reference of the KL
            divergence (`beta`) is the model without it. Otherwise it is a frozen copy of the model as given, which
            shares the parameters that are not trained.
        engine: A `RolloutEngine` of your own in place of `args.rollout_engine`.
        **trainer_kwargs: Other arguments of Trainer, such as callbacks and optimizers.

    Raises:
        TypeError: If `args` is no SSPOConfig, or `reward_func` no function.
        ValueError: For rows, options or a tokenizer that cannot work together, naming the argument.
        UnsupportedHead: With route="linear", for a model whose LM head that route cannot use.

    Examples:
        >>> import tempfile
        >>> from sspo_ext.train import SSPOConfig, SSPOTrainer
        >>> rows = [{"prompt": f"{a} + {a} = ? \n", "answer": str(2 * a)} for a in range(2, 10)]
        >>> args = SSPOConfig(
        ...     tempfile.mkdtemp(), per_device_train_batch_size=8, num_generations=4, max_completion_length=8,
        ...     max_steps=1, probe="####", use_cpu=True, report_to="none", disable_tqdm=True,
        ... )
        >>> def right(prompt, completion, answer):
        ...     return float(completion.rpartition("####")[2].strip() == answer)
        >>> trainer = SSPOTrainer(model, args, right, rows, processing_class=tokenizer)
        >>> log = trainer.train()
    """

    args: SSPOConfig
    columns = ("prompt", "answer")

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        args: SSPOConfig,
        reward_func: Grader | Sequence[Grader],
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config=None,
        engine: RolloutEngine | None = None,
        **trainer_kwargs,
    ):
        if not isinstance(args, SSPOConfig):
            raise TypeError(f"args: expected an SSPOConfig, got {type(args).__name__}")
        policy, tokenizer = model_and_tokenizer(model, processing_class)
        check_given(args, tokenizer, reward_func, engine, trainer_kwargs)
        own_values = type(self).step_values is not SSPOTrainer.step_values
        check_datasets(args, policy, tokenizer, train_dataset, eval_dataset, own_values=own_values)
        self.ref_model = None
        if peft_config is not None:
            policy = with_adapter(policy, peft_config)
        elif args.beta:
            self.ref_model = frozen_copy(policy)
        if train_dataset is not None:
            check_trainable(policy)
        if args.disable_dropout:
            disable_dropout(policy)
        self.reward_func, self.rewards = reward_func, RewardFunctions(reward_func, args.reward_weights)
        self._unit_rewards = args.combine != "outcome" and not own_values
        self._watch_probe = self._unit_rewards  # until it has warned
        foreign = engine is not None or args.rollout_engine in OWN_BATCHES
        wanted = args.vllm_importance_sampling_correction
        self._corrects = foreign if wanted is None else wanted
        self.pad_token_id = tokenizer.pad_token_id or 0
        self.eos_token_ids = end_tokens(policy, tokenizer)
        self.delimiters = step_delimiters(policy, tokenizer, args.split_by, self.eos_token_ids)
        self._sums = Sums()
        self._buffer: tuple[list[dict], float] | None = None
        self._update_began: float | None = None
        super().__init__(policy, args, cast(Any, list), train_dataset, eval_dataset, tokenizer, **trainer_kwargs)
        self.model_accepts_loss_kwargs = True
        check_processes(args)
        self._check_parallelism()
        check_optimizer(self, args)
        check_batch(args, self._rows_per_update)
        options = dictionary(args.rollout_options)
        self.engine = engine or make_engine(
            args.rollout_engine, tokenizer, rows_at_once=args.rollout_batch_size, **options
        )
        check_engine(self.engine, args.probe_engine)
        if self.zero_stage == 3 and isinstance(self.engine, VLLMRequests):
            raise ValueError(f"engine: expected one without vLLM with ZeRO-3, got {type(self.engine).__name__}")
        self._partition()
        self.route = choose_route(self.model, args.route, args.device, narrowed=args.top_p < 1 or args.top_k > 0)
        self.sharing = choose_sharing(self.model, args.prefix_sharing)
        self._shard()
        if self.ref_model is not None and self.zero_stage == 3:
            partition(self.ref_model, self.accelerator, args)
        elif self.ref_model is not None and self._is_sharded:
            shard(self.ref_model, self.accelerator)
        elif self.ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)

    # ---- one update

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device) -> tuple[list, Any]:
        """The micro-batches of the next update; new rollouts once in `num_iterations` updates."""
        if self._is_finished():
            return [], None
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        if self._update_began is not None:
            self._sums.add("time/update", time.perf_counter() - self._update_began)
        if self._buffer is None or self.state.global_step % self.args.num_iterations == 0:
            self._buffer = self._experience(batches)
        self._update_began = time.perf_counter()
        return self._buffer

    def _experience(self, batches: Sequence[Sequence[Mapping]]) -> tuple[list[dict], float]:
        """Micro-batches of this process, and the number of items of all processes."""
        args, size = self.args, len(batches[0])
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        # A row's place in the whole update decides its seed and its group, on whatever process it is.
        places = [(g * world + rank) * size + j for g in range(len(batches)) for j in range(size)]
        update = rollout_number(self.state.global_step, args.num_iterations)
        with eval_mode(self.model):
            rows = [row for batch in batches for row in batch]
            with self.in_step():
                rollouts = self.roll_out(rows, [(args.seed, update, place) for place in places])
                if args.combine != "outcome":
                    with self._sums.phase("probe"):
                        for rollout, values in zip(rollouts, self.step_values(rollouts), strict=True):
                            rollout.values = values
                rest(self.engine)
            everyone = self._assign_advantages(places, rollouts)
            rollouts.sort(key=lambda r: len(r.prompt_ids) + len(r.completion_ids))
            micro = micro_batches(rollouts, size, self.pad_token_id, self.sharing)
            with self._sums.phase("logps"):
                for batch in micro:
                    self._add_log_probs(batch)
        self.on_rollouts(rollouts)
        return micro, num_items(args, everyone, micro, self.accelerator)

    def step_values(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Estimates the value of every prefix: the policy's own chance of the right answer, asked by the probe.

        Log-probabilities (`probe_options={"reduce": "logprob"}`) are put on the rewards' scale, see `unit_values`.

        Args:
            rollouts: Rollouts of this process, split into steps and graded.

        Returns:
            V_0 .. V_K for each rollout of K steps, with V_K = 0; `[V_0]` for one without steps. The advantages take
            values to be on the scale of the rewards.
        """
        # After the last step nothing is asked, since the outcome is known there.
        states = StepBatch([r.prompt_ids for r in rollouts], [r.steps[:-1] for r in rollouts])
        answers, grader = probe_answers(rollouts, self.args, self.rewards.functions[0])
        options = {"tokenizer": self.processing_class, **dictionary(self.args.probe_options), **grader}
        ask: Callable[..., StepValues] = probe_step_values
        if self.args.probe_engine == "rollout":
            ask = functools.partial(engine_values, self.engine)
        elif self.sharing is not None and self.sharing.skips and options.get("mode", "likelihood") == "likelihood":
            options.setdefault("engine", "shared")  # rollouts of a prompt share it
        with torch.no_grad(), self.accelerator.autocast():
            probes = [row_probe(self.args.asked, r.row) for r in rollouts]
            values = ask(self.model, states, probes, answers, **options)
        if options.get("reduce") == "logprob":
            values = unit_values(values, options.get("floor", FLOOR))
        return [[*v, 0.0] if r.steps else v for r, v in zip(rollouts, values.to_lists(), strict=True)]

    def advantages(
        self, rewards: Tensor, num_steps: Sequence[int], values: Sequence[list[float]], groups: Tensor
    ) -> list[list[float]]:
        """Turns rewards and values of the whole update into one advantage for each step.

        Step advantages (GAE over steps) and the outcome's are each divided by their own standard deviation
        (`scale_advantages`) and then combined. No mean is subtracted from step advantages: that would reward length.
        Those that hardly differ are 0 (`min_signal`).

        Args:
            rewards: (B,) float32, one for each rollout of all processes; with several reward functions (B, R), NaN
                where one does not apply.
            num_steps: The number of steps of each rollout, B of them.
            values: V_0 .. V_K of each rollout; not read with combine="outcome".
            groups: (B,) int64, the prompt that each rollout completes.

        Returns:
            For each rollout a list with one advantage for each step.
        """
        return step_advantages(self.args, rewards, num_steps, values, groups, self._sums)

    def _assign_advantages(self, places: Sequence[int], rollouts: Sequence[Rollout]) -> list[Summary]:
        """Gathers the rollouts of all processes, and sets rewards and advantages of this process's."""
        shared = [Summary.of(place, rollout) for place, rollout in zip(places, rollouts, strict=True)]
        everyone = sorted(gather_object(shared)) if self.accelerator.num_processes > 1 else sorted(shared)
        args, everyone = self.args, with_worst_rewards(everyone, self.rewards)
        several = len(self.rewards.functions) > 1 or args.reward_weights is not None
        advantages = self.advantages(
            torch.tensor([row.rewards if several else row.reward for row in everyone]),
            [row.steps for row in everyone],
            [row.values for row in everyone],
            torch.tensor([row.place // self.args.num_generations for row in everyone]),
        )
        for place, rollout in zip(places, rollouts, strict=True):
            rollout.advantages = advantages[place]
            rollout.masked = self.args.mask_truncated_completions and not rollout.ended
            rollout.reward, rollout.rewards = everyone[place].reward, list(everyone[place].rewards)
        for name, (total, count) in update_metrics(everyone, advantages, self.rewards.names).items():
            self._sums.add(name, total, count)
        if self._watch_probe:
            self._watch_probe = not warn_near_zero(everyone, self.args.asked.text)
        return everyone

    def on_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Called with the new rollouts of this process, advantages and all; does nothing here.

        Args:
            rollouts: Complete rollouts, sorted by length.
        """

    def _add_log_probs(self, batch: dict) -> None:
        """Adds token log-probs to the batch: the sampling policy's, if the loss needs them, and the reference's.

        Where the rollouts have log-probs of their own, importance weights too.
        """
        sampling = batch.pop("sampling_logps", None)
        ratio = self.args.num_iterations > 1 or dictionary(self.args.loss_options).get("prob_threshold") is not None
        if ratio or sampling is not None:
            old = self.logps_without_grad(self.model, batch).tokens
            if ratio:
                batch["old"] = old
            if sampling is not None:
                layout = batch["layout"].to(old.device)
                found = rollout_correction(old, sampling.to(old.device), layout, **self.args.correction_arguments)
                batch["importance_weights"] = found.weights
                self._sums.add_correction(found.metrics, layout)
        if self.args.beta:
            if self.ref_model is not None:
                batch["ref"] = self.logps_without_grad(self.ref_model, batch).tokens
            else:
                with self.model.disable_adapter():
                    batch["ref"] = self.logps_without_grad(self.model, batch).tokens

    # ---- the loss

    def policy_loss(
        self, model: nn.Module, batch: dict, num_items: float | Tensor | None
    ) -> tuple[StepPolicyOutput, Tensor | None]:
        """Runs the model on one micro-batch.

        Args:
            model: The policy, perhaps wrapped (DDP).
            batch: What `policy_batch` returns, on the model's device (advantages: on the host).
                With log-probs "old" and "ref", and "importance_weights", if needed.
            num_items: The number of tokens, steps or sequences that the loss divides by; None means this batch's.

        Returns:
            The loss, and the balance loss of a mixture of experts (None for other models).
        """
        args = self.args
        options = {name: batch.get(name) for name in ("old", "ref", "importance_weights")}
        options |= {"num_items": num_items, **args.loss_arguments}
        call = call_model(model, batch, self.route, args.chunk_bytes)
        loss: Callable[..., StepPolicyOutput] = linear_step_policy_loss if call.linear else step_policy_loss
        out = call.run(loss, batch["layout"], batch["advantages"], **options)
        return out, router_loss(self.model, call.outputs)

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        """The loss of one micro-batch. Its share of the update is already in it, so Trainer divides by nothing."""
        out, aux = self.policy_loss(model, inputs, num_items_in_batch)
        self._sums.add_loss(out, inputs["layout"])
        # DDP averages gradients over processes, while num_items counts the items of all of them.
        loss = out.loss * self.accelerator.num_processes
        if aux is not None:
            loss = loss + aux / self.args.gradient_accumulation_steps
        return (loss, out) if return_outputs else loss

    # ---- what Trainer asks for

    def _get_train_sampler(self, train_dataset: Any = None) -> PromptSampler:
        args = self.args
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return PromptSampler(
            len(dataset), self._rows_per_update // args.num_generations, args.num_generations, args.num_iterations,
            args.seed, lambda: self.state.global_step,
        )  # fmt: skip

    @property
    def _rows_per_update(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the means since the last log to a line with the loss."""
        if "loss" in logs:
            logs.update(self._sums.pop(self.accelerator, self.args.device))
        super().log(logs, *args, **kwargs)
