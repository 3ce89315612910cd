# SPDX-License-Identifier: Apache-2.0
"""TRL's GRPOTrainer with an advantage for each step, and its DPOTrainer with pairs of steps."""

# TRL's and transformers' trainers do not say what their members are.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportOptionalSubscript=false, reportGeneralTypeIssues=false

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer  # pyright: ignore[reportMissingImports]
from trl.models.utils import disable_gradient_checkpointing  # pyright: ignore[reportMissingImports]
from trl.trainer.utils import use_adapter  # pyright: ignore[reportMissingImports]

from .._versions import check_version
from ..formulas.registry import PAIR_FORMULAS
from ..layout.steps import StepLayout
from ..losses.common import StepGrid
from ..losses.pref import pref_loss
from ..objective.sums import StepLogps
from ..signals.credit.tokens import combine_advantages_tokens, step_gae_tokens
from ..signals.split import delimiter_mask, step_ids_from_tokens
from ..signals.values import StepBatch, StepValues
from .probing import LogprobEngine, values_before_steps

check_version("trl", "1.16")


def _delimiters(trainer) -> Tensor:
    """(V,): what each token does to a step."""
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    vocabulary = trainer.model.config.get_text_config().vocab_size
    size = max(vocabulary, len(tokenizer))
    return delimiter_mask(tokenizer, trainer.split_by, vocab_size=size).to(trainer.accelerator.device)


class StepGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages differ from step to step, (B, T): GRPO's own, and those of GAE over steps.

    The policy is asked what each prefix of a completion is worth, by `probe_step_values`. Everything else is TRL's:
    sampling, rewards, losses, metrics, and with vLLM the importance weights of its rollouts
    (`vllm_importance_sampling_mode`). The advantages that TRL logs are those of the outcomes.

    Args:
        *args: GRPOTrainer's. A row of the data set has the right answer, beside "prompt".
        probe: as in `probe_step_values`.
        answer_column: the column of the right answers.
        gamma: as in `step_gae`.
        lam: as in `step_gae`.
        combine: how step and outcome advantages are combined, as in `combine_advantages`.
        step_scale: factor of the step advantages.
        split_by: what a step is, as in `split_text`; not "numbered".
        engine: asked for values in place of the policy, such as a `servers.LogprobServer`. It must have the policy's
            weights; handing them over is up to the caller.
        probe_options: further options of `probe_step_values`, beside an engine of `probe_requests`.
        **kwargs: GRPOTrainer's.

    Raises:
        NotImplementedError: the policy is sharded (FSDP, ZeRO-3), where ranks would probe different numbers of states,
            and neither is an engine given nor `step_values` overridden.

    Examples:
        >>> trainer = StepGRPOTrainer(model, reward, args, rows, processing_class=tokenizer, probe="####")
        >>> trainer.train()
    """

    def __init__(
        self,
        *args,
        probe: Any,
        answer_column: str = "answer",
        gamma: float = 1.0,
        lam: float = 1.0,
        combine: str = "add",
        step_scale: float = 1.0,
        split_by: str = "newline",
        engine: LogprobEngine | None = None,
        probe_options: dict[str, Any] | None = None,
        **kwargs,
    ):
        self.probe, self.answer_column, self.split_by = probe, answer_column, split_by
        self.gamma, self.lam, self.combine, self.step_scale = gamma, lam, combine, step_scale
        self.engine, self.probe_options = engine, probe_options or {}
        super().__init__(*args, **kwargs)
        own = engine is not None or type(self).step_values is not StepGRPOTrainer.step_values
        zero_3 = getattr(self.accelerator.state.deepspeed_plugin, "zero_stage", 0) == 3
        if not own and (self.is_fsdp_enabled or zero_3):
            raise NotImplementedError(
                "StepGRPOTrainer: a sharded policy (FSDP, ZeRO-3) cannot be probed on ranks that ask different numbers "
                "of states; pass an engine, or override step_values"
            )

    ends_step = functools.cached_property(_delimiters)

    def step_values(self, batch: StepBatch, rows: Sequence[dict]) -> StepValues:
        """Estimate the value of every prefix.

        Args:
            batch: prompts and steps of this process's completions.
            rows: their rows of the data set.

        Returns:
            V_0, ..., V_K for each of them; V_K is not read.
        """
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        answers = [row[self.answer_column] for row in rows]
        with torch.no_grad(), self.accelerator.autocast():
            return values_before_steps(
                self.accelerator.unwrap_model(self.model), batch, self.probe, answers, tokenizer=tokenizer,
                engine=self.engine, **self.probe_options,
            )  # fmt: skip

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        per_function = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        mine = self.accelerator.process_index * len(prompts)
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(1)
        self._outcomes = rewards[mine : mine + len(prompts)]
        return per_function

    def _generate_and_score_completions(self, inputs):
        found = super()._generate_and_score_completions(inputs)
        completion, mask = found["completion_ids"], found["completion_mask"]
        written = mask * found["tool_mask"] if "tool_mask" in found else mask
        step_ids = step_ids_from_tokens(completion, written, self.ends_step)
        whole = torch.cat([found["prompt_ids"], completion], 1)
        attention = torch.cat([found["prompt_mask"], mask], 1)
        in_whole = torch.nn.functional.pad(step_ids, (found["prompt_ids"].shape[1], 0), value=-1)
        values = self.step_values(StepBatch.from_tensors(whole, in_whole, attention), inputs)
        steps = step_gae_tokens(values.to(step_ids.device), self._outcomes, step_ids, gamma=self.gamma, lam=self.lam)
        found["advantages"] = combine_advantages_tokens(
            steps, found["advantages"], step_ids, self.combine, step_scale=self.step_scale
        )
        mode = "train" if self.model.training else "eval"
        first = values.values[values.offsets[:-1]].mean()
        self._metrics[mode]["values/first"].append(self.accelerator.gather(first).mean().item())
        self._metrics[mode]["advantages/steps"].append(self.accelerator.gather(steps.abs().mean()).mean().item())
        return found


class StepDPOTrainer(DPOTrainer):
    """DPOTrainer whose pairs are steps: step k of the chosen answer against step k of the rejected one.

    References are TRL's: a model, the policy without its adapter, or log-probs computed before (by step). TRL's fused
    head makes the log-probs. `loss_type` takes every pair loss of this package, alone or mixed.

    Args:
        *args: DPOTrainer's.
        split_by: what a step is, as in `split_text`; not "numbered".
        **kwargs: DPOTrainer's. `compute_metrics` is not supported, since no logits are kept.

    Raises:
        ValueError: an option of DPOConfig has no meaning here: ld_alpha, f_divergence_type, use_weighting.

    Examples:
        >>> trainer = StepDPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
        >>> trainer.train()
    """

    def __init__(self, *args, split_by: str = "newline", **kwargs):
        self.split_by, self._columns = split_by, 0
        super().__init__(*args, **kwargs)
        for name, plain in (("ld_alpha", None), ("f_divergence_type", "reverse_kl"), ("use_weighting", False)):
            if getattr(self, name) != plain:
                raise ValueError(f"{name}: expected {plain!r} beside steps, got {getattr(self, name)!r}")
        unknown = [name for name in self.loss_types if name not in PAIR_FORMULAS]
        if unknown:
            raise ValueError(f"loss_type: expected a pair loss of sspo_ext, got {unknown[0]!r}")

    ends_step = functools.cached_property(_delimiters)

    def _layout(self, inputs) -> StepLayout:
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        step_ids = step_ids_from_tokens(ids, mask, self.ends_step)
        return StepLayout.from_response(mask[:, 1:], step_ids[:, 1:])  # log-probs start at the second token

    @staticmethod
    def _forward(model, inputs, **more):
        given = {
            k: v for k, v in inputs.items() if k not in ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        }
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        found = model(**given, labels=labels, use_cache=False, fused_lm_head=True, **more)
        return found, found.log_probs[:, 1 - labels.shape[1] :]

    def _precompute_ref_logps(self, dataset, name, batch_size):
        ids = [[torch.tensor(row) for row in dataset[side]] for side in ("chosen_ids", "rejected_ids")]
        ends = self.ends_step.cpu()
        steps = [
            int(step_ids_from_tokens(x, torch.ones_like(x), ends).max()) + 1 for side in ids for x in side if len(x)
        ]
        self._columns = max(steps, default=1)  # of the columns that TRL keeps, equally many for every row
        mark = f" by steps ({self.split_by!r})"
        if not str(self._precompute_model_hash).endswith(mark):  # else a cache of sequences' log-probs would be found
            self._precompute_model_hash = f"{self._precompute_model_hash}{mark}"
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model, inputs):
        """The reference's step log-probs: (B, K) of the chosen, (B, K) of the rejected sequences."""
        context = contextlib.nullcontext()
        if self.ref_model is None and hasattr(self.model, "peft_config"):
            policy = self.accelerator.unwrap_model(self.model)
            context = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        still = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), still, context, self.accelerator.autocast():
            _, tokens = self._forward(model, inputs)
        layout = self._layout(inputs)
        grid = StepGrid(layout).spread(StepLogps.from_tokens(tokens, layout).sums)
        return torch.nn.functional.pad(grid, (0, max(0, self._columns - grid.shape[1]))).chunk(2)

    def _compute_loss(self, model, inputs, return_outputs):
        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs, tokens = self._forward(model, inputs, **more)
        layout = self._layout(inputs)
        if self.precompute_ref_logps:
            ref = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            ref = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        grid = StepGrid(layout)
        ref = grid.gather(torch.cat(ref)[:, : grid.shape[1]])
        alone = len(self.loss_types) == 1
        out = pref_loss(
            tokens, layout, ref=ref, beta=self.beta, label_smoothing=self.label_smoothing,
            loss_type=self.loss_types[0] if alone else self.loss_types,
            loss_weights=None if alone else self.loss_weights,
        )  # fmt: skip
        loss = out.loss * self.loss_weights[0] if alone else out.loss
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in out.metrics.items():
            metrics[name].append(self.accelerator.gather(value).float().mean().item())
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        return (loss, outputs) if return_outputs else loss
