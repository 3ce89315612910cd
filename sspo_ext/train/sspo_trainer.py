"""SSPOTrainer: self-traced step-wise policy optimisation on `transformers.Trainer`.

An update: roll out (`rollout`), grade by the answer (`grade`), split into steps, probe what the policy itself thinks of
every prefix (`sspo_ext.signals`), turn values into step advantages by GAE over steps, and take one policy-gradient
step from hidden states. No length enters anywhere, no reward model, no value network. All of it happens where Trainer
collects the micro-batches of an update; optimisers, schedules, checkpoints, DDP and logging backends are Trainer's.

How values become advantages is our reconstruction of SSPO (arXiv 2508.12604).
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import time
from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from ..data.graders import Grader, answer_grader, answer_texts, grade_rows
from ..data.prompts import check_rows, prompt_tokens
from ..hf.forward import forward_hidden
from ..hf.head import model_head
from ..hf.wrappers import eval_mode
from ..layout.bundle import TensorBundle
from ..losses.policy import StepPolicyOutput, linear_step_policy_loss, step_policy_loss
from ..signals.credit.baselines import combine_advantages, outcome_advantages
from ..signals.credit.gae import step_gae
from ..signals.probing.probe import probe_step_values
from ..signals.split import delimiter_mask
from ..signals.values import StepBatch, StepValues
from .experience import (
    PromptSampler,
    Rollout,
    Summary,
    advantage_metrics,
    counted_items,
    graded_rollouts,
    num_items,
    over_std,
    policy_batch,
    rollout_metrics,
)
from .means import Sums
from .model_call import batch_logps, check_processes, choose_route, model_inputs, router_loss, text_logits
from .models import load_model
from .rollout import end_tokens, make_engine
from .sampling import RolloutEngine, Sampling
from .sspo_config import SSPOConfig

_METRICS = (
    "kl", "entropy", "ratio/mean", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
    "steps/logps", "steps/tokens",
)  # fmt: skip


class SSPOTrainer(Trainer):
    """Trains a causal LM on prompts with answers.

    Args:
        model: a causal LM, a PEFT model, or a name or path (`load_model`, which then gives the tokenizer too).
        args: SSPOConfig.
        reward_func: `reward(prompt, completion, answer) -> float`, or TRL's form `reward(prompts, completions,
            **columns) -> list[float]`, see `sspo_ext.data.graders`. In [0, 1], the scale of the values; of any scale
            with combine="outcome".
        train_dataset: rows with "prompt" (a text or chat messages) and "answer" (a text or number; a mapping with an
            "answer" for graders that need more; a list of accepted spellings). With a length. Every row is looked at.
        eval_dataset: the same. `evaluate()` completes it greedily: eval_accuracy, eval_reward, lengths.
        processing_class: the tokenizer.
        peft_config: wraps the model in an adapter. The reference (`beta`) is the model as given: without the adapter
            here; for a PeftModel that is given, with its adapter as it is then.
        engine: a RolloutEngine of your own in place of `args.rollout_engine`.
        **trainer_kwargs: Trainer's other arguments (callbacks, optimizers, ...).

    Override `step_values` for another estimate of a state's worth.
    """

    # compute_loss divides by the count of all accumulated micro-batches; Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        args: SSPOConfig,
        reward_func: Grader,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config=None,
        engine: RolloutEngine | None = None,
        **trainer_kwargs,
    ):
        if not isinstance(args, SSPOConfig):
            raise TypeError(f"args: expected an SSPOConfig, got {type(args).__name__}")
        if isinstance(model, (str, os.PathLike)):
            model, tokenizer = load_model(model)
            processing_class = processing_class or tokenizer
        if processing_class is None:
            raise ValueError("processing_class: expected the model's tokenizer, got None")
        probed = args.combine != "outcome"
        # values of a subclass's own making may need no text
        by_text = probed and (args.probe_options or {}).get("mode", "likelihood") == "likelihood"
        by_text = by_text and type(self).step_values is SSPOTrainer.step_values
        if not callable(reward_func):
            raise TypeError(f"reward_func: expected one function, see sspo_ext.data.graders, got {reward_func!r}")
        for name in ("compute_metrics", "compute_loss_func"):
            if trainer_kwargs.get(name) is not None:
                raise ValueError(f"{name}: expected None, since the trainer has its own, got {trainer_kwargs[name]!r}")
        self._chat = getattr(processing_class, "chat_template", None) is not None
        if probed and args.asked.turn and not self._chat:
            raise ValueError("probe_turn: expected a tokenizer with a chat template, which writes the user's turn")
        check_rows("train_dataset", train_dataset, chat=self._chat, answers=probed, texts=by_text)
        check_rows("eval_dataset", eval_dataset, chat=self._chat)
        self.ref_model = None
        if peft_config is not None:
            from peft import PeftModel, get_peft_model

            if isinstance(model, PeftModel):
                raise ValueError("peft_config: expected None for a PeftModel, which has an adapter; or merge that")
            model = get_peft_model(model, peft_config)
        elif args.beta:
            # What is frozen stays as it is and is shared: an adapter's reference costs an adapter.
            frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
            self.ref_model = copy.deepcopy(model, frozen).eval().requires_grad_(False)
        self.reward_func = reward_func
        self._on_scale = probed and type(self).step_values is SSPOTrainer.step_values
        self.pad_token_id = processing_class.pad_token_id or 0
        self.eos_token_ids = end_tokens(model, processing_class)
        # a model of several parts (text and images) has its vocabulary in the text's config
        vocabulary = model.config.get_text_config().vocab_size
        padding = [] if processing_class.pad_token_id is None else [processing_class.pad_token_id]
        self.delimiters = delimiter_mask(
            processing_class, args.split_by, vocab_size=max(vocabulary, len(processing_class)),
            eos_token_ids=[*self.eos_token_ids, *padding],
        )  # fmt: skip
        self._sums = Sums()
        self._buffer: tuple[list[dict], Tensor | float] | None = None
        self._update_began: float | None = None
        super().__init__(model, args, list, train_dataset, eval_dataset, processing_class, **trainer_kwargs)
        self.model_accepts_loss_kwargs = True
        self._check_batch()
        if engine is not None and args.rollout_options:
            raise ValueError("rollout_options: expected None beside an engine of your own, which has its options")
        self.engine = engine or make_engine(
            args.rollout_engine, processing_class, rows_at_once=args.rollout_batch_size, **(args.rollout_options or {})
        )
        self.route = choose_route(self.model, args.route, args.device)
        if self.ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)

    # ---- an update's batch

    def get_batch_samples(self, epoch_iterator, num_batches, device):
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
        """Micro-batches of this process and the number of items of all processes."""
        args, size = self.args, len(batches[0])
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        # A row's place in the whole update decides its seed and its group, whatever process it is on.
        places = [(g * world + rank) * size + j for g in range(len(batches)) for j in range(size)]
        update = self.state.global_step // args.num_iterations
        with eval_mode(self.model):
            rows = [row for batch in batches for row in batch]
            rollouts = self.roll_out(rows, [(args.seed, update, place) for place in places])
            if args.combine != "outcome":
                with self._sums.phase("probe"):
                    for rollout, values in zip(rollouts, self.step_values(rollouts), strict=True):
                        rollout.values = values
            shared = [Summary.of(place, rollout) for place, rollout in zip(places, rollouts, strict=True)]
            everyone = sorted(gather_object(shared)) if world > 1 else sorted(shared)
            # never to end is no better than the worst that was written
            worst = min([0.0, *(row.reward for row in everyone)])
            everyone = [row if row.ended else row._replace(reward=worst) for row in everyone]
            advantages = self.advantages(
                torch.tensor([row.reward for row in everyone]),
                [row.steps for row in everyone],
                [row.values for row in everyone],
                torch.tensor([row.place // args.num_generations for row in everyone]),
            )
            for place, rollout in zip(places, rollouts, strict=True):
                rollout.advantages = advantages[place]
                rollout.reward = rollout.reward if rollout.ended else worst
            for name, value in rollout_metrics(everyone).items():
                self._sums.add(name, value)
            for name, (total, count) in advantage_metrics(everyone, advantages).items():
                self._sums.add(name, total, count)
            # of like lengths together, which leaves little padding; the loss is a sum over all of them anyway
            rollouts.sort(key=lambda r: len(r.prompt_ids) + len(r.completion_ids))
            micro = [policy_batch(rollouts[i : i + size], self.pad_token_id) for i in range(0, len(rollouts), size)]
            with self._sums.phase("logps"):
                for batch in micro:
                    self._add_log_probs(batch)
        self.on_rollouts(rollouts)
        items = num_items(args.aggregation, everyone, args.max_completion_length)
        threshold = (args.loss_options or {}).get("prob_threshold")
        if threshold is not None and args.aggregation != "sum":
            counted = torch.tensor(counted_items(args.aggregation, micro, threshold), device=args.device)
            items = float(max(self.accelerator.reduce(counted, "sum").item(), 1))
        return micro, items

    def roll_out(
        self, rows: Sequence[Mapping], seeds: Sequence[Sequence[int]], *, temperature: float | None = None
    ) -> list[Rollout]:
        """Completions of the rows' prompts, graded and split into steps. `temperature` 0 is greedy."""
        args, tokenizer = self.args, self.processing_class
        sampling = Sampling(
            args.max_completion_length, self.eos_token_ids, args.temperature if temperature is None else temperature,
            args.top_p, args.top_k,
        )  # fmt: skip
        with self._sums.phase("rollout"), torch.no_grad(), self.accelerator.autocast():
            keys = [(isinstance(row["prompt"], str), str(row["prompt"])) for row in rows]  # a group's rows share theirs
            known = {key: row["prompt"] for key, row in zip(keys, rows, strict=True)}
            known = {key: prompt_tokens(prompt, tokenizer, args.chat_template_kwargs) for key, prompt in known.items()}
            prompts = [known[key] for key in keys]
            completions = self.engine.complete(self.model, prompts, sampling, seeds)
        with self._sums.phase("grade"):
            grader = functools.partial(grade_rows, self.reward_func, unit=self._on_scale, trainer_state=self.state)
            return graded_rollouts(rows, prompts, completions, tokenizer, self.eos_token_ids, self.delimiters, grader)

    def step_values(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """V_0 .. V_K of each: the policy's own estimate after the probe, and 0 at the end."""
        # Nothing is asked after the last step: the outcome itself is known there.
        states = StepBatch([r.prompt_ids for r in rollouts], [r.steps[:-1] for r in rollouts])
        options = {"tokenizer": self.processing_class, **(self.args.probe_options or {})}
        probe = self.args.asked
        if options.get("mode") == "graded":
            answers = [r.row for r in rollouts]
            judge = answer_grader(self.reward_func, probe)
            options["grader"] = lambda text, row: judge(
                text, [row["answer"]], **{name: value for name, value in row.items() if name != "answer"}
            )
        else:
            answers = [answer_texts(r.row["answer"]) for r in rollouts]
        with torch.no_grad(), self.accelerator.autocast():
            values = probe_step_values(self.model, states, probe, answers, **options).to_lists()
        return [[*v, 0.0] if r.steps else v for r, v in zip(rollouts, values, strict=True)]

    def advantages(
        self,
        rewards: Tensor,  # (B,) float32
        num_steps: Sequence[int],
        values: Sequence[list[float]],
        groups: Tensor,  # (B,) int64: the prompt each row completes
    ) -> list[list[float]]:
        """One advantage a step for every row of the whole update: step GAE and the outcome's, each over the standard
        deviation of its own (`scale_advantages`). No mean is taken off step advantages, which would reward long
        rollouts for their length.
        """
        args = self.args
        outcome = outcome_advantages(rewards, args.baseline, groups=groups)
        if args.scale_advantages:
            outcome = over_std(outcome)
        step_sequence = torch.repeat_interleave(torch.arange(len(rewards)), torch.tensor(num_steps))
        if args.combine == "outcome":
            found = outcome[step_sequence]
        else:
            traced = StepValues.from_lists(values)
            normalize = "batch" if args.scale_advantages else "none"
            gae = step_gae(traced, rewards, gamma=args.gamma, lam=args.lam, normalize=normalize)
            found = combine_advantages(gae, outcome, step_sequence, how=args.combine, step_scale=args.step_scale)
        return [part.tolist() for part in found.split(list(num_steps))]

    def on_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Called with this process's rollouts of every update, advantages and all; does nothing."""

    def _add_log_probs(self, batch: dict) -> None:
        """Token log-probs of the policy that wrote the batch, where it will be used more than once, and of the
        reference."""
        if self.args.num_iterations > 1 or (self.args.loss_options or {}).get("prob_threshold") is not None:
            batch["old"] = self._token_logps(self.model, batch)
        if self.args.beta:
            if self.ref_model is not None:
                batch["ref"] = self._token_logps(self.ref_model, batch)
            else:
                with self.model.disable_adapter():
                    batch["ref"] = self._token_logps(self.model, batch)

    def _token_logps(self, model: nn.Module, batch: dict) -> Tensor:
        args = self.args
        with torch.no_grad(), self.accelerator.autocast():
            return batch_logps(
                model, self._prepare_inputs(batch), self.route, chunk_bytes=args.chunk_bytes,
                temperature=args.temperature, backend=args.backend,
            ).tokens  # fmt: skip

    # ---- the loss

    def policy_loss(
        self, model: nn.Module, batch: dict, num_items: float | None
    ) -> tuple[StepPolicyOutput, Tensor | None]:
        """The model's forward and the loss of one micro-batch; and a mixture of experts' balance loss."""
        args = self.args
        options = {
            "old": batch.get("old"), "ref": batch.get("ref"), "loss_type": args.loss_type, "kl_coef": args.beta,
            "kl_estimator": args.kl_estimator, "entropy_coef": args.entropy_coef, "aggregation": args.aggregation,
            "num_items": num_items, "temperature": args.temperature, "backend": args.backend,
            **(args.loss_options or {}), **args.head_options,
        }  # fmt: skip
        if self.route == "linear":
            hidden, outputs = forward_hidden(model, **model_inputs(batch))
            head = model_head(model)
            options.update(head.options, chunk_bytes=args.chunk_bytes)
            out = linear_step_policy_loss(hidden, head.weight, batch["layout"], batch["advantages"], **options)
        else:
            outputs = model(**model_inputs(batch), use_cache=False)
            logits = text_logits(outputs, batch["layout"])
            out = step_policy_loss(logits, batch["layout"], batch["advantages"], **options)
        return out, router_loss(self.model, outputs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out, aux = self.policy_loss(model, inputs, num_items_in_batch)
        layout = inputs["layout"]
        for name, value in out.metrics.items():
            if name in _METRICS:
                count = layout.num_steps if name.startswith("steps/") else layout.num_rows
                self._sums.add(name, value.detach().float() * count, count)
        # DDP averages gradients over processes, while num_items counts the items of all of them.
        loss = out.loss * self.accelerator.num_processes
        if aux is not None:
            loss = loss + aux / self.args.gradient_accumulation_steps
        return (loss, out) if return_outputs else loss

    # ---- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Greedy completions of the dataset, `per_device_eval_batch_size` (or `rollout_batch_size`) at once: accuracy
        (share of rewards of at least 1), reward, tokens, steps."""
        args = self.args
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        check_rows("eval_dataset", dataset, chat=self._chat, required=True)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        rows = [dataset[i] for i in range(rank, len(dataset), world)]
        # vLLM makes its own batches, and is given the weights in every call.
        size = args.rollout_batch_size or args.per_device_eval_batch_size
        size = len(rows) if args.rollout_engine == "vllm" else size
        rollouts: list[Rollout] = []
        with eval_mode(self.model):
            for i in range(0, len(rows), max(size, 1)):
                some = rows[i : i + size]
                rollouts += self.roll_out(some, [(i + j,) for j in range(len(some))], temperature=0.0)
        shared = [Summary.of(0, rollout) for rollout in rollouts]
        everyone = gather_object(shared) if world > 1 else shared
        self._sums.forget("time/rollout", "time/grade")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in rollout_metrics(everyone).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args, **kwargs):
        raise NotImplementedError("predict: expected evaluate(dataset), which completes its prompts and grades them")

    # ---- what Trainer asks for

    def _get_train_sampler(self, train_dataset=None) -> PromptSampler:
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

    def _check_batch(self) -> None:
        check_processes(self.args)
        if self._rows_per_update % self.args.num_generations:
            raise ValueError(
                "per_device_train_batch_size: expected per_device_train_batch_size x gradient_accumulation_steps x "
                f"processes, here {self._rows_per_update}, to be a multiple of num_generations="
                f"{self.args.num_generations}"
            )

    def _prepare_input(self, data):
        return data.to(self.args.device) if isinstance(data, TensorBundle) else super()._prepare_input(data)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt", "answer"]

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs.update(self._sums.pop(self.accelerator, self.args.device))
        super().log(logs, *args, **kwargs)
