# SPDX-License-Identifier: Apache-2.0
"""The options of StepPreferenceTrainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from .options import check_dictionary, check_reporting, check_sampling_order, documented


@documented
@dataclass
class StepPreferenceConfig(TrainingArguments):
    """TrainingArguments and the options of the loss.

    The defaults of `remove_unused_columns`, `logging_nan_inf_filter` and `logging_steps` differ from those of
    TrainingArguments.

    Attributes:
        remove_unused_columns: False: the collator needs columns that the model does not.
        logging_nan_inf_filter: False: a NaN loss is logged as NaN.
        logging_steps: Updates between two log lines.
        loss_type: A pair loss of docs/losses.md, or several, which are added up.
        loss_weights: The weight of each loss type; None means 1 for each.
        beta: The scale of the rewards; None means the loss type's own default.
        label_smoothing: The probability that a pair is labelled the wrong way round, in [0, 0.5).
        loss_options: Other options of the loss types, such as `{"simpo_gamma": 0.5}`.
        temperature: Divides the logits.
        reference_free: Train without a reference model: a reward is beta * log pi.
        reference_cache: The folder of cached reference log-probs; None means OUTPUT_DIR/reference_cache.
        disable_dropout: Whether dropout is turned off in the model as given and in its adapter, in place, as in TRL.
            With False the policy is trained with dropout, and the reference has none.
        packing: Padding-free batches: all sequences end to end in one row.
        prefix_sharing: Whether the model computes the tokens that sequences of a batch have in common once: the prompt
            of chosen and rejected, the steps before a pair of steps, the prompt of several rows. "auto" does so where
            it pays, by a count of FLOPs, and where the model's own attention can. True does so always, on GPUs with
            FlexAttention, and raises UnsupportedTree for a model that cannot. Dropout, if it is on, is then drawn once
            for a shared token.
        backend: Who computes the loss: "auto", "cpu", "triton", "cuda" or "reference".
        route: "linear" computes log-probs from hidden states and never stores the logits. It raises UnsupportedHead
            for a model whose LM head it cannot use. "logits" reads the model's own logits. "auto" is "linear" where
            the model allows it, else "logits" with a warning.
        chunk_bytes: The size of the linear route's logits buffer in bytes; None: see `linear_step_pref_loss`.
        inplace_backward: For the logits route: whether the gradient is written over the logits, which saves a second
            buffer of their size. None means wherever the backend can.

    Raises:
        ValueError: For `label_smoothing_factor`, which smooths tokens, not pairs, and other options of
            TrainingArguments that do not fit rows of two texts (`group_by_length`, `dispatch_batches`).
        TypeError: For `loss_options` that are no dictionary.

    Examples:
        >>> from sspo_ext.train import StepPreferenceConfig
        >>> args = StepPreferenceConfig("out", loss_type="simpo", loss_options={"simpo_gamma": 0.5})
        >>> args.loss_type
        ['simpo']
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "loss_options"]

    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    logging_steps: float = 10
    loss_type: str | list[str] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    beta: float | None = None
    label_smoothing: float = 0.0
    loss_options: dict | str | None = None
    temperature: float = 1.0
    reference_free: bool = False
    reference_cache: str | None = None
    disable_dropout: bool = True
    packing: bool = False
    prefix_sharing: Literal["auto", True, False] = "auto"
    backend: str = "auto"
    route: str = "linear"
    chunk_bytes: int | None = None
    inplace_backward: bool | None = None

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: expected 0, since it smooths tokens, got {self.label_smoothing_factor}; "
                "label_smoothing is for the order of pairs"
            )
        check_dictionary("loss_options", self.loss_options)
        reason = "a row has two texts and no one length; packing=True saves the padding"
        check_reporting(self)
        check_sampling_order(self, ("random", "sequential"), reason)
        accelerator = cast(AcceleratorConfig, self.accelerator_config)  # TrainingArguments has made one of it
        if accelerator.dispatch_batches:
            raise ValueError("dispatch_batches: expected False, since a batch's layout is no tensor that can be sent")
        # by default the first process would read a stream for all, and send the others their parts of each batch
        accelerator.dispatch_batches = False
