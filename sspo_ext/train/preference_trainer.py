"""StepPreferenceTrainer: `transformers.Trainer` with a step-wise preference loss.

What differs from Trainer is here and nothing else: the loss, its normaliser over accumulated micro-batches, the
reference's log-probs, and metrics. Optimisers, schedules, checkpoints, DDP and logging backends are Trainer's.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from ..backends import select
from ..data.collator import StepPreferenceCollator
from ..hf.forward import forward_hidden
from ..hf.head import model_head
from ..layout.bundle import TensorBundle
from ..losses.pref import StepPrefOutput, linear_step_pref_loss, step_pref_loss
from ..objective.pair_arguments import checked_options, chosen_formulas
from ..objective.sums import StepLogps
from .means import Means
from .model_call import (
    batch_logps,
    check_processes,
    choose_route,
    model_inputs,
    router_loss,
    text_logits,
    uses_flash_attention,
)
from .models import load_model
from .preference_config import StepPreferenceConfig
from .reference_cache import TOKEN_COLUMNS, ReferenceCache, add_reference, reference_key
from .whole_batches import whole_batches


class StepPreferenceTrainer(Trainer):
    """Trains a causal LM on tokenized preference rows (`sspo_ext.data.tokenize.tokenize_rows`).

    Args:
        model: a causal LM, a PEFT model, or a name or path (`load_model`, which then gives the tokenizer too).
        args: StepPreferenceConfig.
        train_dataset: list (or datasets.Dataset) of features. Reference log-probs are computed here, before training,
            with the model as given (without the adapter of `peft_config`; with that of a PeftModel), unless the loss
            needs none or the features carry `ref_chosen` and `ref_rejected`.
        eval_dataset: the same, or a dict of them. `evaluate()` returns eval_loss (mean over pairs) and the metrics.
        processing_class: the tokenizer; pads batches and is saved with checkpoints.
        peft_config: wraps the model in an adapter (LoraConfig, ...), so that only the adapter is trained.
        **trainer_kwargs: Trainer's other arguments (callbacks, optimizers, ...).

    Raises ValueError for options that do not fit the loss, a dataset without length where a reference is needed,
    non-finite reference log-probs, and `packing` with a model that mixes packed sequences.

    Example::

        >>> rows = tokenize_rows(load_preference_rows("pairs.jsonl"), tokenizer)
        >>> StepPreferenceTrainer(model, StepPreferenceConfig("out"), rows, processing_class=tokenizer).train()
    """

    # compute_loss divides by the number of pairs of all accumulated micro-batches; Trainer must not divide again.
    loss_is_scaled_for_ga = True

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
        heads = chosen_formulas(args.loss_type, args.loss_weights)
        checked_options(heads, args.beta, args.loss_options or {})
        needing = [head.name for head, _ in heads if head.reference == "required"]
        if args.reference_free and needing:
            raise ValueError(f"reference_free: expected False, since loss_type {needing[0]!r} needs a reference")
        if isinstance(model, (str, os.PathLike)):
            model, tokenizer = load_model(model)
            processing_class = processing_class or tokenizer
        if peft_config is not None:
            from peft import PeftModel, get_peft_model

            if isinstance(model, PeftModel):
                raise ValueError("peft_config: expected None for a PeftModel, which has an adapter; or merge that")
            model = get_peft_model(model, peft_config)
        self._new_adapter = peft_config is not None
        if data_collator is None:
            pad = getattr(processing_class, "pad_token_id", None)
            data_collator = StepPreferenceCollator(
                0 if pad is None else pad, packed=args.packing, flash_attention=uses_flash_attention(model)
            )
        named = ("loss_type", "loss_weights", "beta", "label_smoothing", "temperature")
        self._loss_options = {**{name: getattr(args, name) for name in named}, **(args.loss_options or {})}
        self._means = {"train": Means(), "eval": Means()}
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **trainer_kwargs)
        check_processes(args)
        # Versions before loss_is_scaled_for_ga decide by this whether to divide by the accumulation steps.
        self.model_accepts_loss_kwargs = True
        self.route = choose_route(self.model, args.route, args.device)
        if args.packing:
            self._check_packing(train_dataset if train_dataset is not None else eval_dataset)
        if not args.reference_free and any(head.reference != "forbidden" for head, _ in heads):
            self._add_references()

    def preference_loss(self, model: nn.Module, batch: dict, num_items: float | Tensor | None) -> StepPrefOutput:
        """The model's forward and the loss of one batch."""
        args, layout, pairs = self.args, batch["layout"], batch["pairs"]
        options = {"ref": batch.get("ref"), "num_items": num_items, "backend": args.backend, **self._loss_options}
        if self.route == "linear":
            hidden, outputs = forward_hidden(model, **model_inputs(batch))
            head = model_head(model)
            options.update(head.options, chunk_bytes=args.chunk_bytes)
            out = linear_step_pref_loss(hidden, head.weight, layout, pairs, **options)
            return self._with_router_loss(out, outputs, num_items)
        outputs = model(**model_inputs(batch), use_cache=False)
        logits, inplace = text_logits(outputs, layout), args.inplace_backward
        if inplace is None:
            inplace = select(args.backend, logits.device.type, logits.dtype) != "reference"
        inplace = inplace and torch.is_grad_enabled()
        out = step_pref_loss(logits, layout, pairs, inplace_backward=inplace, **options)
        return self._with_router_loss(out, outputs, num_items)

    def _with_router_loss(self, out: StepPrefOutput, outputs, num_items: float | Tensor | None) -> StepPrefOutput:
        """Adds a mixture of experts' balance loss, which models add only to a loss of their own; weighted by this
        batch's share of the pairs."""
        aux = router_loss(self.model, outputs)
        if aux is None or not out.loss.requires_grad:
            return out
        share = 1.0 if num_items is None else out.pairs.num_valid / num_items
        return replace(out, loss=out.loss + share * aux.to(out.loss.device))

    def step_logps(self, model: nn.Module, batch: dict) -> StepLogps:
        """The model's forward and its step log-probs, as the loss sees them."""
        args = self.args
        return batch_logps(
            model, batch, self.route, chunk_bytes=args.chunk_bytes, temperature=args.temperature, backend=args.backend
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = self.preference_loss(model, inputs, num_items_in_batch)
        self._means["train" if model.training else "eval"].add(out)
        # DDP averages gradients over processes, while num_items counts the pairs of all of them.
        loss = out.loss if num_items_in_batch is None else out.loss * self.accelerator.num_processes
        return (loss, out) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> float | Tensor:
        """Pairs in all accumulated micro-batches, of all processes."""
        pairs = sum(batch["pairs"].num_valid for batch in batch_samples)
        if self.accelerator.num_processes == 1:
            return float(max(pairs, 1))
        return self.accelerator.gather(torch.tensor(float(pairs), device=device)).sum().clamp(min=1)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples = []
        for _, batch in zip(range(num_batches), epoch_iterator, strict=False):
            samples.append(batch)
        return samples, self._get_num_items_in_batch(samples, device)

    def _prepare_input(self, data):
        return data.to(self.args.device) if isinstance(data, TensorBundle) else super()._prepare_input(data)

    def _set_signature_columns_if_needed(self) -> None:
        """What the collator reads; the default is the model's arguments, of which a preference row has none."""
        if self._signature_columns is None:
            self._signature_columns = [*TOKEN_COLUMNS, "pairs", "weight", "margin", "ref_chosen", "ref_rejected"]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # Trainer's own gives no loss for a batch without labels.
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def _get_dataloader(self, dataset, *args, is_training: bool = False, **kwargs):
        if not is_training and self.accelerator.num_processes > 1:
            # accelerate repeats rows where the last batches are not full, and our means are not cut as Trainer's are
            dataset = whole_batches(dataset, self.args.eval_batch_size * self.accelerator.num_processes)
        return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._means["eval"] = Means()
        unprepared = not self.accelerator._models
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if unprepared and self.accelerator.num_processes > 1:
            self._undo_preparation()
        # The loop's own eval_loss is a mean over sequences; this one is over pairs, whatever the batch size.
        means = self._means["eval"].pop(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def _undo_preparation(self) -> None:
        """accelerate marks a model that it prepares for evaluation as prepared, and would then train it as it is,
        without DDP: every process by itself. What FSDP and DeepSpeed prepare is the same for both."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        self.model = self.model_wrapped = self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        self.accelerator._models.clear()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs.update({k: v for k, v in self._means["train"].pop(self.accelerator).items() if k != "loss"})
        super().log(logs, *args, **kwargs)

    def _add_references(self) -> None:
        cache = ReferenceCache(
            folder=self.args.reference_cache or os.path.join(self.args.output_dir, "reference_cache"),
            batch_size=self.args.per_device_eval_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            barrier=self.accelerator.wait_for_everyone,
            progress=self.is_world_process_zero() and not self.args.disable_tqdm,
        )
        settings = {"temperature": self.args.temperature, "mixed_precision": str(self.accelerator.mixed_precision)}
        model_key = None

        def reference(dataset, name: str):
            nonlocal model_key
            has_length = hasattr(dataset, "__len__")
            if dataset is None or has_length and len(dataset) and {"ref_chosen", "ref_rejected"} <= set(dataset[0]):
                return dataset
            model_key = model_key or reference_key(self.model, settings, adapters=not self._new_adapter)
            with self._reference_model() as model:
                return add_reference(
                    dataset, model_key, cache, self.data_collator, lambda b: self._reference_sums(model, b), name
                )

        for name in ("train_dataset", "eval_dataset"):
            dataset = getattr(self, name)
            if isinstance(dataset, dict):
                setattr(self, name, {key: reference(value, f"{name}[{key!r}]") for key, value in dataset.items()})
            else:
                setattr(self, name, reference(dataset, name))

    def _reference_sums(self, model: nn.Module, batch: dict) -> Tensor:
        with torch.no_grad(), self.accelerator.autocast():
            return self.step_logps(model, self._prepare_inputs(batch)).sums

    @contextlib.contextmanager
    def _reference_model(self):
        """The model as given: without the adapter made here, without dropout; on the device of the batches, if it is
        not yet there (before it is sharded) and not in parts."""
        model, training = self.model, self.model.training
        home = None
        if not self.place_model_on_device and getattr(model, "hf_device_map", None) is None:
            home = next(model.parameters()).device
            model.to(self.args.device)
        model.eval()
        try:
            with model.disable_adapter() if self._new_adapter else contextlib.nullcontext():
                yield model
        finally:
            model.train(training)
            if home is not None:
                model.to(home)

    def _check_packing(self, dataset) -> None:
        """One row, packed and padded: some models (OPT) let packed sequences see each other, silently."""
        # by its iterator, which is all that some datasets have
        pair = list(islice(() if dataset is None or isinstance(dataset, dict) else dataset, 1))
        if not pair:
            return
        padded = StepPreferenceCollator(getattr(self.data_collator, "pad_token_id", 0))
        with self._reference_model() as model:
            one, other = (self._reference_sums(model, collate(pair)) for collate in (self.data_collator, padded))
        difference = (one - other).abs().max().item()
        # Rounding of a step's sum stays far below this; a rejected sequence that sees the chosen one does not.
        if difference > (0.02 if one.dtype == torch.float32 and self.model.dtype == torch.float32 else 0.5):
            name = type(self.model).__name__
            raise ValueError(
                f"packing: {name} gives other log-probs for packed sequences (by {difference:.3g} in a step); "
                "use packing=False"
            )
