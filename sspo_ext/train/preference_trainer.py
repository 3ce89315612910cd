# SPDX-License-Identifier: Apache-2.0
"""StepPreferenceTrainer: `transformers.Trainer` with a step-wise preference loss.

It adds to Trainer the loss, its normaliser over accumulated micro-batches, the reference's log-probs, and metrics.
Optimisers, schedules, checkpoints, DDP and logging are Trainer's.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..backends import select
from ..data.collator import StepPreferenceCollator
from ..losses.pref import StepPrefOutput, linear_step_pref_loss, step_pref_loss
from ..objective.pair_arguments import checked_options, chosen_formulas
from .dropout import disable_dropout
from .limits import model_limits
from .means import Means
from .model_call import (
    call_model,
    check_processes,
    choose_route,
    choose_sharing,
    router_loss,
    uses_flash_attention,
)
from .models import check_trainable, model_and_tokenizer, with_adapter
from .options import check_optimizer, dictionary
from .preference_config import StepPreferenceConfig
from .reference_cache import TOKEN_COLUMNS
from .referenced import ReferencedTrainer
from .whole_batches import fill_last_batches, whole_batches


class StepPreferenceTrainer(ReferencedTrainer):
    r"""Trains a causal LM on preference rows, with a loss on the log-probs of steps.

    The reference's step log-probs are computed once, before training, and cached on disk. The loss then needs no
    reference model.

    Args:
        model: A causal LM, a PeftModel, or a name or path, which `load_model` loads together with its tokenizer. It
            has parameters that require a gradient, as an adapter has that is loaded by its path.
        args: The options.
        train_dataset: Features that `tokenize_rows` made: a list or a datasets.Dataset. It must have a length, unless
            the loss needs no reference or the features have `ref_chosen` and `ref_rejected` already.
        eval_dataset: The same, or a dictionary of them.
        processing_class: The tokenizer. It pads batches and is saved with checkpoints.
        data_collator: In place of `StepPreferenceCollator`.
        peft_config: Wraps the model in a new adapter (LoraConfig, ...), and only the adapter is trained. The reference
            is then the model without it. Otherwise it is the model as given, with the adapter of a PeftModel.
        **trainer_kwargs: Other arguments of Trainer, such as callbacks and optimizers.

    Raises:
        TypeError: If `args` is no StepPreferenceConfig, or for an option that the loss type does not have.
        ValueError: For options that do not fit the loss, rows that are not tokenized or that the model cannot read, a
            dataset without a length where a reference is needed, reference log-probs that are not finite, and `packing`
            with a model whose packed sequences see each other.
        UnsupportedHead: With route="linear", for a model whose LM head that route cannot use.

    Examples:
        >>> import tempfile
        >>> from sspo_ext.train import StepPreferenceConfig, StepPreferenceTrainer, load_preference_rows, tokenize_rows
        >>> pair = {"prompt": "2 + 3 = ? \n", "chosen": "2 + 3 = 5 \n #### 5", "rejected": "2 + 3 = 6 \n #### 6"}
        >>> rows = tokenize_rows(load_preference_rows([pair]), tokenizer)
        >>> args = StepPreferenceConfig(
        ...     tempfile.mkdtemp(), beta=0.1, max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
        ... )
        >>> trainer = StepPreferenceTrainer(model, args, rows, processing_class=tokenizer)
        >>> log = trainer.train()
    """

    args: StepPreferenceConfig
    columns = (*TOKEN_COLUMNS, "pairs", "weight", "margin", "ref_chosen", "ref_rejected")

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        args: StepPreferenceConfig,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator=None,
        peft_config=None,
        **trainer_kwargs,
    ):
        if not isinstance(args, StepPreferenceConfig):
            raise TypeError(f"args: expected a StepPreferenceConfig, got {type(args).__name__}")
        if trainer_kwargs.get("compute_metrics") is not None:
            raise ValueError(
                "compute_metrics: expected None, since evaluation keeps no logits; it returns the loss's metrics"
            )
        if trainer_kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: expected None, since the loss is loss_type's; override compute_loss")
        formulas = chosen_formulas(args.loss_type, args.loss_weights)
        checked_options(formulas, args.beta, dictionary(args.loss_options))
        needing = [formula.name for formula, _ in formulas if formula.reference == "required"]
        if args.reference_free and needing:
            raise ValueError(f"reference_free: expected False, since loss_type {needing[0]!r} needs a reference")
        policy, tokenizer = model_and_tokenizer(model, processing_class)
        self._new_adapter = peft_config is not None
        if self._new_adapter:
            policy = with_adapter(policy, peft_config)
        if train_dataset is not None:
            check_trainable(policy)
        if args.disable_dropout:
            disable_dropout(policy)
        self._limits = model_limits(policy)
        self._checked = {}
        collates = data_collator is None
        if data_collator is None:
            pad = getattr(tokenizer, "pad_token_id", None)
            data_collator = StepPreferenceCollator(
                0 if pad is None else pad, packed=args.packing, vocab_size=self._limits.vocab,
                flash_attention=uses_flash_attention(policy),
            )  # fmt: skip
        named = ("loss_type", "loss_weights", "beta", "label_smoothing", "temperature")
        self._loss_options = {**{name: getattr(args, name) for name in named}, **dictionary(args.loss_options)}
        self._means = {"train": Means(), "eval": Means()}
        takes = any(formula.reference != "forbidden" for formula, _ in formulas)
        self._takes_reference = takes and not args.reference_free
        super().__init__(policy, args, data_collator, train_dataset, eval_dataset, tokenizer, **trainer_kwargs)
        check_processes(args)
        self._check_parallelism()
        check_optimizer(self, args)
        # Versions of Trainer without loss_is_scaled_for_ga decide by this whether to divide by the accumulation steps.
        self.model_accepts_loss_kwargs = True
        self._partition()
        self.route = choose_route(self.model, args.route, args.device)
        if isinstance(self.data_collator, StepPreferenceCollator) and collates:
            self.sharing = choose_sharing(self.model, args.prefix_sharing, packing=args.packing)
            self.data_collator.sharing = self.sharing
        elif args.prefix_sharing is True:
            raise ValueError("prefix_sharing: expected 'auto' or False beside a data_collator, which makes the batches")
        self._shard()
        for dataset, name in self._datasets():
            self._check_rows(dataset, name)
        if args.packing:
            self._check_packing(train_dataset if train_dataset is not None else eval_dataset)
        self._add_references()

    def preference_loss(self, model: nn.Module, batch: dict, num_items: float | Tensor | None) -> StepPrefOutput:
        """Runs the model on a batch and computes the loss.

        Args:
            model: The model, perhaps wrapped (DDP).
            batch: What the collator returns, on the model's device.
            num_items: The number of pairs that the loss divides by; None means this batch's.

        Returns:
            The loss and its metrics.
        """
        args, layout, pairs = self.args, batch["layout"], batch["pairs"]
        options = {"num_items": num_items, "backend": args.backend, **self._loss_options}
        options |= {"ref": self._reference_of(batch), "reference_free": not self._takes_reference}
        call = call_model(model, batch, self.route, args.chunk_bytes)
        if call.linear:
            out = call.run(linear_step_pref_loss, layout, pairs, **options)
        else:
            logits, inplace = call.found, args.inplace_backward
            if inplace is None:
                inplace = select(args.backend, logits.device.type, logits.dtype) != "reference"
            inplace = inplace and torch.is_grad_enabled()
            out = call.run(step_pref_loss, layout, pairs, inplace_backward=inplace, **options)
        return self._with_router_loss(out, call.outputs, num_items)

    def _reference_of(self, batch: dict) -> Tensor | None:
        """The reference's step log-probs of a batch, if the loss takes them."""
        if not self._takes_reference:
            return None
        if batch.get("ref") is None:
            raise ValueError(
                f"ref: loss_type {self.args.loss_type} takes a reference, and the batch has none; data_collator must "
                "keep ref_chosen and ref_rejected as batch['ref'] (StepPreferenceCollator does), or give "
                "reference_free=True"
            )
        return batch["ref"]

    def _with_router_loss(self, out: StepPrefOutput, outputs, num_items: float | Tensor | None) -> StepPrefOutput:
        """Adds the balance loss of a mixture of experts, weighted by this batch's share of the pairs."""
        aux = router_loss(self.model, outputs)
        if aux is None or not out.loss.requires_grad:
            return out
        share = 1.0 if num_items is None else out.pairs.num_valid / num_items
        return replace(out, loss=out.loss + share * aux.to(out.loss.device))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        """The loss of one micro-batch. Its share of the update is already in it, so Trainer divides by nothing."""
        out = self.preference_loss(model, inputs, num_items_in_batch)
        self._means["train" if model.training else "eval"].add(out)
        # DDP averages gradients over processes, while num_items counts the pairs of all of them.
        loss = out.loss if num_items_in_batch is None else out.loss * self.accelerator.num_processes
        return (loss, out) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """The number of pairs in all accumulated micro-batches, of all processes."""
        pairs = sum(batch["pairs"].num_valid for batch in batch_samples)
        if self.accelerator.num_processes == 1:
            return float(max(pairs, 1))
        everyone: Any = self.accelerator.gather(torch.tensor(float(pairs), device=device))
        return everyone.sum().clamp(min=1)

    def get_batch_samples(self, epoch_iterator, num_batches, device) -> tuple[list, Any]:
        """The micro-batches of the next update, and the number of their pairs."""
        samples = []
        if self._is_finished():
            return samples, None
        for _, batch in zip(range(num_batches), epoch_iterator, strict=False):
            samples.append(batch)
        return samples, self._get_num_items_in_batch(samples, device)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of an evaluation batch. Trainer's own method gives none for a batch without labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), self.attention_for(inputs):
            return self.compute_loss(model, inputs).detach(), None, None

    def train(self, *args, **kwargs):
        """Trainer's, with the reference's log-probs for datasets that were set after the start."""
        self._add_references()
        self._untrained = False
        return super().train(*args, **kwargs)

    def _get_dataloader(self, dataset, description: str, *args, is_training: bool = False, **kwargs):
        dataset = self._with_reference(dataset, f"{description.lower()} dataset")
        processes = self.accelerator.num_processes
        if processes == 1 or is_training and self.args.dataloader_drop_last:
            return super()._get_dataloader(dataset, description, *args, is_training=is_training, **kwargs)
        # accelerate fills the last batches with repeated rows, which would count in the loss and in the means
        if not is_training or not hasattr(dataset, "__len__"):
            size = self.args.train_batch_size if is_training else self.args.eval_batch_size
            dataset = whole_batches(dataset, size * processes)
            return super()._get_dataloader(dataset, description, *args, is_training=is_training, **kwargs)
        dataset = whole_batches(dataset, 1)
        dataloader = super()._get_dataloader(dataset, description, *args, is_training=is_training, **kwargs)
        fill_last_batches(dataloader)
        return dataloader

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Adds to Trainer's metrics the loss as a mean over pairs, whatever the batch size, and the loss's metrics."""
        self._means["eval"] = Means()
        unprepared = not self.accelerator._models
        # accelerate and DeepSpeed prepare no model without its optimizer
        as_it_is = unprepared and (self._is_sharded or self.zero_stage)
        if as_it_is:
            self.accelerator._models.append(self.model)
        if as_it_is and self.zero_stage:
            self.deepspeed = self.model.to(self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if as_it_is:
            self.accelerator._models.clear()
            self.deepspeed = None
        elif unprepared and self.accelerator.num_processes > 1:
            self._undo_preparation()
        means = self._means["eval"].pop(self.accelerator)
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def _undo_preparation(self) -> None:
        """Lets accelerate prepare the model again for training.

        A model that was prepared for evaluation is marked as prepared. It would be trained without DDP, every process
        by itself. What FSDP and DeepSpeed prepare is the same for evaluation and training.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        self.model = self.model_wrapped = self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        self.accelerator._models.clear()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the means since the last log to a line with the loss."""
        if "loss" in logs:
            logs.update({k: v for k, v in self._means["train"].pop(self.accelerator).items() if k != "loss"})
        super().log(logs, *args, **kwargs)

    def _check_packing(self, dataset) -> None:
        """Compares one row packed and padded: in some models (OPT) packed sequences see each other, silently."""
        # Some datasets have only an iterator.
        pair: list[dict] = list(islice(() if dataset is None or isinstance(dataset, dict) else dataset, 1))
        if not pair:
            return
        collator, padded = self.data_collator, StepPreferenceCollator(getattr(self.data_collator, "pad_token_id", 0))
        if isinstance(collator, StepPreferenceCollator):
            collator = replace(collator, sharing=None)  # what does not share its prefixes is packed
        with self._reference_model() as model:
            one, other = (self.logps_without_grad(model, collate(pair)).sums for collate in (collator, padded))
        difference = (one - other).abs().max().item()
        # Rounding stays far below these bounds; a rejected sequence that sees the chosen one does not.
        if difference > (0.02 if one.dtype == torch.float32 and self.model.dtype == torch.float32 else 0.5):
            name = type(self.model).__name__
            raise ValueError(
                f"packing: {name} gives other log-probs for packed sequences (by {difference:.3g} in a step); "
                "use packing=False"
            )
